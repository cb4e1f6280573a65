"""The model of `pipeflow.partitioners.cpsat` as a mixed-integer linear programme, solved by HiGHS.

A cross-check of the other exact algorithms by another solver in floating point (SciPy, part of
`pipeflow[solvers]`); slower than they are. The same prefix variables: x[a, s] = p[a, s] - p[a, s - 1].
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from pipeflow.errors import PlanError
from pipeflow.partitioners import cpsat as model
from pipeflow.partitioners.atoms import Cut
from pipeflow.partitioners.bounds import cut_bound, lower_bound
from pipeflow.partitioners.certify import certified, stages_of
from pipeflow.partitioners.chain import closest
from pipeflow.partitioners.feasibility import memory_limits, no_cut_fits, require_feasible, shortfall
from pipeflow.partitioners.normalise import fold, memory_binds
from pipeflow.partitioners.objective import compute_seconds
from pipeflow.partitioners.partition import Partition
from pipeflow.partitioners.problem import PartitionProblem, Position

_SOLVER_TOLERANCE = 1e-6
"""HiGHS' own tolerance on constraints: its bound may be too high by that much of the scale."""


def supports(problem: PartitionProblem) -> str | None:
    """Why the model cannot express the problem, or None if it can."""
    if reason := model.supports(problem):
        return reason
    if problem.stage_count is not None:
        return "a number of stages is asked for; set max_stages"
    if problem.chunks > 1:
        return "a device may hold several stages; set chunks=1"
    if problem.pinned.stages:
        return "layers are pinned to stages; pin them to devices, or together and apart"
    if memory_binds(problem) and problem.in_flight(Position(1, 1, problem.num_microbatches)) > 0:
        return "memory limits bind activations"
    return None


def milp(problem: PartitionProblem) -> Partition:
    """The best contiguous partition by HiGHS, within its tolerance.

    Raises:
        PlanError: what the model does not express, or SciPy is not installed.
        Infeasible: no cut fits.
    """
    if reason := supports(problem):
        raise PlanError(f"milp cannot solve this: {reason}; use another partitioner")
    require_feasible(problem)
    smaller = fold(problem)
    bound = max(lower_bound(problem), cut_bound(smaller))
    stage_of, proved = _solve(smaller)
    if stage_of is None:
        raise no_cut_fits(problem, closest(problem, bound), "cut")
    sets = [[a for a, s in enumerate(stage_of) if s == stage] for stage in range(problem.stage_limit)]
    cut: Cut = [(atoms, (d,)) for d, atoms in enumerate(s for s in sets if s)]
    stages = stages_of(smaller, smaller.pinned.on_pinned_devices(cut, problem.cluster.num_devices))
    if shortfall(problem, stages):
        raise PlanError("the cut that HiGHS found breaks a memory limit within its tolerance; use another partitioner")
    return certified(problem, stages, partitioner="milp", lower_bound=max(bound, proved))


def _solve(problem: PartitionProblem) -> tuple[list[int] | None, float]:
    """The stage of every atom, and the bound that was proved, in seconds."""
    try:
        from scipy.optimize import Bounds, LinearConstraint
        from scipy.optimize import milp as solve
        from scipy.sparse import coo_array
    except ImportError as error:
        raise PlanError("milp needs SciPy; install pipeflow[solvers]") from error
    rows = _Rows(problem)
    variables = rows.num_variables
    entries = [(r, c, v) for r, (row, _) in enumerate(rows.upper) for c, v in row.items()]
    matrix = coo_array(
        ([v for _, _, v in entries], ([r for r, _, _ in entries], [c for _, c, _ in entries])),
        shape=(len(rows.upper), variables),
    ).tocsr()
    objective = np.zeros(variables)
    objective[-1] = 1.0
    integral = np.zeros(variables)
    integral[: rows.num_prefix] = 1
    highest = np.ones(variables)
    highest[-1] = np.inf
    result = solve(
        objective,
        constraints=LinearConstraint(matrix, ub=np.array([limit for _, limit in rows.upper])),
        integrality=integral,
        bounds=Bounds(np.zeros(variables), highest),
        options={"mip_rel_gap": 0.0},
    )
    if result.x is None:
        return None, math.inf
    most = problem.stage_limit
    prefix = np.round(result.x[: rows.num_prefix]).reshape(problem.atoms.count, most - 1)
    stage_of = [most - 1 - int(row.sum()) for row in prefix]
    dual = result.fun if result.mip_dual_bound is None else result.mip_dual_bound  # None without integers
    return stage_of, max(0.0, dual - 2 * _SOLVER_TOLERANCE) * rows.scale


