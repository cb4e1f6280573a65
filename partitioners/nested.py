"""The best cut where levels of links are planned one inside the other: PipeDream's recurrence.

    inside[I][J]   the least seconds of the layers between the ideals I and J within one group
    best[m][I][J]  the same on at most m groups of a level
                   = min over K between I and J and r <= m of max(best[m - r][I][K], stage(K, J, r))

(Narayanan et al., SOSP 2019, section 3.1, with the costs of `pipeflow.partitioners.nesting`); best on
all groups of a level is inside of the next. It is exact over the ideals it is given: all of a graph
that has few, otherwise those that its widest source leads through, and the prefixes of some orders.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from pipeflow.errors import PlanError
from pipeflow.partitioners import ideals
from pipeflow.partitioners.atoms import Floats
from pipeflow.partitioners.bounds import work_bound
from pipeflow.partitioners.certify import certified, stages_of
from pipeflow.partitioners.cluster import Cluster
from pipeflow.partitioners.feasibility import require_feasible
from pipeflow.partitioners.ideal_sets import ideals_near, sets_of_ideals
from pipeflow.partitioners.lattice import Lattice
from pipeflow.partitioners.nesting import NestedLevel, nested_levels
from pipeflow.partitioners.objective import compute_seconds, reduction_volume
from pipeflow.partitioners.orders import best_of_orders
from pipeflow.partitioners.partition import Partition
from pipeflow.partitioners.problem import PartitionProblem

_MOST_IDEALS = 400
"""With more, only some are taken."""

_ROUNDS = 12
"""Times that the ideals near the best partition known are looked at."""

_WORK = 4e9
"""Steps of the recurrence that are worth their time, over all sets of ideals that are tried."""

_MANY = 2**50
"""So many micro-batches that R replicas share them evenly, but for a part of R / 2**50."""

_EXACT = 1 - 1e-12


def nested(problem: PartitionProblem) -> Partition:
    """The best nested partition over the ideals that are looked at; proven best if those are all.

    Raises:
        PlanError: levels are not nested in the problem.
    """
    if not problem.nested:
        raise PlanError("nested plans levels one inside the other; set nested=True, or use another partitioner")
    require_feasible(problem, nests=True)
    combinations = sum(level.num_groups**2 / 2 for level in nested_levels(problem.cluster))
    sets = list(sets_of_ideals(problem, _MOST_IDEALS, int(_WORK / combinations)))
    best = min((_Programme(problem, masks) for masks, _ in sets), key=lambda programme: programme.seconds)
    bound = best.seconds * _EXACT if sets[0].is_all else _bound(problem)
    for _ in range(_ROUNDS):
        if best.seconds * _EXACT <= bound:
            break
        nearer = _Programme(problem, ideals_near(problem, best.cuts(), _MOST_IDEALS))
        if nearer.seconds >= best.seconds * _EXACT:
            break
        best = nearer
    return certified(problem, stages_of(problem, best.cut()), partitioner="nested", lower_bound=bound)


def _bound(problem: PartitionProblem) -> float:
    """What no nested cut can beat: the best flat one, nothing moved, over links as fast as any level's.

    A stage on q of r groups' devices each reduces at least what q * r replicas do over one such link:
    with more than one level at work, each adds more than a reduction over one link can cost. Shares of
    several levels multiply, each rounded up by itself: of 2 micro-batches 4 replicas may run a quarter each.
    So replicas share evenly here if there are several levels.
    """
    bound = max(work_bound(problem), _atom_bound(problem))
    fastest = max(level.bandwidth * level.num_inside for level in nested_levels(problem.cluster))
    links = Cluster.uniform(
        problem.cluster.num_devices, problem.cluster.devices[0], bandwidth=None if fastest == math.inf else fastest
    )
    relaxed = replace(problem, nested=False, cluster=links, transfers="free")
    if len(nested_levels(problem.cluster)) > 1:
        relaxed = replace(relaxed, num_microbatches=_MANY)
    found = ideals.improve(relaxed, best_of_orders(relaxed, rounds=4), bound)
    return bound if found is None else max(bound, found[1] * (1 - problem.cluster.num_devices / _MANY))


def _atom_bound(problem: PartitionProblem) -> float:
    """The costliest atom alone, at the numbers of replicas that suit it best."""
    result = 0.0
    for group in problem.atoms.layers:
        seconds = compute_seconds(group, problem.cluster.devices[0])
        amount = sum(layer.parameter_bytes for layer in group)
        for level in nested_levels(problem.cluster):
            most = level.num_groups if all(layer.replicable for layer in group) and problem.max_replicas != 1 else 1
            seconds = min(
                problem.share(r) * (seconds + _reduction(problem, level, r, amount) / level.num_inside)
                for r in range(1, most + 1)
            )
        result = max(result, seconds)
    return result * _EXACT


def _reduction(problem: PartitionProblem, level: NestedLevel, replicas: int, amount: float) -> float:
    volume, latencies = reduction_volume(replicas, problem.reduction)
    return volume * amount / level.bandwidth + latencies * level.latency * (amount > 0)


@dataclass(frozen=True)
class _Programme:
    """The recurrence over some ideals, the empty and the whole one among them, given as bit masks."""

    problem: PartitionProblem
    masks: list[int]

    @cached_property
    def lattice(self) -> Lattice:
        flat = replace(self.problem, nested=False)
        return Lattice(flat, self.masks)

    @cached_property
    def levels(self) -> tuple[NestedLevel, ...]:
        return nested_levels(self.problem.cluster)

    @property
    def size(self) -> int:
        return len(self.masks)

    @cached_property
    def is_within(self) -> NDArray[np.bool_]:
        """Whether ideal I is a proper subset of J, by [I, J]."""
        members = self.lattice.members
        outside = members @ (1 - members).T  # atoms of I that are not in J
        sizes = members.sum(axis=1)
        within: NDArray[np.bool_] = (outside == 0) & (sizes[:, None] < sizes)
        return within

    @cached_property
    def passing(self) -> tuple[Floats, Floats]:
        """Messages that pass the cut behind each ideal, and their bytes."""
        inside = self.lattice.members > 0
        count, amount = np.zeros((2, self.size))
        for net in self.problem.atoms.nets:
            ends = inside[:, list(net.ends)]
            is_open = ends.any(axis=1) & ~ends.all(axis=1)
            count += is_open
            amount += is_open * float(net.bytes)
        return count, amount

    @cached_property
    def _tables(self) -> list[tuple[Floats, list[Floats]]]:
        """Of each level, what is inside its stages, and the best on at most m groups, at index m - 1."""
        work = self.lattice.work
        inside = np.where(self.is_within, np.maximum(work - work[:, None], 0.0), np.inf)
        result = []
        for depth, level in enumerate(self.levels):
            first = slice(0, 1) if depth == len(self.levels) - 1 else slice(None)
            table = self._advance(level, inside, first)
            result.append((inside, table))
            inside = table[-1]
        return result

    def _advance(self, level: NestedLevel, inside: Floats, first: slice) -> list[Floats]:
        """The recurrence of one level; `first` are the ideals that its chains may begin with."""
        best: list[Floats] = []
        later = [self._stage(level, inside, r) for r in range(1, level.num_groups + 1)]
        for m in range(1, level.num_groups + 1):
            table = self._stage(level, inside, m, is_first=True)[first]
            if best:
                table = np.minimum(table, best[-1])
            for end in range(self.size) if m > 1 else ():
                between = np.flatnonzero(self.is_within[:, end])
                for r in range(1, m):
                    values = np.maximum(best[m - r - 1][:, between], later[r - 1][between, end])
                    if values.size:
                        table[:, end] = np.minimum(table[:, end], values.min(axis=1))
            best.append(table)
        return best

    def _stage(self, level: NestedLevel, inside: Floats, replicas: int, *, is_first: bool = False) -> Floats:
        """Seconds of one stage of a level between the ideals [I, J]; inf where it cannot be."""
        problem, lattice = self.problem, self.lattice
        parameters = lattice.parameters - lattice.parameters[:, None]
        volume, latencies = reduction_volume(replicas, problem.reduction)
        reduction = volume * parameters / level.bandwidth + latencies * level.latency * (parameters > 0)
        seconds = inside + (reduction / level.num_inside if is_first else reduction)
        if problem.transfers == "relayed" and not is_first:
            count, amount = self.passing
            moved = count * level.latency + amount / level.bandwidth
            seconds = np.maximum(seconds, np.maximum(moved[:, None], moved))
        seconds = problem.share(replicas) * seconds
        if replicas > 1:
            if problem.max_replicas == 1:
                return np.full_like(seconds, np.inf)
            seconds[lattice.stuck - lattice.stuck[:, None] > 0] = np.inf
        return seconds

    @cached_property
    def seconds(self) -> float:
        """The objective of the best nested cut."""
        return float(self._tables[-1][1][-1][0, -1])

    def cuts(self) -> list[int]:
        """The ideals between which the stages of the best are."""
        rows = {row for start, end, _ in self._trace(len(self.levels) - 1, 0, self.size - 1) for row in (start, end)}
        return [self.lattice.sorted_masks[row] for row in sorted(rows)]

    def cut(self) -> list[tuple[list[int], tuple[int, ...]]]:
        """(atoms, devices) of each stage of the best."""
        masks = self.lattice.sorted_masks
        result = []
        for start, end, devices in self._trace(len(self.levels) - 1, 0, self.size - 1):
            mask = masks[end] & ~masks[start]
            result.append(([atom for atom in range(self.problem.atoms.count) if mask >> atom & 1], devices))
        return result

    def _trace(self, depth: int, start: int, end: int) -> list[tuple[int, int, tuple[int, ...]]]:
        """(from ideal, to ideal, devices within a group of the next level) of every innermost stage."""
        if depth < 0:
            return [(start, end, (0,))]
        size, first, result = self.levels[depth].group_size, 0, []
        for begin, until, replicas in self._chain(depth, start, end):
            for a, b, inner in self._trace(depth - 1, begin, until):
                result.append((a, b, tuple(g * size + d for g in range(first, first + replicas) for d in inner)))
            first += replicas
        return result

    def _chain(self, depth: int, start: int, end: int) -> list[tuple[int, int, int]]:
        """(from ideal, to ideal, groups) of the stages of one level between two ideals."""
        level, (inside, best) = self.levels[depth], self._tables[depth]
        row, m = (start if len(best[0]) > 1 else 0), level.num_groups
        result: list[tuple[int, int, int]] = []
        while True:
            target = best[m - 1][row, end]
            assert target < math.inf, "traced a chain that does not exist"
            while m > 1 and best[m - 2][row, end] <= target:
                m -= 1
            if self._stage(level, inside, m, is_first=True)[start, end] <= target:
                return [(start, end, m), *reversed(result)]
            between = np.flatnonzero(self.is_within[:, end])
            for r in range(1, m):
                values = np.maximum(best[m - r - 1][row, between], self._stage(level, inside, r)[between, end])
                if (values <= target).any():
                    k = int(between[np.argmax(values <= target)])
                    result.append((k, end, r))
                    end, m = k, m - r
                    break
