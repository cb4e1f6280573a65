"""The best cut where layers can run in several ways: recomputed or not, on one device or shared by several.

A stage has a degree t (devices that share a replica), d replicas, and a way for each layer, the
cheapest that fits its memory (Tarnawski et al., NeurIPS 2021: a knapsack). For a threshold U the
programme finds for every ideal I and number of devices k the least number of replicas with which all
that follows I runs on k devices in stages of at most U seconds each:

    replicas(I, k) = min over J, a superset of I, t and d of d + replicas(J, k - t * d)
                     where the stage J - I takes at most U with as much in flight as the replicas say

It runs from the last stage to the first, as memory needs: the fewer replicas follow, the less is in
flight. U starts under the best that is known, and where it cannot be reached it is a bound. Departures
from the paper: the knapsack is exact, and no more than what follows is counted as in flight.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeflow.errors import Infeasible, PlanError
from pipeflow.graphs.costs import LayerCosts, Variant
from pipeflow.partitioners.atoms import Floats
from pipeflow.partitioners.certify import certified
from pipeflow.partitioners.feasibility import memory_limits, require_feasible, shortfall
from pipeflow.partitioners.ideal_sets import sets_of_ideals
from pipeflow.partitioners.knapsack import choose
from pipeflow.partitioners.lattice import Lattice
from pipeflow.partitioners.objective import objective, reduction_volume
from pipeflow.partitioners.partition import Partition, Stage
from pipeflow.partitioners.problem import PartitionProblem, Position, one_version
from pipeflow.partitioners.stage_ways import Sharing, are_bytes_exact, ways_of

_MOST_IDEALS = 500
_WORK = 10**9
_NONE = 2**30
_CLOSE = 1e-3
_STRICTLY = 1 - 1e-9
_ROUNDING = 1 + 1e-12


def supports(problem: PartitionProblem) -> str | None:
    """Why the programme cannot express the problem, or None if it can."""
    if not problem.cluster.is_uniform or problem.cluster.devices[0].speed_by_kind or problem.nested:
        return "devices or links differ"
    if problem.transfer_link[1] or problem.transfers not in ("added", "free"):
        return "links have latency, or transfers are not added"
    if problem.stage_count is not None or problem.max_stages is not None or problem.chunks > 1 or problem.pins:
        return "numbers of stages, chunks or pins are asked for"
    if problem.costs.sharing == "copies" and problem.costs.colocated:
        return "several stages may hold copies of shared parameters"
    if problem.weight_versions is not one_version or problem.holds_received or problem.unordered:
        return "weights are stashed, what is received is held beside what layers save, or layers are unordered"
    return None


def variants(problem: PartitionProblem) -> Partition:
    """The best partition over the ideals that are looked at; proven best if those are all.

    Raises:
        PlanError: unlike devices, latencies, or numbers of stages, which the programme cannot express.
        Infeasible: no cut of those ideals fits.
    """
    if reason := supports(problem):
        raise PlanError(f"layers can run in several ways, but {reason}; leave that out")
    require_feasible(problem, varies=True)
    best: tuple[Stage, ...] | None = None
    bound = work = work_bound(problem)
    has_room = memory_limits(problem)[0] == math.inf
    for masks, is_all in sets_of_ideals(problem, _MOST_IDEALS, _WORK):
        programme = _Programme(problem, Lattice(problem, masks))
        best, proved = programme.improve(best, work)
        if is_all and programme.is_exact and (has_room or are_bytes_exact(problem)):
            bound = max(bound, proved)
    if best is None:
        raise Infeasible([_reason(problem)])
    return certified(problem, best, partitioner="variants", lower_bound=bound)


def work_bound(problem: PartitionProblem) -> float:
    """All layers' least device seconds over all devices."""
    ways = [ways_of(problem, layer) for layer in problem.costs.layers]
    least = math.fsum(min(way.seconds * way.degree for way in group) for group in ways)
    return least / problem.cluster.devices[0].speed / problem.cluster.num_devices * (1 - 1e-12)


def _reason(problem: PartitionProblem) -> str:
    limit = memory_limits(problem)[0]
    if limit == math.inf:
        return (
            f"no cut into stages of like degrees fits {problem.cluster.num_devices} devices: the layers of a stage are "
            "shared by as many devices; give more devices, or layers variants of other degrees"
        )
    in_flight = problem.in_flight(Position(1, 1, problem.num_microbatches))
    least = {
        layer.name: min(way.resident_bytes + in_flight * way.saved_bytes for way in ways_of(problem, layer))
        for layer in problem.costs.layers
    }
    name = max(least, key=least.__getitem__)
    held, needed = limit * problem.unit_bytes, least[name] * problem.unit_bytes
    return (
        f"no cut fits {problem.cluster.num_devices} devices of {held:.0f} bytes, whichever way its layers run; the "
        f"largest alone, {name!r}, needs {needed:.0f} in its smallest way; give more devices or more memory"
    )