class _Rows:
    """The constraints as rows `coefficients . variables <= limit`, seconds scaled to all work.

    Variables: p[a, s] for s < K - 1, then y of each net and stage, then the bottleneck.
    """

    def __init__(self, problem: PartitionProblem) -> None:
        self.problem, self.atoms, self.most = problem, problem.atoms, problem.stage_limit
        self.num_prefix = self.atoms.count * (self.most - 1)
        self.scale = math.fsum(layer.seconds for layer in problem.costs.layers) or 1.0
        self.num_variables = self.num_prefix + len(self.atoms.nets) * self.most + 1
        self.upper: list[tuple[Mapping[int, float], float]] = []
        self._add_order()
        self._add_nets()
        self._add_loads()
        self._add_pins()

    def prefix(self, atom: int, stage: int) -> tuple[dict[int, float], float]:
        """p[atom, stage] as (coefficients, constant)."""
        if stage < 0:
            return {}, 0.0
        if stage >= self.most - 1:
            return {}, 1.0
        return {atom * (self.most - 1) + stage: 1.0}, 0.0

    def on(self, atom: int, stage: int) -> tuple[dict[int, float], float]:
        return _minus(self.prefix(atom, stage), self.prefix(atom, stage - 1))

    def net(self, index: int, stage: int) -> int:
        return self.num_prefix + index * self.most + stage

    def add(self, expression: tuple[dict[int, float], float], limit: float = 0.0) -> None:
        self.upper.append((expression[0], limit - expression[1]))

    def _add_order(self) -> None:
        for stage in range(self.most - 1):
            for atom in range(self.atoms.count):
                if stage:
                    self.add(_minus(self.prefix(atom, stage - 1), self.prefix(atom, stage)))
            for a, b in self.atoms.edges:
                self.add(_minus(self.prefix(b, stage), self.prefix(a, stage)))

    def _add_nets(self) -> None:
        for index, net in enumerate(self.atoms.nets):
            for stage in range(self.most):
                paid = ({self.net(index, stage): 1.0}, 0.0)
                producer = self.on(net.producer, stage)
                for reader in net.readers:
                    other = self.on(reader, stage)
                    self.add(_minus(_minus(producer, other), paid))
                    self.add(_minus(_minus(other, producer), paid))

    def _add_loads(self) -> None:
        problem, cluster = self.problem, self.problem.cluster
        bandwidth, latency = problem.transfer_link
        limit = memory_limits(problem)[0]
        unit = max(limit, 1.0)  # in which bytes are counted, so that numbers are about 1
        ratio = 1 + problem.gradient_ratio + problem.optimizer_ratio
        for stage in range(self.most):
            load: tuple[dict[int, float], float] = ({self.num_variables - 1: -1.0}, 0.0)
            held: tuple[dict[int, float], float] = ({}, 0.0)
            for atom, group in enumerate(self.atoms.layers):
                here = self.on(atom, stage)
                load = _minus(load, here, compute_seconds(group, cluster.devices[0]) / self.scale)
                if limit < math.inf:
                    held = _minus(held, here, ratio * int(self.atoms.parameter_bytes[atom]) / unit)
            for index, net in enumerate(self.atoms.nets):
                load[0][self.net(index, stage)] = (latency + net.bytes / bandwidth) / self.scale
            self.add(load)
            if limit < math.inf:
                self.add(held, limit / unit)

    def _add_pins(self) -> None:
        pinned = self.problem.pinned
        for stage in range(self.most):
            for a, b in pinned.apart:
                self.add(_minus(self.on(a, stage), self.on(b, stage), 1.0), 1.0)
            if pinned.max_layers is not None:
                held: tuple[dict[int, float], float] = ({}, 0.0)
                for atom, count in enumerate(pinned.sizes):
                    held = _minus(held, self.on(atom, stage), float(count))
                self.add(held, float(pinned.max_layers))


def _minus(
    a: tuple[dict[int, float], float], b: tuple[dict[int, float], float], plus: float = -1.0
) -> tuple[dict[int, float], float]:
    """The sum a + plus * b, by default a - b."""
    result = dict(a[0])
    for variable, value in b[0].items():
        result[variable] = result.get(variable, 0.0) + plus * value
    return result, a[1] + plus * b[1]
