"""The exact dynamic programme over ideals: every contiguous cut at once, pruned by a threshold.

For a threshold U the programme finds for every ideal J the least number of devices on which all
that follows J runs in stages of at most U seconds each (Tarnawski et al., NeurIPS 2020, section 4,
turned from a table over (ideal, devices) into one number for each ideal, so that memory is linear
in the ideals; replicas as Narayanan et al., SOSP 2019, section 3.1, count them):

    devices(I) = min over J, a superset of I, and r of r + devices(J)
                 where the stage J - I on r devices takes at most U and fits into memory

It runs from the last stage to the first, because what a stage has to hold depends on the replicas
from it on; the fewer they are the less, so the least number of them is all there is to know.
Ideals whose work does not fit the remaining devices at U are skipped. U starts just under the
best partition known; where it cannot be reached, U is a proven bound. What a stage costs at least is
in `pipeflow.partitioners.lattice`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeflow.errors import PlanError
from pipeflow.partitioners.atoms import Floats, Ints
from pipeflow.partitioners.bounds import cut_bound, lower_bound
from pipeflow.partitioners.certify import certified, stages_of
from pipeflow.partitioners.chain import closest
from pipeflow.partitioners.feasibility import no_cut_fits, require_feasible, shortfall
from pipeflow.partitioners.lattice import Lattice, StageCosts, enumerate_ideals
from pipeflow.partitioners.moves import settle
from pipeflow.partitioners.normalise import fold
from pipeflow.partitioners.objective import objective
from pipeflow.partitioners.orders import best_of_orders
from pipeflow.partitioners.partition import Partition, Stage
from pipeflow.partitioners.problem import PartitionProblem

MOST_IDEALS = 60_000
_STRICTLY = 1 - 1e-9
_UNREACHED = 2**30

_SHARES = (0.97, 0.94, 0.9, 0.86, 0.82, 0.77, 0.72, 0.66, 0.6)
"""Of a device's memory, what bound atoms may fill where unbound ones find no room beside all that may."""

_ROUNDING = 1 + 1e-12
"""Sums of work in another order differ by that much at most."""


def supports(problem: PartitionProblem) -> str | None:
    """Why the programme cannot express the problem, or None if it can."""
    if problem.chunks > 1:
        return "a device may hold several stages; set chunks=1"
    if not problem.cluster.is_uniform:
        return "devices or links differ"
    if problem.stage_count is not None:
        return "a number of stages is asked for; set max_stages"
    if problem.pinned.stages:
        return "layers are pinned to stages; pin them to devices, or together and apart"
    if problem.replica_limit > 1 and problem.pinned.devices:
        return "layers are pinned to devices, and more than one replica a stage is allowed; set max_replicas=1"
    if problem.replica_limit > 1 and problem.max_stages is not None:
        return "max_stages is set, and more than one replica a stage is allowed; set max_replicas=1"
    return None


def ideals(problem: PartitionProblem) -> Partition:
    """The best contiguous partition, with its proof, where the graph has few enough ideals.

    Starts from the best of many orders. Exact but for what `pipeflow.partitioners.lattice` leaves
    out; the lower bound is proven in any case.

    Raises:
        PlanError: unlike devices, an exact number of stages, layers pinned to stages, or more than
            60,000 ideals.
        Infeasible: no cut fits.
    """
    if reason := supports(problem):
        raise PlanError(f"ideals cannot solve this: {reason}; use another partitioner")
    require_feasible(problem)
    smaller = fold(problem)
    start = best_of_orders(smaller, rounds=24)
    bound = max(lower_bound(problem), cut_bound(smaller))
    result = improve(smaller, start, bound)
    if result is None:
        raise PlanError(f"the graph has more than {MOST_IDEALS} ideals; use another partitioner")
    stages, proved = result
    if stages is None:
        what = "cut" if proved == math.inf else "cut of many orders"
        raise no_cut_fits(problem, closest(problem, bound), what)
    return certified(problem, stages, partitioner="ideals", lower_bound=proved)


def improve(
    problem: PartitionProblem, start: Sequence[Stage] | None, bound: float, *, most_ideals: int = MOST_IDEALS
) -> tuple[tuple[Stage, ...] | None, float] | None:
    """A partition at least as good as `start` and a proven bound, inf if there is no partition at all.

    None if there are too many ideals.
    """
    masks = enumerate_ideals(problem, most_ideals)
    if masks is None:
        return None
    table = Programme(problem, Lattice(problem, masks))
    best = tuple(start) if start else None
    reach = objective(problem, best) if best else table.ample
    if best is None and table.chain(reach) is None:
        return None, math.inf
    while reach * _STRICTLY > bound:
        chain = table.chain(reach * _STRICTLY)
        if chain is None:
            return best, max(bound, reach * _STRICTLY)
        found = table.stages(chain) or _roomier(table, reach * _STRICTLY)
        seconds = objective(problem, found) if found else math.inf
        if found is None or seconds >= reach * _STRICTLY:
            break
        best, reach = found, seconds
    low, high = bound, reach
    for _ in range(6 if best and low < high * _STRICTLY else 0):
        middle = (low + high) / 2
        if table.chain(middle) is None:
            low = middle
        else:
            high = middle
    return best, max(bound, low)


