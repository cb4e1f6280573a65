"""The exact dynamic programme over ideals: every contiguous cut at once, pruned by a threshold.

A partition is a chain of ideals of the atoms' order (sets closed under predecessors). For a
threshold U the programme finds for every ideal I the least number of stages, each of at most U
seconds, that make it up (Tarnawski et al., NeurIPS 2020, section 4, turned from a table over
(ideal, devices) into one number for each ideal: memory is linear in the ideals):

    stages(J) = 1 + min over I subset of J with load(J - I) <= U of stages(I)

Ideals whose remaining work does not fit the remaining stages at U are skipped. U starts just under
the best partition known; where it cannot be reached, U is a proven bound.

A net with c ends in an ideal is open while 0 < c < all. Then load(J - I) is compute plus

    open(J) - sum over nets open in I of w * open_J + sum over nets open in I of w * [c_J > c_I],

so that a step looks only at the few nets open in I. A net that several stages read is counted
once, and unbound atoms are left out: both can only lower the loads, so bounds stay bounds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from pipeflow.errors import PlanError
from pipeflow.partitioners.atoms import Floats, Ints
from pipeflow.partitioners.bounds import cut_bound, lower_bound
from pipeflow.partitioners.certify import certified, stages_of
from pipeflow.partitioners.chain import closest
from pipeflow.partitioners.feasibility import memory_limits, no_cut_fits, require_feasible, shortfall
from pipeflow.partitioners.normalise import fold
from pipeflow.partitioners.objective import compute_seconds, objective
from pipeflow.partitioners.orders import best_of_orders
from pipeflow.partitioners.partition import Partition, Stage
from pipeflow.partitioners.problem import PartitionProblem, Position

MOST_IDEALS = 60_000
_STRICTLY = 1 - 1e-9
_UNREACHED = 255


def supports(problem: PartitionProblem) -> str | None:
    """Why the programme cannot express the problem, or None if it can."""
    if problem.replica_limit > 1:
        return "more than one replica a stage is allowed; set max_replicas=1"
    if problem.chunks > 1:
        return "a device may hold several stages; set chunks=1"
    if not problem.cluster.is_uniform:
        return "devices or links differ"
    if problem.stage_count is not None:
        return "a number of stages is asked for; set max_stages"
    if problem.pinned.stages:
        return "layers are pinned to stages; pin them to devices, or together and apart"
    return None


def ideals(problem: PartitionProblem) -> Partition:
    """The best contiguous partition, with its proof, where the graph has few enough ideals.

    Starts from the best of many orders. Exact but for what the head of the module leaves out;
    the lower bound is proven in any case.

    Raises:
        PlanError: replicas, unlike devices, an exact number of stages, layers pinned to stages, or
            more than 60,000 ideals.
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
        raise no_cut_fits(problem, closest(problem, bound), "cut")
    return certified(problem, stages, partitioner="ideals", lower_bound=proved)


def improve(
    problem: PartitionProblem, start: Sequence[Stage] | None, bound: float, *, most_ideals: int = MOST_IDEALS
) -> tuple[tuple[Stage, ...] | None, float] | None:
    """A partition at least as good as `start` and a proven bound; None if there are too many ideals."""
    lattice = enumerate_ideals(problem, most_ideals)
    if lattice is None:
        return None
    table = _Table(problem, lattice)
    best = tuple(start) if start else None
    reach = objective(problem, best) if best else math.fsum(table.seconds) + table.open_seconds.max() + 1.0
    while reach * _STRICTLY > bound:
        chain = table.chain(reach * _STRICTLY)
        if chain is None:
            return best, max(bound, reach * _STRICTLY)
        found = table.stages(chain)
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


