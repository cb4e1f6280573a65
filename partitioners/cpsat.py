"""The contiguous cut as a CP-SAT model, warm-started and proved: the extra `pipeflow[solvers]`.

Prefix variables p[a, s] say that the stage of atom a is at most s; x[a, s] = p[a, s] - p[a, s - 1]
that it is s. An edge a -> b is p[b, s] <= p[a, s]. A net costs stage s where some of its ends are
there and others are not: y >= |x[producer, s] - x[reader, s]|. Seconds become whole numbers,
rounded down, so that what the solver proves is a bound; partitions are priced by the objective.

For alike devices and one replica a stage; positions are counted from the last stage, so that
memory in flight is known, and unused stages are the first ones. With c chunks a device there are
c times as many stages; stage s is on device s mod K, and a net costs a device, not a stage.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeflow.errors import PlanError
from pipeflow.partitioners.atoms import Cut
from pipeflow.partitioners.bounds import cut_bound, lower_bound
from pipeflow.partitioners.certify import certified, stages_of
from pipeflow.partitioners.chain import closest
from pipeflow.partitioners.feasibility import memory_limits, no_cut_fits, require_feasible, shortfall
from pipeflow.partitioners.normalise import fold
from pipeflow.partitioners.objective import compute_seconds, objective
from pipeflow.partitioners.orders import best_of_orders
from pipeflow.partitioners.partition import Partition, Stage
from pipeflow.partitioners.problem import PartitionProblem, Position, one_version
from pipeflow.partitioners.rounds import slots_of, stages_in_rounds

_RESOLUTION = 2.0**34
"""Whole numbers up to here for the seconds of the warm start's bottleneck."""

_FORBIDDEN = 2.0**40
"""More than any bottleneck that the model allows: what takes longer need not be told apart."""

_MOST_WORK = 60.0
"""The solver's own deterministic seconds: the same on every machine, so that results are."""


def supports(problem: PartitionProblem) -> str | None:
    """Why the model cannot express the problem, or None if it can."""
    if problem.replica_limit > 1:
        return "more than one replica a stage is allowed; set max_replicas=1"
    if not problem.cluster.is_uniform:
        return "devices or links differ"
    if problem.transfers not in ("added", "free"):
        return f"transfers are {problem.transfers}"
    if problem.weight_versions is not one_version and min(memory_limits(problem)) < math.inf:
        return "weights are stashed"
    if problem.chunks > 1 and (problem.stage_count or problem.max_stages or _holds_activations(problem)):
        return "several chunks on a device, with a number of stages or limits on activations"
    return None


def _holds_activations(problem: PartitionProblem) -> bool:
    limited = min(memory_limits(problem)) < math.inf
    return limited and problem.in_flight(Position(1, 1, problem.num_microbatches)) > 0


def cpsat(problem: PartitionProblem) -> Partition:
    """The best contiguous partition, proved as far as the solver gets in its budget of work.

    Raises:
        PlanError: replicas, unlike devices, transfers that overlap or stashed weights, which the model does
            not express; or OR-tools is not installed.
        Infeasible: no cut fits.
    """
    if reason := supports(problem):
        raise PlanError(f"cpsat cannot solve this: {reason}; use another partitioner")
    require_feasible(problem)
    smaller = fold(problem)
    start = best_of_orders(smaller, rounds=12)
    bound = max(lower_bound(problem), cut_bound(smaller))
    stages, proved = improve(smaller, start, bound)
    if stages is None:
        raise no_cut_fits(problem, closest(problem, bound), "cut")
    return certified(problem, stages, partitioner="cpsat", lower_bound=max(bound, proved))


def improve(
    problem: PartitionProblem, start: Sequence[Stage] | None, bound: float, *, work: float = _MOST_WORK
) -> tuple[tuple[Stage, ...] | None, float]:
    """A partition at least as good as `start`, and a proven lower bound.

    Args:
        start: a valid partition, or None.
        bound: what is proven already.
        work: the solver's budget in its deterministic seconds.
    """
    model = _Model(problem, _scale(problem, start))
    return model.solve(start, bound, work)


def _scale(problem: PartitionProblem, start: Sequence[Stage] | None) -> float:
    if start:
        reach = objective(problem, start)
    else:  # pins may force dear transfers
        bandwidth, latency = problem.cluster.link(0, 1) if problem.cluster.num_devices > 1 else (math.inf, 0.0)
        moved = math.fsum(len(net.readers) * (latency + net.bytes / bandwidth) for net in problem.atoms.nets)
        reach = math.fsum(compute_seconds(group, problem.cluster.devices[0]) for group in problem.atoms.layers) + moved
    return _RESOLUTION / reach if reach else 1.0


