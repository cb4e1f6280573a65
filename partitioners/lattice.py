"""The ideals of the atoms' order as rows of arrays, and what the stage between two of them costs.

A partition is a chain of ideals (sets closed under predecessors); the stage between the ideals I and
J holds the atoms J - I. Rows come in the order of their work, so that a subset stands before its
supersets. Nothing here searches: `pipeflow.partitioners.ideals` does.

A net with c ends in an ideal is open while 0 < c < all. Between I and J, with w its seconds,

    received   open in I, some reader in J - I:   open(I) - sum over nets open in J of w * [c_I = c_J]
    sent       producer in J - I, open in J:      sum over nets open in J of w * [c_I = 0]

so that one J is compared with many I by looking only at the few nets open in J. A net that several
stages read is counted once; what unbound atoms add is counted at least (`pipeflow.partitioners.unbound`),
their memory is left out: all that can only lower the costs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from pipeflow.partitioners.atoms import Floats, Ints, Net
from pipeflow.partitioners.feasibility import memory_limits
from pipeflow.partitioners.objective import compute_seconds, reduction_volume
from pipeflow.partitioners.problem import InFlight, PartitionProblem, Position
from pipeflow.partitioners.unbound import UnboundGroup, unbound_groups


def enumerate_ideals(problem: PartitionProblem, most: int, among: Collection[int] | None = None) -> list[int] | None:
    """All ideals of the bound atoms as bit masks, or None if there are more than `most`.

    Args:
        among: these atoms alone, as if there were no others.
    """
    atoms = problem.atoms
    bound = [atom for atom in range(atoms.count) if atoms.bound[atom] and (among is None or atom in among)]
    inside = sum(1 << atom for atom in bound)
    needs = {atom: sum(1 << b for b in atoms.predecessors[atom]) & inside for atom in bound}
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
                freed = [b for b in atoms.successors[atom] if b in needs and needs[b] & ~larger == 0]
                ready[larger] = (ready[ideal] - {atom}).union(freed)
                following.append(larger)
            ready[ideal] = frozenset()
        if len(ready) > most:
            return None
        frontier = following
    return sorted(ready)


@dataclass(frozen=True)
class Lattice:
    """The ideals of a problem with devices and links alike."""

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
    def _words(self) -> NDArray[np.uint64]:
        width = (self.problem.atoms.count + 63) // 64 * 8
        raw = b"".join(m.to_bytes(width, "little") for m in self.sorted_masks)
        return np.frombuffer(raw, dtype=np.uint64).reshape(len(self.masks), -1)

    def subsets(self, row: int, low: int, high: int) -> Ints:
        """Rows of low .. high - 1 before `row` whose ideals are subsets of the row's."""
        some = np.arange(low, min(row, high))
        for word, own in enumerate(self._words[row]):
            some = some[(self._words[some, word] & ~own) == 0]
        return some

    def allowed(self, some: Ints, row: int) -> Ints:
        """Of the ideals `some`, those from which a stage may lead to that of `row`, by the pins."""
        pinned, own = self.problem.pinned, self.members[row]
        if pinned.max_layers is not None:
            some = some[self._sizes[row] - self._sizes[some] <= pinned.max_layers]
        for a, b in pinned.apart:
            if own[a] and own[b]:
                some = some[(self.members[some, a] == 1) | (self.members[some, b] == 1)]
        return some

    @cached_property
    def _sizes(self) -> Floats:
        """Layers of each ideal."""
        return self._sums(self.problem.pinned.sizes)

    @cached_property
    def seconds(self) -> Floats:
        """Of every atom, rounded down so far that sums are exact: no superset has less work than its subset."""
        atoms, device = self.problem.atoms, self.problem.cluster.devices[0]
        seconds = [compute_seconds(g, device) if b else 0.0 for g, b in zip(atoms.layers, atoms.bound, strict=True)]
        unit = math.ldexp(1.0, math.frexp(math.fsum(seconds))[1] - 52)
        return np.floor(np.array(seconds) / unit) * unit

    def _sums(self, amounts: NDArray[np.generic]) -> Floats:
        """Of every ideal, the sum over its atoms."""
        bound = np.array(self.problem.atoms.bound, dtype=np.float64)
        total: Floats = self.members.astype(np.float64) @ (amounts.astype(np.float64) * bound)
        return total

    @cached_property
    def work(self) -> Floats:
        return self._sums(self.seconds)

    @cached_property
    def parameters(self) -> Floats:
        return self._sums(self.problem.atoms.parameter_bytes)

    @cached_property
    def saved(self) -> Floats:
        return self._sums(self.problem.atoms.saved_bytes)

    @cached_property
    def stuck(self) -> Floats:
        return self._sums(~self.problem.atoms.replicable)

    @cached_property
    def _nets(self) -> tuple[list[tuple[int, ...]], Floats, Floats]:
        """Ends, seconds and bytes to hold of each net; nets of the same ends are one."""
        bandwidth, latency = self.problem.transfer_link
        atoms = self.problem.atoms
        counted = frozenset[Net]().union(*(group.counted for group, _ in self._groups))
        sums: dict[tuple[int, ...], tuple[float, float]] = {}
        for net in atoms.nets:
            ends = tuple(sorted(end for end in net.ends if atoms.bound[end]))
            if len(ends) > 1 and net not in counted:
                seconds, held = sums.get(ends, (0.0, 0.0))
                sums[ends] = (
                    seconds + latency + net.bytes / bandwidth,
                    held + net.bytes * net.is_activation,
                )
        amounts = np.array(list(sums.values())).reshape(-1, 2)
        return list(sums), amounts[:, 0], amounts[:, 1]

    @cached_property
    def _groups(self) -> list[tuple[UnboundGroup, list[Ints]]]:
        """What unbound atoms cost, and for each net of a group how many of its ends are in each ideal."""
        members = self.members
        return [
            (group, [members[:, list(ends)].sum(axis=1).astype(np.int64) for ends in group.nets])
            for group in unbound_groups(self.problem)
        ]

    @property
    def most_unbound(self) -> float:
        """The most seconds that `unbound` can give."""
        return math.fsum(float(group.table.max()) for group, _ in self._groups)

    def unbound(self, some: Ints, row: int) -> Floats:
        """Seconds that the stages from the ideals `some` to that of `row` spend on unbound atoms, at least."""
        total = np.zeros(len(some))
        for group, counts in self._groups:
            total += group.seconds([count[row] - count[some] for count in counts])
        return total

    @cached_property
    def _counts(self) -> NDArray[np.uint16]:
        """Ends of each net in each ideal, of shape (nets, ideals)."""
        ends = self._nets[0]
        incidence = np.zeros((len(ends), self.problem.atoms.count), np.float32)
        for index, group in enumerate(ends):
            incidence[index, list(group)] = 1
        return (incidence @ self.members.T).astype(np.uint16)

    @cached_property
    def _is_open(self) -> NDArray[np.bool_]:
        sizes = np.array([len(group) for group in self._nets[0]], np.uint16)[:, None]
        return (self._counts > 0) & (self._counts < sizes)

    @cached_property
    def passing(self) -> Floats:
        """Seconds of all that passes the cut behind each ideal."""
        return self._open(self._nets[1])

    @cached_property
    def _passing_bytes(self) -> Floats:
        return self._open(self._nets[2])

    def _open(self, amounts: Floats) -> Floats:
        total: Floats = amounts @ self._is_open if len(amounts) else np.zeros(len(self.masks))
        return total

    @cached_property
    def _open_nets(self) -> list[Ints]:
        nets, rows = np.nonzero(self._is_open)
        order = np.argsort(rows, kind="stable")
        starts = np.searchsorted(rows[order], np.arange(len(self.masks) + 1))
        return [nets[order[a:b]] for a, b in itertools.pairwise(starts)]

    def transfers(self, some: Ints, row: int) -> tuple[Floats, Floats]:
        """Seconds of what enters and of what leaves the stages from the ideals `some` to that of `row`."""
        if self.problem.transfers == "relayed":
            first = some == 0
            return np.where(first, 0.0, self.passing[some]), np.where(first, 0.0, self.passing[row])
        inward, outward = self.passing[some].copy(), np.zeros(len(some))
        weights = self._nets[1]
        for net in self._open_nets[row]:
            counts = self._counts[net, some]
            outward += weights[net] * (counts == 0)
            inward -= weights[net] * (counts == self._counts[net, row])
        return np.maximum(inward, 0.0), outward

    def received_bytes(self, some: Ints, row: int) -> Floats:
        """Bytes of one micro-batch that the same stages receive and hold."""
        received = self._passing_bytes[some].copy()
        if not self.problem.holds_received:
            return np.zeros(len(some))
        held = self._nets[2]
        for net in self._open_nets[row]:
            received -= held[net] * (self._counts[net, some] == self._counts[net, row])
        return received