def _roomier(table: Programme, upper: float) -> tuple[Stage, ...] | None:
    """Stages within `upper` that leave room for the atoms that no order binds, if some are found."""
    if all(table.problem.atoms.bound) or table.costs.limit == math.inf:
        return None
    for share in _SHARES:
        less = replace(table, memory_share=share)
        chain = less.chain(upper)
        if chain is not None and (found := less.stages(chain)) is not None:
            return found
    return None


class _Step(NamedTuple):
    """A stage of a chain: from the ideal of one row to that of another, on so many devices."""

    row: int
    after: int
    replicas: int


class _Ideals(NamedTuple):
    """Candidates for where a stage begins, and what the stage then costs but for its replicas."""

    rows: Ints
    compute: Floats
    parameters: Floats
    stuck: Floats
    inward: Floats
    outward: Floats
    each: Floats


@dataclass(frozen=True)
class Programme:
    """The recurrence over the ideals of a problem, for one threshold after another.

    Attributes:
        memory_share: of the devices' memory, what stages may fill; with less than all of it, that there is
            no chain proves nothing.
    """

    problem: PartitionProblem
    lattice: Lattice
    memory_share: float = 1.0

    @cached_property
    def costs(self) -> StageCosts:
        return StageCosts(self.problem, self.memory_share)

    @cached_property
    def ample(self) -> float:
        """More seconds than any stage can take."""
        lattice, most = self.lattice, range(1, self.problem.replica_limit + 1)
        moved = np.array([2 * float(lattice.passing.max()) + lattice.most_unbound])
        whole = lattice.work[-1:], lattice.parameters[-1:], moved, np.zeros(1)
        return max(float(self.costs.seconds(r, *whole)[0]) for r in most) + 1.0

    def chain(self, upper: float) -> list[_Step] | None:
        """The stages, each within `upper` and memory, or None if there are none."""
        work, most = self.lattice.work, self.problem.device_limit
        slack = upper * (1 + 1e-13)
        devices = np.full(len(work), _UNREACHED, np.int32)
        after, replicas = np.zeros((2, len(work)), np.int64)
        devices[-1] = 0
        for row in range(len(work) - 1, 0, -1):
            used = int(devices[row])
            left = most - used
            if left < 1 or work[row] > left * slack * _ROUNDING:
                continue
            found = self._candidates(row, used, devices, slack)
            for r in filter(self.problem.allows, range(1, min(self.problem.replica_limit, left) + 1)):
                fits = self._fits(found, r, used + r, slack) & (devices[found.rows] > used + r)
                better = found.rows[fits & (work[found.rows] <= (left - r) * slack * _ROUNDING)]
                devices[better], after[better], replicas[better] = used + r, row, r
            if devices[0] <= most:
                break
        if devices[0] > most:
            return None
        steps, row = [], 0
        while row < len(work) - 1:
            steps.append(_Step(row, int(after[row]), int(replicas[row])))
            row = steps[-1].after
        return steps

    def _candidates(self, row: int, used: int, devices: NDArray[np.int32], slack: float) -> _Ideals:
        """Where a stage that ends at the ideal of `row` may begin, with `used` devices after it."""
        lattice, problem = self.lattice, self.problem
        left = problem.device_limit - used
        most = min(problem.replica_limit, left)
        longest = slack / self.costs.shares[1 : most + 1].min() * _ROUNDING
        low = int(np.searchsorted(lattice.work, lattice.work[row] - longest))
        high = int(np.searchsorted(lattice.work, (left - 1) * slack * _ROUNDING, side="right"))
        some = lattice.subsets(row, low, high)
        some = lattice.allowed(some[devices[some] > used + 1], row)
        inward, outward = lattice.transfers(some, row)
        outward += lattice.unbound(some, row)
        return _Ideals(
            rows=some,
            compute=np.maximum(lattice.work[row] - lattice.work[some], 0.0),
            parameters=lattice.parameters[row] - lattice.parameters[some],
            stuck=lattice.stuck[row] - lattice.stuck[some],
            inward=inward,
            outward=outward,
            each=lattice.saved[row] - lattice.saved[some] + lattice.received_bytes(some, row)
            if self.costs.limit < math.inf
            else inward,
        )

    def _fits(self, found: _Ideals, replicas: int, from_here: int, slack: float) -> NDArray[np.bool_]:
        seconds = self.costs.seconds(replicas, found.compute, found.parameters, found.inward, found.outward)
        fits: NDArray[np.bool_] = seconds <= slack
        if self.costs.limit < math.inf:
            held = self.costs.held(replicas, from_here, found.parameters, found.each)
            fits &= held <= self.costs.limit
        if replicas > 1:
            fits &= found.stuck == 0
        return fits

    def stages(self, chain: Sequence[_Step]) -> tuple[Stage, ...] | None:
        """The stages of a chain, unbound atoms where they cost least, or fit; None if there are none that fit."""
        atoms, masks = self.problem.atoms, self.lattice.sorted_masks
        if not chain:  # no atom is bound
            return None
        firsts = [0, *itertools.accumulate(step.replicas for step in chain)]
        cut = []
        for step, first in zip(chain, firsts, strict=False):
            mask = masks[step.after] & ~masks[step.row]
            members = [atom for atom in range(atoms.count) if mask >> atom & 1]
            cut.append((members, tuple(range(first, first + step.replicas))))
        whole = cut if all(atoms.bound) else settle(self.problem, cut)
        placed = self.problem.pinned.on_pinned_devices(whole, self.problem.cluster.num_devices)
        found = stages_of(self.problem, placed)
        return None if shortfall(self.problem, found) else found