def enumerate_ideals(problem: PartitionProblem, most: int) -> list[int] | None:
    """All ideals of the bound atoms as bit masks, or None if there are more than `most`."""
    atoms = problem.atoms
    bound = [atom for atom in range(atoms.count) if atoms.bound[atom]]
    needs = {atom: sum(1 << b for b in atoms.predecessors[atom]) for atom in bound}
    first = frozenset(atom for atom in bound if not needs[atom])
    ready: dict[int, frozenset[int]] = {0: first}
    frontier = [0]
    while frontier:
        following = []
        for ideal in frontier:
            for atom in ready[ideal]:
                larger = ideal | 1 << atom
                if larger in ready:
                    continue
                freed = [b for b in atoms.successors[atom] if needs[b] & ~larger == 0]
                ready[larger] = (ready[ideal] - {atom}).union(freed)
                following.append(larger)
            ready[ideal] = frozenset()
        if len(ready) > most:
            return None
        frontier = following
    return sorted(ready)


@dataclass(frozen=True)
class _Table:
    """Ideals as rows of arrays, in the order of their work; a subset stands before its supersets."""

    problem: PartitionProblem
    masks: list[int]

    @cached_property
    def _order(self) -> NDArray[np.int64]:
        members = self._members(self.masks)
        return np.lexsort((members.sum(axis=1), members @ self.seconds))

    def _members(self, masks: Sequence[int]) -> NDArray[np.float32]:
        width = (self.problem.atoms.count + 7) // 8
        raw = np.frombuffer(b"".join(m.to_bytes(width, "little") for m in masks), dtype=np.uint8)
        bits = np.unpackbits(raw.reshape(len(masks), width), axis=1, bitorder="little")
        return bits[:, : self.problem.atoms.count].astype(np.float32)

    @cached_property
    def sorted_masks(self) -> list[int]:
        return [self.masks[i] for i in self._order]

    @cached_property
    def members(self) -> NDArray[np.float32]:
        return self._members(self.sorted_masks)

    @cached_property
    def words(self) -> NDArray[np.uint64]:
        width = (self.problem.atoms.count + 63) // 64 * 8
        raw = b"".join(m.to_bytes(width, "little") for m in self.sorted_masks)
        return np.frombuffer(raw, dtype=np.uint64).reshape(len(self.masks), -1)

    @cached_property
    def seconds(self) -> Floats:
        atoms, device = self.problem.atoms, self.problem.cluster.devices[0]
        return np.array(
            [compute_seconds(g, device) if b else 0.0 for g, b in zip(atoms.layers, atoms.bound, strict=True)]
        )

    @cached_property
    def work(self) -> Floats:
        return self.members.astype(np.float64) @ self.seconds

    @cached_property
    def sizes(self) -> Floats:
        """Layers of an ideal."""
        count: Floats = self.members.astype(np.float64) @ (
            self.problem.pinned.sizes * np.array(self.problem.atoms.bound)
        )
        return count

    @cached_property
    def bytes(self) -> Floats:
        """What the atoms of an ideal hold at least, on one device."""
        problem, atoms = self.problem, self.problem.atoms
        ratio = 1 + problem.gradient_ratio + problem.optimizer_ratio
        least = problem.in_flight(Position(1, 1, problem.num_microbatches))
        each = (ratio * atoms.parameter_bytes + least * atoms.saved_bytes) * np.array(atoms.bound)
        total: Floats = self.members.astype(np.float64) @ each
        return total

    @cached_property
    def _nets(self) -> tuple[list[tuple[int, ...]], Floats]:
        cluster, atoms = self.problem.cluster, self.problem.atoms
        bandwidth, latency = cluster.link(0, 1) if cluster.num_devices > 1 else (math.inf, 0.0)
        weights: dict[tuple[int, ...], float] = {}
        for net in atoms.nets:
            ends = tuple(sorted(end for end in net.ends if atoms.bound[end]))
            if len(ends) > 1:
                weights[ends] = weights.get(ends, 0.0) + latency + net.bytes / bandwidth
        return list(weights), np.array(list(weights.values()))

    @cached_property
    def counts(self) -> NDArray[np.uint16]:
        """Ends of each net in each ideal, of shape (nets, ideals)."""
        ends, _ = self._nets
        incidence = np.zeros((len(ends), self.problem.atoms.count), np.float32)
        for index, group in enumerate(ends):
            incidence[index, list(group)] = 1
        return (incidence @ self.members.T).astype(np.uint16)

    @cached_property
    def is_open(self) -> NDArray[np.bool_]:
        sizes = np.array([len(group) for group in self._nets[0]], np.uint16)[:, None]
        return (self.counts > 0) & (self.counts < sizes)

    @cached_property
    def open_seconds(self) -> Floats:
        total: Floats = self._nets[1] @ self.is_open
        return total if len(self._nets[0]) else np.zeros(len(self.masks))

    @cached_property
    def open_nets(self) -> list[Ints]:
        nets, rows = np.nonzero(self.is_open)
        order = np.argsort(rows, kind="stable")
        starts = np.searchsorted(rows[order], np.arange(len(self.masks) + 1))
        return [nets[order[a:b]] for a, b in itertools.pairwise(starts)]

    def chain(self, upper: float) -> list[int] | None:
        """Rows of a chain of ideals whose stages all keep to `upper`, or None if there is none."""
        most, work, total = self.problem.stage_limit, self.work, self.work[-1]
        limit = memory_limits(self.problem)[0]
        weights, slack = self._nets[1], upper * (1 + 1e-13)
        stages = np.full(len(work), _UNREACHED, np.uint8)
        parent = np.zeros(len(work), np.int64)
        stages[0] = 0
        overlap = self.problem.overlap
        for row in range(len(work) - 1):
            k = int(stages[row]) + 1
            if k > most or total - work[row] > (most - k + 1) * slack * (1 + 1e-12):
                continue
            low = max(row + 1, int(np.searchsorted(work, total - (most - k) * slack * (1 + 1e-12))))
            high = int(np.searchsorted(work, work[row] + slack, side="right"))
            if low >= high:
                continue
            some = low + np.flatnonzero(stages[low:high] > k)
            own = self.words[row]
            for word in np.flatnonzero(own):
                some = some[(self.words[some, word] & own[word]) == own[word]]
            if limit != math.inf:
                some = some[self.bytes[some] - self.bytes[row] <= limit * (1 + 1e-12)]
            some = self._allowed(some, row)
            if not len(some):
                continue
            moved = self.open_seconds[some].copy()
            for net in self.open_nets[row]:
                counts = self.counts[net, some] > self.counts[net, row]
                moved += weights[net] * (counts.astype(np.float64) - self.is_open[net, some])
            compute = work[some] - work[row]
            loads = np.maximum(compute, moved) if overlap else compute + moved
            some = some[loads <= slack]
            stages[some] = k
            parent[some] = row
            if stages[-1] <= most:
                break
        if stages[-1] > most:
            return None
        rows = [len(work) - 1]
        while rows[-1]:
            rows.append(int(parent[rows[-1]]))
        return rows[::-1]

    def _allowed(self, some: Ints, row: int) -> Ints:
        """Of the larger ideals `some`, those that a stage may lead to from the ideal `row`, by the pins."""
        pinned, own = self.problem.pinned, self.members[row]
        if pinned.max_layers is not None:
            some = some[self.sizes[some] - self.sizes[row] <= pinned.max_layers]
        for a, b in pinned.apart:
            if not own[a] and not own[b]:
                some = some[(self.members[some, a] == 0) | (self.members[some, b] == 0)]
        return some

    def stages(self, chain: Sequence[int]) -> tuple[Stage, ...] | None:
        """The stages of a chain of rows; None if it leaves atoms out or breaks memory limits."""
        atoms = self.problem.atoms
        if not all(atoms.bound):
            return None
        cut = []
        for device, (a, b) in enumerate(itertools.pairwise(chain)):
            mask = self.sorted_masks[b] & ~self.sorted_masks[a]
            cut.append(([atom for atom in range(atoms.count) if mask >> atom & 1], (device,)))
        placed = self.problem.pinned.on_pinned_devices(cut, self.problem.cluster.num_devices)
        found = stages_of(self.problem, placed)
        return None if shortfall(self.problem, found) else found
