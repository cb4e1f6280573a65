"""Stages filled one after another up to a threshold, the best few beginnings kept: a beam search.

Cutting layers into K stages under a threshold is assembly line balancing, where filling station
by station, with as little left over as can be, is what works best at size (Hoffmann, Management
Science 1963; Bautista and Pereira, EJOR 2009). A beginning is an ideal of the atoms' order with the
stages that make it up; each is continued by many draws of a next stage, and kept if it has much
work done and little open. Departures: transfers count, for the stage that is filled and,
as what is open behind it, against the beginning; and only the last part of a stage is drawn many
times. The thresholds, the draws and their number are fixed: the same problem, the same partition.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from pipeflow.errors import PlanError
from pipeflow.partitioners.bounds import cut_bound, lower_bound
from pipeflow.partitioners.certify import certified, stages_of
from pipeflow.partitioners.chain import best_stages, closest
from pipeflow.partitioners.feasibility import memory_limits, no_cut_fits, require_feasible, shortfall
from pipeflow.partitioners.linear import cut_order
from pipeflow.partitioners.net_transfers import merged_nets
from pipeflow.partitioners.normalise import fold
from pipeflow.partitioners.objective import compute_seconds, objective
from pipeflow.partitioners.orders import best_of_orders, place_free
from pipeflow.partitioners.partition import Partition, Stage
from pipeflow.partitioners.problem import PartitionProblem, Position

_FACTORS = (1.0, 1.002, 1.005, 1.01, 1.015, 1.02, 1.03, 1.04, 1.06, 1.08, 1.12, 1.2, 1.4, 2.0, 4.0, 16.0, 1e3)
"""Thresholds, as multiples of the lower bound."""

_SEARCHES = ((4, 4), (4, 20), (12, 20), (40, 20))
"""(beginnings kept, ends drawn of each stage), in turn."""

_OVERFULL = 3.0
"""A stage may be so many times the threshold before more atoms bring it back: nets close."""

_HEAD = 0.6
"""Of a stage's compute, drawn once for all of its ends."""

_MOST_REFUSED = 12
"""So many atoms that do not fit end a stage."""

_MOST_WORK = 9_000_000
"""Atoms put on stages, over all searches, that are worth their time; fewer if half their square is less."""


def supports(problem: PartitionProblem) -> str | None:
    """Why stages cannot be filled one by one, or None if they can."""
    if problem.replica_limit > 1:
        return "more than one replica a stage is allowed; set max_replicas=1"
    if problem.chunks > 1:
        return "a device may hold several stages; set chunks=1"
    if not problem.cluster.is_uniform:
        return "devices or links differ"
    if problem.stage_count is not None:
        return "a number of stages is asked for; set max_stages"
    if problem.transfers == "relayed":
        return "transfers are relayed; count them as added or overlapped"
    if not problem.pinned.is_free:
        return "layers are pinned"
    return None


def beam(problem: PartitionProblem) -> Partition:
    """The best partition found by filling stages. A heuristic; the lower bound is that of `bounds`.

    Starts from the best of a few orders, which it has to beat.

    Raises:
        PlanError: replicas, chunks, unlike devices, an exact number of stages, relays or pins.
        Infeasible: none of the partitions that were tried fits.
    """
    if reason := supports(problem):
        raise PlanError(f"beam cannot solve this: {reason}; use another partitioner")
    require_feasible(problem)
    smaller = fold(problem)
    bound = max(lower_bound(problem), cut_bound(smaller))
    start = best_of_orders(smaller, rounds=4, bound=bound)
    stages, _ = improve(smaller, start, bound)
    if stages is None:
        raise no_cut_fits(problem, closest(problem, bound), "filling of stages")
    return certified(problem, stages, partitioner="beam", lower_bound=bound)