@dataclass
class _Model:
    problem: PartitionProblem
    scale: float

    @property
    def num_devices(self) -> int:
        return self.problem.stage_limit if self.problem.chunks == 1 else self.problem.cluster.num_devices

    @property
    def num_slots(self) -> int:
        """Stages, used or not."""
        return self.num_devices * self.problem.chunks

    def solve(self, start: Sequence[Stage] | None, bound: float, work: float) -> tuple[tuple[Stage, ...] | None, float]:
        try:
            from ortools.sat.python import cp_model
        except ImportError as error:
            raise PlanError("cpsat needs OR-tools; install pipeflow[solvers]") from error
        problem, atoms = self.problem, self.problem.atoms
        most = self.num_slots
        model: Any = cp_model.CpModel()
        reach = int(_RESOLUTION * 1.001) if start else int(_RESOLUTION * 4)
        bottleneck = model.new_int_var(min(reach, math.floor(bound * self.scale)), reach, "bottleneck")
        prefix = [[model.new_bool_var("") for _ in range(most - 1)] for _ in range(atoms.count)]
        on: list[list[Any]] = []
        for row in prefix:
            for a, b in itertools.pairwise(row):
                model.add_implication(a, b)
            places = [model.new_bool_var("") for _ in range(most)] if most > 1 else [1]
            ends = [0, *row, 1]
            if most > 1:
                for s, place in enumerate(places):
                    model.add(place == ends[s + 1] - ends[s])
            on.append(places)
        for a, b in atoms.edges:
            for pa, pb in zip(prefix[a], prefix[b], strict=True):
                model.add_implication(pb, pa)
        hints = self._hints(start, most)
        by_device = on if self.problem.chunks == 1 else self._on_devices(model, on)
        self._add_loads(model, by_device, bottleneck, [h % self.num_devices for h in hints])
        self._add_memory(model, by_device)
        if self.problem.chunks == 1:
            self._add_used(model, on)
        self._add_pins(model, on)
        if hints:
            for atom, row in enumerate(prefix):
                for s, variable in enumerate(row):
                    model.add_hint(variable, hints[atom] <= s)
        model.minimize(bottleneck)
        solver: Any = cp_model.CpSolver()
        solver.parameters.num_workers = 8
        solver.parameters.interleave_search = True
        solver.parameters.max_deterministic_time = work
        solver.parameters.random_seed = 1
        # With it, OR-tools 9.15 proves bounds above the optimum of models with tight memory (its issue 5293).
        solver.parameters.presolve_inclusion_work_limit = 0
        status = solver.solve(model)
        if status == cp_model.INFEASIBLE:
            # OR-tools 9.15 presolves some models with a narrow bottleneck away that do have solutions.
            solver.parameters.cp_model_presolve = False
            status = solver.solve(model)
        if status == cp_model.INFEASIBLE:
            return (None, math.inf) if start is None else (tuple(start), bound)
        proved = max(bound, (solver.best_objective_bound - 0.5) / self.scale * (1 - 1e-12))
        if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
            return (tuple(start) if start else None), proved
        stage_of = [next(s for s, v in enumerate(row) if isinstance(v, int) or solver.value(v)) for row in on]
        found = self._stages(stage_of, most)
        if shortfall(problem, found):  # bytes were rounded down in the model
            return (tuple(start) if start else None), proved
        if start is not None and objective(problem, start) <= objective(problem, found):
            found = tuple(start)
        return found, proved

    def _on_devices(self, model: Any, on: list[list[Any]]) -> list[list[Any]]:
        """Whether each atom is on each device, whichever of its chunks."""
        count, result = self.num_devices, []
        for row in on:
            places = [model.new_bool_var("") for _ in range(count)]
            for device, place in enumerate(places):
                model.add(place == sum(row[device::count]))
            result.append(places)
        return result

    def _hints(self, start: Sequence[Stage] | None, most: int) -> list[int]:
        """The stage of every atom in `start`, counted so that its last stage is the last."""
        if start is None:
            return []
        shift = most - len(start)
        slots = [s + shift for s in range(len(start))] if self.problem.chunks == 1 else slots_of(self.problem, start)
        stage_of = {name: slot for slot, stage in zip(slots, start, strict=True) for name in stage.layers}
        return [stage_of[names[0]] for names in self.problem.atoms.members]

    def _stages(self, stage_of: Sequence[int], most: int) -> tuple[Stage, ...]:
        if self.problem.chunks == 1:
            sets = [[a for a, s in enumerate(stage_of) if s == stage] for stage in range(most)]
            row: Cut = [(atoms, (d,)) for d, atoms in enumerate(s for s in sets if s)]
            return stages_of(self.problem, self.problem.pinned.on_pinned_devices(row, self.problem.cluster.num_devices))
        return stages_in_rounds(self.problem, stage_of)

    def _add_loads(self, model: Any, on: list[list[Any]], bottleneck: Any, hints: list[int]) -> None:
        problem, atoms = self.problem, self.problem.atoms
        device = problem.cluster.devices[0]
        compute = [math.floor(min(compute_seconds(g, device) * self.scale, _FORBIDDEN)) for g in atoms.layers]
        bandwidth, latency = problem.transfer_link
        weights: dict[tuple[int, tuple[int, ...]], float] = {}
        for net in atoms.nets:
            key = (net.producer, net.readers)
            weights[key] = weights.get(key, 0.0) + latency + net.bytes / bandwidth
        for s in range(self.num_devices):
            load = [c * row[s] for c, row in zip(compute, on, strict=True) if c]
            for (producer, readers), seconds in weights.items():
                cost = math.floor(min(seconds * self.scale, _FORBIDDEN))
                if not cost or self.num_devices == 1:
                    continue
                y = model.new_bool_var("")
                for reader in readers:
                    model.add_bool_or(y, on[producer][s].negated(), on[reader][s])
                    model.add_bool_or(y, on[producer][s], on[reader][s].negated())
                if hints:
                    inside = [hints[end] == s for end in (producer, *readers)]
                    model.add_hint(y, any(inside) and not all(inside))
                load.append(cost * y)
            model.add(sum(load) <= bottleneck)

    def _add_memory(self, model: Any, on: list[list[Any]]) -> None:
        problem, atoms = self.problem, self.problem.atoms
        limit = memory_limits(problem)[0]
        if limit == math.inf:
            return
        ratio = 1 + problem.gradient_ratio + problem.optimizer_ratio
        most = self.num_devices
        for s in range(most):
            in_flight = problem.in_flight(Position(1, most - s, problem.num_microbatches))
            used = [
                (int(ratio * int(p)) + in_flight * int(h)) * row[s]
                for p, h, row in zip(atoms.parameter_bytes, atoms.saved_bytes, on, strict=True)
                if p or (h and in_flight)
            ]
            for net in atoms.nets if problem.holds_received and in_flight and most > 1 else ():
                if not net.is_activation or not net.bytes:
                    continue
                kept = model.new_bool_var("")
                for reader in net.readers:
                    model.add_bool_or(kept, on[net.producer][s], on[reader][s].negated())
                used.append(in_flight * net.bytes * kept)
            if used:
                model.add(sum(used) <= int(limit))

    def _add_pins(self, model: Any, on: list[list[Any]]) -> None:
        """Layers apart, few, and on their stages. What is on one device is one atom; on two, it is apart."""
        pinned, most = self.problem.pinned, self.num_slots
        for slot in range(most):
            if pinned.max_layers is not None:
                model.add(sum(int(n) * row[slot] for n, row in zip(pinned.sizes, on, strict=True)) <= pinned.max_layers)
            for a, b in pinned.apart:
                model.add(on[a][slot] + on[b][slot] <= 1)
        for atom, indices in pinned.stages.items():
            for index in indices:
                for slot in range(most):
                    self._add_place(model, on, on[atom][slot], slot, index)

    def _add_place(self, model: Any, on: list[list[Any]], here: Any, slot: int, index: int) -> None:
        """If an atom is in the slot, that is the stage `index`; the first stage is the first slot in use."""
        if index < 0:
            if slot != self.num_slots + index:
                model.add(here == 0)
            return
        first = slot - index
        if first < 0:
            model.add(here == 0)
            return
        model.add(here <= sum(row[first] for row in on))
        if first > 0:
            for row in on:
                model.add(here + row[first - 1] <= 1)

    def _add_used(self, model: Any, on: list[list[Any]]) -> None:
        """Unused stages come first, and none where a number of stages is asked for."""
        problem, most = self.problem, self.problem.stage_limit
        if most == 1:
            return
        for s in range(most):
            if problem.stage_count is not None:
                model.add_bool_or([row[s] for row in on])
            elif s + 1 < most:
                for row in on:
                    model.add_bool_or([row[s].negated(), *(other[s + 1] for other in on)])
