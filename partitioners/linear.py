"""The exact dynamic programme over one order of atoms: PipeDream's and DAPPLE's recurrence.

    best[d][i] = least bottleneck of the atoms i .. n-1 on exactly d devices
               = min over j > i and r <= d of max(stage(i, j, r, d), best[d - r][j])

(Narayanan et al., SOSP 2019, section 3.1; Fan et al., PPoPP 2021, section 4). It runs from the
last stage to the first, because what a stage must hold depends on the replicas from it on.
Departures: memory limits by position, any number of micro-batches, tensors that skip stages, and
a bound U that prunes: no run longer than U is a stage, and fewer than work / U devices never do.
Pins narrow the runs; where they count stages from the first, each number of stages is tried in turn.

Devices are taken in order: the first stage gets the first ones. Where they differ, the state also
fixes which devices a stage gets, and the number in use is tried in turn. Where links differ, a
transfer is taken to come from the device before and to go to the device after the stage's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeflow.partitioners.atoms import Floats, Ints
from pipeflow.partitioners.feasibility import memory_limits
from pipeflow.partitioners.objective import compute_seconds, reduction_volume
from pipeflow.partitioners.pinned_runs import PinnedRuns
from pipeflow.partitioners.problem import InFlight, PartitionProblem, Position
from pipeflow.partitioners.segments import Row, Segments

_TIE = 1 + 1e-12
"""Sums in another order differ by rounding; values this close count as equal."""

_MOST_COUNTS = 16
"""Among more unlike devices than this, only a few numbers of devices in use are tried."""


@dataclass(frozen=True, slots=True)
class LinearCut:
    """The best cut of an order.

    Attributes:
        seconds: its bottleneck as the recurrence counts it.
        stages: (atoms, devices) of each stage.
    """

    seconds: float
    stages: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]


def cut_order(
    problem: PartitionProblem,
    order: Sequence[int],
    *,
    bound: float,
    upper: float = math.inf,
    readers: Literal["once", "each"] = "once",
    memory_factor: float = 1.0,
) -> LinearCut | None:
    """The best cut of one order of the problem's atoms, or None if no cut is feasible.

    Args:
        bound: a lower bound of the bottleneck, to prune with.
        upper: cuts above this are not wanted.
        readers: how a tensor with several readers is counted; see `Segments`.
        memory_factor: multiplies every memory limit.
    """
    counts: Sequence[int | None] = (problem.stage_count,)
    if problem.stage_count is None and problem.pinned.counts_from_start:
        counts = range(1, problem.stage_limit + 1)
    best = None
    for count in counts:
        program = _Program(problem, tuple(order), readers, memory_factor, count)
        uppers = [bound * f for f in (1.02, 1.1, 1.5, 2.5, 5, 12) if bound > 0] if program.size > 20_000 else []
        for limit in (*(u for u in uppers if u < upper), upper):
            found = program.solve(limit)
            if found is not None and (best is None or found.seconds * _TIE < best.seconds):
                best, upper = found, min(upper, found.seconds)
            if found is not None:
                break
    return best


@dataclass(frozen=True)
class _Program:
    problem: PartitionProblem
    order: tuple[int, ...]
    readers: Literal["once", "each"]
    memory_factor: float
    num_stages: int | None
    """Exactly so many; None leaves it open."""

    @cached_property
    def pinned(self) -> PinnedRuns | None:
        pinned = self.problem.pinned
        return None if pinned.is_free else PinnedRuns(pinned, self.order, self.num_stages)

    @cached_property
    def segments(self) -> Segments:
        return Segments(self.problem.atoms, self.order, self.models[0], self.readers)

    @property
    def size(self) -> int:
        return len(self.order) * self.problem.device_limit

    @cached_property
    def alike(self) -> bool:
        return self.problem.cluster.is_uniform

    @cached_property
    def models(self) -> tuple[Floats, Ints]:
        """Seconds of every atom on every distinct device model, and the model of each device."""
        devices = [self.problem.cluster.devices[0]] if self.alike else self.problem.cluster.devices
        keys = [(d.speed, tuple(sorted(d.speed_by_kind.items()))) for d in devices]
        distinct = list(dict.fromkeys(keys))
        seconds = np.array(
            [[compute_seconds(group, devices[keys.index(k)]) for group in self.problem.atoms.layers] for k in distinct]
        )
        return seconds, np.array([distinct.index(k) for k in keys])

    @cached_property
    def limits(self) -> Floats:
        limits = np.array(memory_limits(self.problem)) * self.memory_factor
        return limits[:1] if self.alike else limits

    @cached_property
    def shares(self) -> Floats:
        """Share of the micro-batches of the busiest of r replicas, at index r - 1."""
        return np.array([self.problem.share(r) for r in range(1, self.problem.replica_limit + 1)])

    @cached_property
    def reductions(self) -> Floats:
        return np.array([self.problem.reductions(r) for r in range(1, self.problem.replica_limit + 1)])

    @cached_property
    def volumes(self) -> Floats:
        """What a reduction moves for each byte, and its latencies, of shape (2, r - 1)."""
        counts = range(1, self.problem.replica_limit + 1)
        return np.array([reduction_volume(r, self.problem.reduction) for r in counts], dtype=np.float64).T

    @cached_property
    def in_flight(self) -> Floats:
        """Micro-batches in flight, of shape (r - 1, d); used for r <= d."""
        return self._by_position(self.problem.in_flight)

    @cached_property
    def versions(self) -> Floats:
        """Copies of the parameters, of shape (r - 1, d); used for r <= d."""
        return self._by_position(self.problem.weight_versions)

    def _by_position(self, amount: InFlight) -> Floats:
        problem = self.problem
        table = np.zeros((problem.replica_limit, problem.device_limit + 1))
        for r in range(1, problem.replica_limit + 1):
            for d in range(r, problem.device_limit + 1):
                table[r - 1, d] = amount(Position(r, d, problem.num_microbatches))
        return table

    def links(self, device: int, used: int) -> tuple[Floats, Floats, Floats]:
        """(seconds per byte, latency) towards earlier devices, towards later ones, and in the ring.

        Of a stage on r devices from `device` on, `used` in use; each of shape (2, r - 1 places).
        """
        cluster, most = self.problem.cluster, min(self.problem.replica_limit, used - device)
        before, after, ring = np.zeros((3, 2, most))
        worst = (0.0, 0.0)
        inward = (0.0, 0.0)
        for r in range(1, most + 1):
            last = device + r - 1
            for other in range(device, last):
                worst = _worse(worst, cluster.link(other, last))
            if device:
                inward = _worse(inward, cluster.link(device - 1, last))
            outward = (0.0, 0.0)
            if last + 1 < used:
                for own in range(device, last + 1):
                    outward = _worse(outward, cluster.link(own, last + 1))
            before[:, r - 1], after[:, r - 1], ring[:, r - 1] = inward, outward, worst
        if self.problem.transfers == "free":
            before[:], after[:] = 0.0, 0.0
        return before, after, ring

    def solve(self, upper: float) -> LinearCut | None:
        """The best cut with a bottleneck of at most `upper`."""
        if self.alike:
            return self._solve(upper, self.problem.device_limit)
        best = None
        for used in self._used_counts():
            found = self._solve(upper, used)
            if found and (best is None or found.seconds <= best.seconds * _TIE):
                best, upper = found, min(upper, found.seconds)
        return best

    def _used_counts(self) -> list[int]:
        problem = self.problem
        most = problem.device_limit
        if self.num_stages is not None and problem.replica_limit == 1:
            return [self.num_stages]
        if problem.replicas is not None:
            return [most]
        least = self.num_stages or 1
        counts = list(range(most, least - 1, -1))
        return (
            counts if len(counts) <= _MOST_COUNTS else sorted({*counts[:2], *counts[:: len(counts) // 8]}, reverse=True)
        )

    def _steps(self, low: int, high: int) -> Iterator[tuple[int, int, slice]]:
        """(stages from here on, devices from here on, replica counts allowed as a slice of r - 1)."""
        problem = self.problem
        if problem.replicas is not None and self.num_counted:
            devices = 0
            for k, r in enumerate(reversed(problem.replicas), 1):
                devices += r
                if low <= devices <= high:
                    yield k, devices, slice(r - 1, r)
            return
        most = problem.replica_limit
        for k in range(1, self.num_counted + 1) if self.num_counted else (0,):
            for d in range(max(low, k), min(high, most * k if k else high) + 1):
                yield k, d, slice(0, min(most, d))

    @cached_property
    def num_counted(self) -> int:
        """How many stages have to be told apart by number; 0 where their number is free."""
        problem = self.problem
        if problem.replica_limit == 1:
            return 0  # a stage is a device
        if self.num_stages is not None:
            return self.num_stages
        if self.pinned is not None and self.pinned.has_turns:
            return problem.stage_limit
        free = problem.max_stages is None or problem.max_stages >= min(len(self.order), problem.device_limit)
        return 0 if free else min(problem.max_stages or 0, len(self.order))

    def _solve(self, upper: float, used: int) -> LinearCut | None:
        n, limit = len(self.order), upper * _TIE
        shape = (self.num_counted + 1, used + 1, n + 1)
        best = np.full(shape, np.inf)
        best[0, 0, n] = 0.0
        chosen_r, chosen_j = np.zeros(shape, np.int16), np.zeros(shape, np.int32)
        work = self.segments.prefix(self.models[0].min(axis=0))
        tables = [self.links(a, used) for a in range(used)] if not self.alike else [self._equal_links(used)]
        shortest = self.shares.min()
        for row in self.segments.rows():
            i = row.start
            low, high = 1, used - (i > 0)
            if 0 < limit < math.inf:
                low = max(low, math.ceil((work[n] - work[i]) / limit * (1 - 1e-9)))
                high = min(high, used - math.ceil(work[i] / limit * (1 - 1e-9)))
            width = n - i
            if limit < math.inf:
                width = int(np.searchsorted(shortest * (work[i + 1 :] - work[i]), limit, side="right"))
            if self.pinned is not None:
                width = min(width, int(self.pinned.longest[i]))
            if width == 0 or low > high:
                continue
            if self.is_single:
                self._advance_all(row, low, high, width, limit, best[0], chosen_j[0], tables)
                continue
            seconds = room = None
            for k, d, counts in self._steps(low, high):
                if seconds is None or not self.alike:
                    seconds = self._stage_seconds(row, used - d, width, limit, tables)
                    room = self._room(row, used - d, width)
                before = best[max(k - 1, 0)]
                rows = before[d - counts.stop : d - counts.start, i + 1 : i + 1 + width][::-1]
                values = np.maximum(seconds[counts], rows)
                if room is not None:
                    values = np.where(room.lacks(counts, d), np.inf, values)
                if self.pinned is not None:
                    values[self._broken(i, k or d, width, used - d)[counts]] = np.inf
                flat = int(values.argmin())
                value = values.flat[flat]
                if value <= limit and value < best[k, d, i]:
                    best[k, d, i] = value
                    chosen_r[k, d, i] = counts.start + flat // width + 1
                    chosen_j[k, d, i] = i + 1 + flat % width
        if self.is_single:
            chosen_r[:] = 1
        return self._trace(best, chosen_r, chosen_j, used)

    @cached_property
    def is_single(self) -> bool:
        """Whether stages have one replica and devices are alike: then all d advance at once."""
        return self.alike and self.problem.replica_limit == 1

    def _advance_all(
        self,
        row: Row,
        low: int,
        high: int,
        width: int,
        limit: float,
        best: Floats,
        chosen_j: NDArray[np.int32],
        tables: list[tuple[Floats, Floats, Floats]],
    ) -> None:
        """The recurrence for one i and all d of low .. high, in place."""
        i = row.start
        values = np.maximum(
            self._stage_seconds(row, 0, width, limit, tables), best[low - 1 : high, i + 1 : i + 1 + width]
        )
        room = self._room(row, 0, width)
        if room is not None:
            values[room.lacks(slice(0, 1), slice(low, high + 1))[0]] = np.inf
        if self.pinned is not None and self.pinned.has_turns:
            for d in range(low, high + 1):
                values[d - low, self._broken(i, d, width, 0)[0]] = np.inf
        places = values.argmin(axis=1)
        least = values[np.arange(len(places)), places]
        best[low : high + 1, i] = np.where(least <= limit, least, np.inf)
        chosen_j[low : high + 1, i] = i + 1 + places

    def _broken(self, start: int, turn: int, width: int, device: int) -> NDArray[np.bool_]:
        """Which stages [start, j) on r devices from `device` on break a pin, of shape (r - 1, j)."""
        pinned, most = self.pinned, self.problem.replica_limit
        assert pinned is not None
        least, greatest = pinned.lengths(start, turn)
        lengths, r = np.arange(1, width + 1), np.arange(1, most + 1)[:, None]
        broken: NDArray[np.bool_] = np.broadcast_to((lengths < least) | (lengths > greatest), (most, width))
        if pinned.has_devices and self.alike:
            return broken | (pinned.least_replicas(start, width) > r)
        if pinned.has_devices:
            first, last = pinned.device_span(start, width)
            return broken | (first < device) | (last >= device + r)
        return broken

    def _equal_links(self, used: int) -> tuple[Floats, Floats, Floats]:
        cluster = self.problem.cluster
        links = (self.problem.transfer_link, cluster.link(0, 1) if cluster.num_devices > 1 else (math.inf, 0.0))
        moved, ring = (np.tile(np.array([[1 / b], [latency]]), (1, len(self.shares))) for b, latency in links)
        return moved, moved, ring

    def _stage_seconds(
        self, row: Row, device: int, width: int, limit: float, tables: list[tuple[Floats, Floats, Floats]]
    ) -> Floats:
        """Seconds of the stages [start, j) on r devices, of shape (r - 1, j); inf where not allowed."""
        before, after, ring = (t[:, :, None] for t in tables[0 if self.alike else device])
        most = before.shape[1]
        if self.alike:
            compute = row.seconds[:1, :width]
        else:
            models = self.models[1][device : device + most]
            compute = np.maximum.accumulate(row.seconds[models, :width], axis=0)
        shares = self.shares[:most, None]
        relayed = self.problem.transfers == "relayed"
        inward, outward = self._messages(row, width, before, after)
        if relayed:
            seconds: Floats = shares * compute
        elif self.problem.transfers == "overlapped":
            seconds = shares * np.maximum(compute, inward + outward)
        else:
            seconds = shares * (compute + (inward + outward))
        if most > 1:
            volumes, latencies = self.volumes[:, :most, None]
            parameters = row.parameter_bytes[:width]
            reduction = volumes * ring[0] * parameters + latencies * ring[1] * (parameters > 0)
            seconds = seconds + reduction * self.reductions[:most, None]
            seconds[1:, row.stuck[:width] > 0] = np.inf
        if self.problem.even_replicas:
            seconds[[not self.problem.allows(r) for r in range(1, most + 1)]] = np.inf
        if relayed and row.start:
            seconds = np.maximum(seconds, shares * np.maximum(inward, outward))
        return np.where(seconds > limit, np.inf, seconds)

    def _messages(self, row: Row, width: int, before: Floats, after: Floats) -> tuple[Floats, Floats]:
        """Seconds of what enters and what leaves the stages [start, j), each of shape (r - 1 or 1, j)."""
        if self.problem.transfers == "relayed":
            count, amount = self.segments.passing
            here, there = slice(row.start, row.start + 1), slice(row.start + 1, row.start + 1 + width)
            return (
                count[here] * before[1] + amount[here] * before[0],
                count[there] * after[1] + amount[there] * after[0],
            )
        return (
            row.in_count[:width] * before[1] + row.in_bytes[:width] * before[0],
            row.out_count[:width] * after[1] + row.out_bytes[:width] * after[0],
        )

    def _room(self, row: Row, device: int, width: int) -> _Room | None:
        """What the stages [start, j) may hold; None without a limit."""
        limits = self.limits if self.alike else np.minimum.accumulate(self.limits[device:])
        if not np.isfinite(limits).any():
            return None
        problem, parameters = self.problem, row.parameter_bytes[:width]
        state = np.ceil(problem.gradient_ratio * parameters) + np.ceil(problem.optimizer_ratio * parameters)
        each = row.saved_bytes[:width]
        if problem.holds_received:
            each = each + row.received_bytes[:width]
        return _Room(limits[:, None] - state, parameters, each, self.in_flight, self.versions)

    def _trace(
        self, best: Floats, chosen_r: NDArray[np.int16], chosen_j: NDArray[np.int32], used: int
    ) -> LinearCut | None:
        counted = self.num_counted
        exact = self.num_stages
        ks = [counted] if exact or not counted else list(range(1, counted + 1))
        ds: Sequence[int] = range(1, used + 1) if self.alike else (used,)
        if exact and not counted:
            ds = (exact,)
        least = min((best[k, d, 0] for k in ks for d in ds), default=math.inf)
        if not math.isfinite(least):
            return None
        k, d = next((k, d) for d in ds for k in ks if best[k, d, 0] <= least * _TIE)
        stages, i, device = [], 0, 0
        while i < len(self.order):
            r, j = int(chosen_r[k, d, i]), int(chosen_j[k, d, i])
            stages.append((self.order[i:j], tuple(range(device, device + r))))
            i, d, k, device = j, d - r, max(k - 1, 0), device + r
        if self.alike:
            return LinearCut(
                float(least), self.problem.pinned.on_pinned_devices(stages, self.problem.cluster.num_devices)
            )
        return LinearCut(float(least), tuple(stages))


@dataclass(frozen=True, slots=True)
class _Room:
    """What stages hold, and what they may.

    Attributes:
        left: bytes of a device without gradients and optimizer state, of shape (1 or r - 1, j).
        parameters, each: bytes of one copy of the parameters, and of one micro-batch, by j.
        in_flight, versions: tables of shape (r - 1, d).
    """

    left: Floats
    parameters: Floats
    each: Floats
    in_flight: Floats
    versions: Floats

    def lacks(self, counts: slice, devices: int | slice) -> NDArray[np.bool_]:
        """Which do not fit, by r, by d where several are asked for, and by j."""
        held = (
            self.in_flight[counts, devices, None] * self.each + self.versions[counts, devices, None] * self.parameters
        )
        left = self.left if len(self.left) == 1 else self.left[counts]
        lacking: NDArray[np.bool_] = held > left
        return lacking


def _worse(worst: tuple[float, float], link: tuple[float, float]) -> tuple[float, float]:
    """The larger (seconds per byte, latency) of `worst` and a link given as (bandwidth, latency)."""
    return max(worst[0], 1 / link[0]), max(worst[1], link[1])