def improve(
    problem: PartitionProblem, start: Sequence[Stage] | None, bound: float, *, seed: int = 0
) -> tuple[tuple[Stage, ...] | None, float]:
    """A partition at least as good as `start`, None if there is none, and `bound`, which it never raises.

    Args:
        start: a valid partition to beat, if one is known.
        bound: a proven lower bound; thresholds are multiples of it.
        seed: of the draws.
    """
    search, best = _Search(problem, random.Random(seed)), tuple(start) if start else None
    reach = objective(problem, start) if start else math.inf
    # Where no bound is known, thresholds begin at a hair.
    floor, left = (
        bound or math.ulp(math.fsum(search.graph.seconds) or 1.0),
        min(_MOST_WORK, problem.atoms.count**2 // 2),
    )
    for width, num_ends in _SEARCHES:
        for factor in _FACTORS:
            if left <= 0 or floor * factor >= reach * (1 - 1e-9):
                break
            cut, spent = search.run(floor * factor, width, num_ends)
            left -= spent
            found = None if cut is None else _priced(problem, cut, bound)
            if found is not None and objective(problem, found) < reach:
                best, reach = found, objective(problem, found)
                break
    return best, bound


def _priced(problem: PartitionProblem, cut: Sequence[Sequence[int]], bound: float) -> tuple[Stage, ...] | None:
    """The stages that were filled, or the best cut of their order, whichever is better."""
    free = [atom for atom in range(problem.atoms.count) if not problem.atoms.bound[atom]]
    order = place_free(problem.atoms, [*(atom for atoms in cut for atom in atoms), *free])
    options = [] if free else [stages_of(problem, [(atoms, (d,)) for d, atoms in enumerate(cut)])]
    options = [stages for stages in options if not shortfall(problem, stages)]
    upper = min((objective(problem, stages) for stages in options), default=math.inf)
    if (found := cut_order(problem, order, bound=bound, upper=upper)) is not None:
        options.append(best_stages(problem, found))
    return min(options, key=lambda stages: objective(problem, stages), default=None)


@dataclass(frozen=True)
class _Graph:
    """What filling a stage needs of a problem, as lists."""

    problem: PartitionProblem

    @cached_property
    def seconds(self) -> list[float]:
        device = self.problem.cluster.devices[0]
        return [compute_seconds(group, device) for group in self.problem.atoms.layers]

    @cached_property
    def nets(self) -> list[tuple[tuple[int, ...], float]]:
        """Bound ends and seconds of every net that costs any; nets of the same ends are one."""
        return merged_nets(self.problem, self.problem.atoms.bound.__getitem__)

    @cached_property
    def nets_of(self) -> list[list[tuple[int, float, int]]]:
        """(net, its seconds, its number of ends) of every atom."""
        result: list[list[tuple[int, float, int]]] = [[] for _ in self.seconds]
        for index, (ends, seconds) in enumerate(self.nets):
            for end in ends:
                result[end].append((index, seconds, len(ends)))
        return result

    @cached_property
    def held(self) -> list[list[float]]:
        """Bytes that every atom takes on each stage in turn, if there are as many stages as there can be."""
        problem, atoms, most = self.problem, self.problem.atoms, self.problem.stage_limit
        state = (problem.gradient_ratio + problem.optimizer_ratio) * atoms.parameter_bytes
        positions = [Position(1, most - turn, problem.num_microbatches) for turn in range(most)]
        rows: list[list[float]] = [
            (
                state
                + problem.weight_versions(position) * atoms.parameter_bytes
                + problem.in_flight(position) * atoms.saved_bytes
            ).tolist()
            for position in positions
        ]
        return rows

    @cached_property
    def overlaps(self) -> bool:
        return self.problem.transfers == "overlapped"

    @cached_property
    def limit(self) -> float:
        return memory_limits(self.problem)[0]


@dataclass
class _Beginning:
    """An ideal, and the stages that make it up, the last one first in `stages`."""

    stages: tuple[list[int], tuple[object, ...] | None] | None
    waiting: list[int]
    ready: list[int]
    ends: list[int]
    work: float = 0.0
    opened: float = 0.0
    num_atoms: int = 0


@dataclass
class _Filling:
    """A stage while it is filled, after some beginning."""

    atoms: list[int] = field(default_factory=list)
    ends: dict[int, int] = field(default_factory=dict)
    waiting: dict[int, int] = field(default_factory=dict)
    ready: list[tuple[float, int]] = field(default_factory=list)
    compute: float = 0.0
    transfers: float = 0.0
    opened: float = 0.0
    bytes: float = 0.0
    best: tuple[float, int, float, float] | None = None
    """Of the best place to stop: worth, number of atoms, compute, what is open behind."""

    def copy(self) -> _Filling:
        return _Filling(
            self.atoms[:],
            self.ends.copy(),
            self.waiting.copy(),
            self.ready[:],
            self.compute,
            self.transfers,
            self.opened,
            self.bytes,
            self.best,
        )


@dataclass
class _Search:
    problem: PartitionProblem
    draw: random.Random

    @cached_property
    def graph(self) -> _Graph:
        return _Graph(self.problem)

    @cached_property
    def spread(self) -> float:
        """Atoms of a stage, on average."""
        return self.problem.atoms.count / self.problem.stage_limit

    def run(self, upper: float, width: int, num_ends: int) -> tuple[list[list[int]] | None, int]:
        """Stages within `upper`, or None if none were found, and the work that it took."""
        most, total = self.problem.stage_limit, math.fsum(self.graph.seconds)
        beginnings, spent = [self._empty()], 0
        for turn in range(most):
            options: dict[tuple[float, float, int], tuple[float, list[int], float, float, _Beginning]] = {}
            for beginning in beginnings:
                for atoms, compute, opened in self._fillings(beginning, upper, turn, num_ends):
                    spent += len(atoms)
                    work = beginning.work + compute
                    key = (round(work / upper, 9), round(opened / upper, 9), beginning.num_atoms + len(atoms))
                    options.setdefault(key, (opened - work, atoms, work, opened, beginning))
            best = sorted(options.values(), key=lambda option: option[0])[:width]
            beginnings = [self._after(start, atoms, work, opened) for _, atoms, work, opened, start in best]
            if done := next((b for b in beginnings if not b.ready), None):
                return _unrolled(done), spent
            if not beginnings or total - max(b.work for b in beginnings) > (most - turn - 1) * upper:
                return None, spent
        return None, spent

    def _empty(self) -> _Beginning:
        atoms = self.problem.atoms
        waiting = [len(before) for before in atoms.predecessors]
        ready = [atom for atom in range(atoms.count) if atoms.bound[atom] and not waiting[atom]]
        return _Beginning(None, waiting, ready, [0] * len(self.graph.nets))

    def _after(self, start: _Beginning, atoms: list[int], work: float, opened: float) -> _Beginning:
        waiting, ends, ready = start.waiting[:], start.ends[:], set(start.ready).difference(atoms)
        for atom in atoms:
            for net, _, _ in self.graph.nets_of[atom]:
                ends[net] += 1
            for following in self.problem.atoms.successors[atom]:
                waiting[following] -= 1
                if not waiting[following]:
                    ready.add(following)
        ready.difference_update(atoms)
        stages = (atoms, start.stages)
        return _Beginning(stages, waiting, sorted(ready), ends, work, opened, start.num_atoms + len(atoms))

    def _fillings(
        self, start: _Beginning, upper: float, turn: int, num_ends: int
    ) -> Iterator[tuple[list[int], float, float]]:
        """Next stages of several kinds: (atoms, compute, what is open behind)."""
        for rule, noise in itertools.product(range(3), (0.05, 0.5)):
            head = _Filling()
            self._queue(head, start, start.ready, rule, noise)
            self._grow(head, start, upper, turn, rule, noise, until=_HEAD * upper)
            for _ in range(num_ends):
                tail = head.copy()
                tail.ready = []
                self._queue(tail, start, [atom for _, atom in head.ready], rule, noise)
                self._grow(tail, start, upper, turn, rule, noise, until=math.inf)
                if tail.best is not None:
                    _, count, compute, opened = tail.best
                    yield tail.atoms[:count], compute, start.opened + opened

    def _queue(self, stage: _Filling, start: _Beginning, atoms: Sequence[int], rule: int, noise: float) -> None:
        for atom in atoms:
            heapq.heappush(stage.ready, (self._priority(stage, start, atom, rule, noise), atom))

    def _priority(self, stage: _Filling, start: _Beginning, atom: int, rule: int, noise: float) -> float:
        """What goes first, the smallest: the oldest, what became ready last, or what opens least."""
        if rule == 0:
            return atom + noise * self.spread * self.draw.random()
        if rule == 1:
            return 8 * noise * self.draw.random() - len(stage.atoms)
        opened, spread = 0.0, 0.0
        for net, seconds, size in self.graph.nets_of[atom]:
            count = start.ends[net] + stage.ends.get(net, 0)
            spread += seconds
            opened += seconds if not count else -seconds if count + 1 == size else 0.0
        return opened - self.graph.seconds[atom] + noise * spread * self.draw.random()

    def _grow(
        self, stage: _Filling, start: _Beginning, upper: float, turn: int, rule: int, noise: float, until: float
    ) -> None:
        """Adds atoms until the stage is full, or has `until` seconds of compute; remembers where best to stop."""
        graph, refused, held = self.graph, 0, self.graph.held[turn]
        while stage.ready and stage.compute < until and refused < _MOST_REFUSED:
            _, atom = heapq.heappop(stage.ready)
            if stage.compute + graph.seconds[atom] > upper or stage.bytes + held[atom] > graph.limit:
                refused += 1
                continue
            before, opened = stage.transfers, stage.opened
            for net, seconds, size in graph.nets_of[atom]:
                inside = stage.ends.get(net, 0)
                earlier = start.ends[net]
                if not inside:
                    before += seconds
                    opened += seconds if not earlier else 0.0
                if inside + 1 == size:
                    before -= seconds
                if earlier + inside + 1 == size:
                    opened -= seconds
                stage.ends[net] = inside + 1
            stage.transfers, stage.opened = before, opened
            stage.compute += graph.seconds[atom]
            stage.bytes += held[atom]
            stage.atoms.append(atom)
            load = max(stage.compute, before) if graph.overlaps else stage.compute + before
            if load <= upper:
                worth = stage.compute - stage.opened
                if stage.best is None or worth >= stage.best[0]:
                    stage.best = (worth, len(stage.atoms), stage.compute, stage.opened)
            elif load > _OVERFULL * upper:
                return
            for following in self.problem.atoms.successors[atom]:
                left = stage.waiting.get(following, start.waiting[following]) - 1
                stage.waiting[following] = left
                if not left:
                    self._queue(stage, start, [following], rule, noise)


def _unrolled(beginning: _Beginning) -> list[list[int]]:
    stages, rest = [], beginning.stages
    while rest is not None:
        stages.append(rest[0])
        rest = rest[1]  # type: ignore[assignment]
    return stages[::-1]