class _Step(NamedTuple):
    """A stage between the ideals of two rows; `in_flight` micro-batches are held by each of its replicas."""

    start: int
    end: int
    degree: int
    replicas: int
    in_flight: int


@dataclass
class _Programme:
    """The programme over some ideals.

    Attributes:
        is_exact: False once a knapsack had too many sums.
        choices: (seconds found, seconds at least) of stages whose layers had to be chosen for memory.
    """

    problem: PartitionProblem
    lattice: Lattice
    is_exact: bool = True
    choices: dict[_Step, tuple[float, float]] = field(default_factory=dict)

    @cached_property
    def layers(self) -> tuple[LayerCosts, ...]:
        return self.problem.costs.layers

    @cached_property
    def members(self) -> Floats:
        """Whether a layer is in an ideal, by [ideal, layer]."""
        atoms = self.problem.atoms
        position = self.problem.costs.position_by_layer
        table = np.zeros((len(self.lattice.masks), len(self.layers)))
        for atom, names in enumerate(atoms.members):
            for name in names:
                table[:, position[name]] = self.lattice.members[:, atom]
        return table

    @cached_property
    def limit(self) -> float:
        return memory_limits(self.problem)[0]

    @cached_property
    def ways(self) -> list[tuple[Variant, ...]]:
        return [ways_of(self.problem, layer) for layer in self.layers]

    @cached_property
    def transfers(self) -> Floats:
        """Seconds of what enters and leaves the stages between pairs of ideals; inf where none is."""
        size = len(self.lattice.masks)
        table = np.full((size, size), np.inf)
        for row in range(1, size):
            some = self.lattice.subsets(row, 0, row)
            inward, outward = self.lattice.transfers(some, row)
            table[some, row] = inward + outward
        return table

    @cached_property
    def sharings(self) -> list[Sharing]:
        degrees = sorted({way.degree for ways in self.ways for way in ways})
        most = self.problem.device_limit
        return [
            self._sharing(t, d)
            for t in degrees
            for d in range(1, min(most // t, self.problem.replica_limit) + 1)
            if self.problem.allows(d)
        ]

    def _sharing(self, degree: int, replicas: int) -> Sharing:
        problem, size = self.problem, len(self.lattice.masks)
        share, speed = problem.share(replicas), problem.cluster.devices[0].speed
        each, once = self._reduction(replicas)
        options: list[NDArray[np.float64] | None] = []
        seconds, missing, stuck, learns = np.zeros((4, len(self.layers)))
        for index, (layer, ways) in enumerate(zip(self.layers, self.ways, strict=True)):
            rows = [
                (share * w.seconds / speed + each * w.parameter_bytes, w.saved_bytes, w.resident_bytes)
                for w in ways
                if w.degree == degree
            ]
            options.append(np.array(rows, dtype=np.float64) if rows else None)
            missing[index] = not rows
            stuck[index] = not layer.replicable and replicas > 1
            learns[index] = bool(rows) and all(w.parameter_bytes for w in ways if w.degree == degree)
            seconds[index] = min((row[0] for row in rows), default=0.0)
        sums = self.members @ np.stack([seconds, missing + stuck, learns], axis=1)
        least = share * (self.transfers + self._borders(degree))
        least += np.maximum(sums[:, 0] - sums[:, 0][:, None], 0.0)
        least += once * (sums[:, 2] - sums[:, 2][:, None] > 0)
        least[sums[:, 1] - sums[:, 1][:, None] > 0] = np.inf
        assert least.shape == (size, size)
        return Sharing(degree, replicas, options, least, self.members)

    def _reduction(self, replicas: int) -> tuple[float, float]:
        """Seconds of a reduction for each byte of parameters, and for any, per micro-batch of the batch."""
        problem, cluster = self.problem, self.problem.cluster
        bandwidth, latency = cluster.link(0, 1) if cluster.num_devices > 1 else (math.inf, 0.0)
        volume, latencies = reduction_volume(replicas, problem.reduction)
        return problem.reductions(replicas) * volume / bandwidth, problem.reductions(replicas) * latencies * latency

    def _borders(self, degree: int) -> Floats:
        """Seconds of what a replica's devices exchange at borders, at least, between pairs of ideals."""
        size, bandwidth = len(self.lattice.masks), self.problem.transfer_link[0]
        total = np.zeros((size, size))
        position, costs = self.problem.costs.position_by_layer, self.problem.costs
        for index, ways in enumerate(self.ways):
            tables = [dict(w.border_bytes) for w in ways if w.degree == degree]
            for tensor in tables[0] if tables else ():
                amount = min(table.get(tensor, 0) for table in tables) / bandwidth
                producer = costs.producer_by_tensor.get(tensor)
                own = self.members[:, index]
                if not amount or producer is None:
                    continue
                if tensor in self.layers[index].inputs:  # in the stage, its producer before
                    total += amount * np.maximum(own - own[:, None], 0) * self.members[:, [position[producer]]]
                else:
                    readers = [position[r] for r in costs.consumers_by_tensor[tensor]]
                    outside = (self.members[:, readers] == 0).any(axis=1)
                    total += amount * np.maximum(own - own[:, None], 0) * outside
        return total

    def improve(self, best: tuple[Stage, ...] | None, bound: float) -> tuple[tuple[Stage, ...] | None, float]:
        """A partition at least as good as `best`, and a bound over the programme's ideals."""
        if not self.sharings:
            return best, math.inf
        reach = objective(self.problem, best) if best else self._ample()
        low = bound
        if best is None:
            best = self._stages(self.chain(reach))
            if best is None:
                return None, math.inf
            reach = objective(self.problem, best)
        while reach * _STRICTLY > low:
            # Far from the bound the middle is tried, close to it all that is better than the best.
            aim = (low + reach) / 2 if low < reach * (1 - _CLOSE) else reach * _STRICTLY
            found = self._stages(self.chain(aim))
            seconds = objective(self.problem, found) if found else math.inf
            if found is None:
                low = max(low, aim)
            elif seconds < reach * _STRICTLY:
                best, reach = found, seconds
            else:
                break
        return best, low

    def _ample(self) -> float:
        finite = [s.least[np.isfinite(s.least)].max(initial=0.0) for s in self.sharings]
        slowest = math.fsum(max(way.seconds for way in ways) for ways in self.ways)
        borders = math.fsum(amount for ways in self.ways for way in ways for _, amount in way.border_bytes)
        parameters = math.fsum(max(way.parameter_bytes for way in ways) for ways in self.ways)
        reduction = max(self._reduction(s.replicas)[0] for s in self.sharings) * parameters
        speed = self.problem.cluster.devices[0].speed
        total = max(map(float, finite)) + slowest / speed + reduction + 1.0
        return total + borders / self.problem.transfer_link[0]

    def chain(self, upper: float) -> list[_Step] | None:
        """The stages, each within `upper` and memory, from the first to the last; None if there are none."""
        size, most = len(self.lattice.masks), self.problem.device_limit
        replicas = np.full((size, most + 1), _NONE, dtype=np.int64)
        replicas[-1] = 0
        steps: dict[tuple[int, int], _Step] = {}
        for end in range(size - 1, 0, -1):
            for used, following in _breaks(replicas[end]):
                for sharing in self.sharings:
                    now, then = used + sharing.degree * sharing.replicas, following + sharing.replicas
                    if now > most:
                        continue
                    better = np.flatnonzero((sharing.least[:end, end] <= upper) & (replicas[:end, now] > then))
                    for start in self._fitting(sharing, better, end, then, upper):
                        step = self._step(sharing, start, end, then)
                        for k in range(now, most + 1):
                            if replicas[start, k] <= then:
                                break
                            replicas[start, k], steps[start, k] = then, step
        if replicas[0, most] >= _NONE:
            return None
        result, start, left = [], 0, most
        while start < size - 1:
            result.append(steps[start, left])
            start, left = result[-1].end, left - result[-1].degree * result[-1].replicas
        return result

    def _step(self, sharing: Sharing, start: int, end: int, from_here: int) -> _Step:
        position = Position(sharing.replicas, from_here, self.problem.num_microbatches)
        return _Step(start, end, sharing.degree, sharing.replicas, self.problem.in_flight(position))

    def _fitting(
        self, sharing: Sharing, starts: NDArray[np.intp], end: int, from_here: int, upper: float
    ) -> Iterator[int]:
        """Of the ideals, those from which a stage to `end` keeps to the threshold and to memory."""
        if not len(starts):
            return
        in_flight = self._step(sharing, 0, end, from_here).in_flight
        starts = starts[sharing.least_bytes(starts, end, in_flight) <= self.limit]
        lacking = sharing.fast_bytes(starts, end, in_flight) - self.limit
        is_fast = (lacking <= 0) & self._alike[sharing.degree]
        if self._alike[sharing.degree]:
            # What is lacking is saved at best at the least price that any layer asks.
            dearer = sharing.least_price(in_flight) * np.maximum(lacking, 0.0)  # nothing lacks where there is no limit
            possible = sharing.least[starts, end] + dearer <= upper * _ROUNDING
            starts, is_fast = starts[possible], is_fast[possible]
        for start, fits in zip(starts.tolist(), is_fast.tolist(), strict=True):
            if fits or self._choice(sharing, self._step(sharing, start, end, from_here), upper) <= upper:
                yield start

    @cached_property
    def _alike(self) -> dict[int, bool]:
        """Whether the ways of a degree move the same at borders, so that the fastest is fastest everywhere."""
        degrees = {way.degree for ways in self.ways for way in ways}
        return {
            t: all(len({w.border_bytes for w in ways if w.degree == t}) <= 1 for ways in self.ways) for t in degrees
        }

    def _choice(self, sharing: Sharing, step: _Step, upper: float) -> float:
        """Seconds of a stage whose layers run as fast as fits; the least that they might, if that is above `upper`."""
        if step not in self.choices:
            rest, things = self._options(sharing, step)
            choice = choose(things, self.limit)
            self.choices[step] = (rest + choice.seconds, rest + choice.least_seconds)
        seconds, least = self.choices[step]
        if seconds > upper >= least:
            self.is_exact = False
        return seconds

    def _options(self, sharing: Sharing, step: _Step) -> tuple[float, list[list[tuple[float, float]]]]:
        """Seconds that no choice changes, and (seconds, bytes) of every way of every layer of a stage."""
        share, bandwidth = self.problem.share(step.replicas), self.problem.transfer_link[0]
        once = self._reduction(step.replicas)[1]
        inside = np.flatnonzero(self.members[step.end] - self.members[step.start])
        things = []
        learns = False
        for index in inside.tolist():
            rows = sharing.options[index]
            assert rows is not None
            ways = [w for w in self.ways[index] if w.degree == step.degree]
            learns = learns or all(w.parameter_bytes for w in ways)
            crossing = [share * self._crossing(index, way, step) / bandwidth for way in ways]
            things.append(
                [(s + c, a * step.in_flight + b) for (s, a, b), c in zip(rows.tolist(), crossing, strict=True)]
            )
        return share * float(self.transfers[step.start, step.end]) + once * learns, things

    def _crossing(self, index: int, way: Variant, step: _Step) -> int:
        """Bytes that a layer's devices exchange at the borders of the stage."""
        costs, position = self.problem.costs, self.problem.costs.position_by_layer
        total = 0
        for tensor, amount in way.border_bytes:
            producer = costs.producer_by_tensor.get(tensor)
            if producer is not None and tensor in self.layers[index].inputs:
                total += amount * bool(self.members[step.start, position[producer]])
            elif producer is not None:
                readers = [position[r] for r in costs.consumers_by_tensor[tensor]]
                total += amount * bool((self.members[step.end, readers] == 0).any())
        return total

    def _stages(self, chain: Sequence[_Step] | None) -> tuple[Stage, ...] | None:
        if chain is None:
            return None
        sharings = {(s.degree, s.replicas): s for s in self.sharings}
        stages, device = [], 0
        for step in chain:
            sharing = sharings[step.degree, step.replicas]
            choice = choose(self._options(sharing, step)[1], self.limit)
            inside = np.flatnonzero(self.members[step.end] - self.members[step.start]).tolist()
            names = []
            for index, option in zip(inside, choice.options, strict=True):
                names.append([w for w in self.ways[index] if w.degree == step.degree][option].name)
            count = step.degree * step.replicas
            stages.append(
                Stage.sharded(
                    [self.layers[index].name for index in inside],
                    range(device, device + count),
                    degree=step.degree,
                    variants=names,
                )
            )
            device += count
        assert not shortfall(self.problem, stages), "a stage that was found to fit does not"
        return tuple(stages)


def _breaks(replicas: NDArray[np.int64]) -> list[tuple[int, int]]:
    """(devices, replicas) where more devices first allow fewer replicas."""
    result: list[tuple[int, int]] = []
    for used, count in enumerate(replicas.tolist()):
        if count < _NONE and (not result or count < result[-1][1]):
            result.append((used, count))
    return result