@dataclass(frozen=True)
class StageCosts:
    """Seconds and memory of stages by their number of replicas, on devices alike.

    Attributes:
        memory_share: of the devices' memory, what stages may fill.
    """

    problem: PartitionProblem
    memory_share: float = 1.0

    @cached_property
    def limit(self) -> float:
        return memory_limits(self.problem)[0] * self.memory_share

    @cached_property
    def shares(self) -> Floats:
        """Share of the micro-batches of the busiest of r replicas, at index r."""
        problem = self.problem
        return np.array([math.inf, *(problem.share(r) for r in range(1, problem.replica_limit + 1))])

    @cached_property
    def _reductions(self) -> list[tuple[float, float]]:
        """Seconds per byte of parameters, and seconds for any, of reductions among r replicas, at index r."""
        problem, cluster = self.problem, self.problem.cluster
        bandwidth, latency = cluster.link(0, 1) if cluster.num_devices > 1 else (math.inf, 0.0)
        result = [(0.0, 0.0)]
        for r in range(1, problem.replica_limit + 1):
            volume, latencies = reduction_volume(r, problem.reduction)
            times = problem.reductions(r)
            result.append((times * volume / bandwidth, times * latencies * latency))
        return result

    def seconds(self, replicas: int, compute: Floats, parameters: Floats, inward: Floats, outward: Floats) -> Floats:
        """Of stages on `replicas` devices; as the objective counts them."""
        share, (each, once) = self.shares[replicas], self._reductions[replicas]
        reduced = each * parameters + once * (parameters > 0)
        if self.problem.transfers == "relayed":
            result: Floats = np.maximum(share * compute + reduced, share * np.maximum(inward, outward))
        elif self.problem.transfers == "overlapped":
            result = share * np.maximum(compute, inward + outward) + reduced
        else:
            result = share * (compute + (inward + outward)) + reduced
        return result

    def held(self, replicas: int, from_here: int, parameters: Floats, each: Floats) -> Floats:
        """Bytes of a replica, at least: what is not monotone in the replicas from here on counts at its least."""
        problem = self.problem
        state: Floats = np.ceil(problem.gradient_ratio * parameters) + np.ceil(problem.optimizer_ratio * parameters)
        held = state + self._versions[replicas, from_here] * parameters
        total: Floats = held + self._in_flight[replicas, from_here] * each
        return total

    @cached_property
    def _in_flight(self) -> Floats:
        return self._least_by_position(self.problem.in_flight)

    @cached_property
    def _versions(self) -> Floats:
        return self._least_by_position(self.problem.weight_versions)

    def _least_by_position(self, amount: InFlight) -> Floats:
        """By r and d, the least amount of any position with r replicas and at least d from there on."""
        problem = self.problem
        most = problem.device_limit
        table = np.zeros((problem.replica_limit + 1, most + 1))
        for r in range(1, min(problem.replica_limit, most) + 1):
            values = [amount(Position(r, d, problem.num_microbatches)) for d in range(r, most + 1)]
            table[r, r:] = np.minimum.accumulate(values[::-1])[::-1]
        return table
