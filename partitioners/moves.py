"""Annealed moves of atoms between stages: the load of the two stages that a move concerns, and no more.

An atom may go to any stage between the last that holds one of its predecessors and the first that
holds one of its successors (Kirkpatrick et al., Science 1983, for the rule of acceptance). What is
made small is the sum over stages of (load / bottleneck) ** 8, which sees more than the busiest stage
alone. Loads are kept up with every move at the cost of the atom's own nets. They are a
guide: a tensor counts once for each stage that it touches, at the first link's speed. What they
take for the best so far is priced by the objective, checked against memory and pins, and only then
kept. Draws and their number are fixed: the same problem, the same partition.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from pipeflow.partitioners.atoms import Cut
from pipeflow.partitioners.bounds import lower_bound
from pipeflow.partitioners.certify import certified, stages_of
from pipeflow.partitioners.chain import chain
from pipeflow.partitioners.feasibility import atom_bytes, memory_limits, require_feasible, shortfall
from pipeflow.partitioners.net_transfers import NetTransfers
from pipeflow.partitioners.objective import compute_seconds, objective, reduction_volume
from pipeflow.partitioners.orders import place_free
from pipeflow.partitioners.partition import Partition, Stage
from pipeflow.partitioners.problem import PartitionProblem

_POWER = 8
_HOT, _COLD = 0.3, 0.003
"""Temperatures at the start and at the end, in units of what is made small."""

_WARM = (_COLD, 4 * _COLD)
"""Temperatures at the starts from a good partition, one after the other."""

_MOVES_PER_ATOM, _MOST_MOVES = 300, 300_000
_POLISHES_PER_ATOM, _MOST_POLISHES = 100, 600_000
"""Draws, as long as they are worth their time; in `polish`."""

_MOST_PASSES = 20
"""Over the unbound atoms, when these are settled."""


def moves(problem: PartitionProblem) -> Partition:
    """The cut of the graph's order, improved by moves. A heuristic; the lower bound is that of `chain`.

    Raises:
        Infeasible: no cut of the graph's order fits.
    """
    require_feasible(problem)
    start = chain(problem)
    stages, bound = improve(problem, start.stages, max(start.certificate.lower_bound, lower_bound(problem)))
    assert stages is not None, "a start was given"
    return certified(problem, stages, partitioner="moves", lower_bound=bound)


def improve(
    problem: PartitionProblem, start: Sequence[Stage] | None, bound: float, *, seed: int = 0
) -> tuple[tuple[Stage, ...] | None, float]:
    """A partition at least as good as `start` with as many stages, and `bound`, which it never raises."""
    if start is None or len(start) < 2 or objective(problem, start) * (1 - 1e-9) <= bound:
        return (None if start is None else tuple(start)), bound
    steps = min(_MOST_MOVES, _MOVES_PER_ATOM * problem.atoms.count)
    return _annealed(problem, start, bound, random.Random(seed), hot=_HOT, steps=steps), bound


def polish(
    problem: PartitionProblem, start: Sequence[Stage] | None, bound: float, *, seed: int = 0
) -> tuple[tuple[Stage, ...] | None, float]:
    """As `improve`, for a partition that is good already, of many layers: stages about it are evened out."""
    best, draw = None if start is None else tuple(start), random.Random(seed)
    steps = min(_MOST_POLISHES, _POLISHES_PER_ATOM * problem.atoms.count)
    for hot in _WARM:
        if best is None or len(best) < 2 or objective(problem, best) * (1 - 1e-9) <= bound:
            break
        best = _annealed(problem, best, bound, draw, hot=hot, steps=steps)
    return best, bound


def _annealed(
    problem: PartitionProblem, start: Sequence[Stage], bound: float, draw: random.Random, *, hot: float, steps: int
) -> tuple[Stage, ...]:
    """The best partition on the way from `start`, at so many draws."""
    best, reach = tuple(start), objective(problem, start)
    state = _State.of(problem, start)
    guide = max(state.loads)
    for step in range(steps):
        heat = hot * (_COLD / hot) ** (step / steps)
        touched = state.step(draw, guide, heat)
        if touched and max(touched) < guide and max(state.loads) < guide * (1 - 1e-9):
            guide = max(state.loads)
            found = state.stages()
            seconds = objective(problem, found)
            if seconds < reach * (1 - 1e-9) and _is_valid(problem, found):
                best, reach = found, seconds
                if reach * (1 - 1e-9) <= bound:
                    break
    return best


def _is_valid(problem: PartitionProblem, stages: Sequence[Stage]) -> bool:
    return not shortfall(problem, stages) and not problem.pins.broken(stages)


def settle(problem: PartitionProblem, cut: Cut) -> Cut:
    """The cut with the atoms that are on none of its stages, which no order binds, where they cost least.

    The largest first, each goes to where its neighbours are if that has room, else to where most room is
    left, on devices without a stage too; and then wherever there is room and a move makes loads better,
    until none does.
    """
    free = [atom for atom in range(problem.atoms.count) if not problem.atoms.bound[atom]]
    used = sum(len(on) for _, on in cut)
    spare = min(problem.device_limit - used, problem.stage_limit - len(cut))
    cut, room = _grow(problem, [*cut, *(((), (used + i,)) for i in range(spare))], free)
    state = _State.of(problem, stages_of(problem, cut))
    for _ in range(_MOST_PASSES):
        moved = False
        for atom in free:
            source, size = state.stage_of[atom], room.sizes[atom]
            others = [s for s in range(len(cut)) if s != source and room.left[s] >= size]
            best = min((state.look(atom, s, max(state.loads)) for s in others), key=lambda m: m.worse, default=None)
            if best is not None and best.worse < 0:
                state.make(best)
                room.left[source] += size
                room.left[best.target] -= size
                moved = True
        if not moved:
            break
    return state.cut()


class _Room(NamedTuple):
    """Bytes of every atom, about, and what every stage has left."""

    sizes: list[float]
    left: list[float]


def _grow(problem: PartitionProblem, cut: Cut, free: Sequence[int]) -> tuple[Cut, _Room]:
    """The stages with the free atoms on them, those that stay empty left out, and the room that is left."""
    atoms, limits = problem.atoms, memory_limits(problem)
    sizes = atom_bytes(problem)
    grown = [list(members) for members, _ in cut]
    left = [
        min(limits[device] for device in on) - sum(sizes[a] for a in members)
        for members, (_, on) in zip(grown, cut, strict=True)
    ]
    stage_of = {atom: index for index, members in enumerate(grown) for atom in members}
    beside, wanted = 0, {}
    for atom in place_free(atoms, [*stage_of, *free]):
        beside = wanted[atom] = stage_of.get(atom, beside)
    for atom in sorted(free, key=lambda a: (-sizes[a], a)):
        stage = wanted[atom]
        if left[stage] < sizes[atom]:
            stage = max(range(len(grown)), key=lambda s: (left[s], -s))
        grown[stage].append(atom)
        left[stage] -= sizes[atom]
    filled = [index for index, members in enumerate(grown) if members]
    return [(sorted(grown[i]), cut[i][1]) for i in filled], _Room(sizes, [left[i] for i in filled])


class _Move(NamedTuple):
    """A move, what it makes of the terms and loads of its two stages, and how much worse that is."""

    atom: int
    source: int
    target: int
    terms: tuple[tuple[float, float, float], tuple[float, float, float]]
    loads: tuple[float, float]
    worse: float


@dataclass
class _State:
    """Where every atom is, and what that makes of every stage."""

    problem: PartitionProblem
    devices: tuple[tuple[int, ...], ...]
    stage_of: list[int]
    sizes: list[int]
    compute: list[float]
    parameters: list[float]
    transfers: NetTransfers
    loads: list[float]

    @classmethod
    def of(cls, problem: PartitionProblem, stages: Sequence[Stage]) -> _State:
        place = {name: index for index, stage in enumerate(stages) for name in stage.layers}
        where = [place[members[0]] for members in problem.atoms.members]
        zeros = [0.0] * len(stages)
        devices = tuple(stage.devices for stage in stages)
        transfers = NetTransfers.of(problem, where, len(stages))
        state = cls(problem, devices, where, [0] * len(stages), zeros[:], zeros[:], transfers, zeros[:])
        for atom, stage in enumerate(where):
            state.sizes[stage] += 1
            state.compute[stage] += state.seconds[stage][atom]
            state.parameters[stage] += float(problem.atoms.parameter_bytes[atom])
        state.loads = [
            state.load(s, *terms)
            for s, terms in enumerate(zip(state.compute, transfers.seconds, state.parameters, strict=True))
        ]
        return state

    @cached_property
    def seconds(self) -> list[list[float]]:
        """Of every atom on the slowest device of every stage."""
        devices = [[self.problem.cluster.devices[d] for d in group] for group in self.devices]
        layers = self.problem.atoms.layers
        return [[max(compute_seconds(group, d) for d in of_stage) for group in layers] for of_stage in devices]

    @cached_property
    def _reduction(self) -> list[tuple[float, float]]:
        """Seconds per byte of parameters, and for any at all, of every stage."""
        problem, result = self.problem, []
        for group in self.devices:
            bandwidth, latency = problem.cluster.link(group[0], group[1]) if len(group) > 1 else (math.inf, 0.0)
            volume, rounds = reduction_volume(len(group), problem.reduction)
            times = problem.reductions(len(group))
            result.append((times * volume / bandwidth, times * rounds * latency))
        return result

    def load(self, stage: int, compute: float, transfers: float, parameters: float) -> float:
        each, once = self._reduction[stage]
        both = compute + transfers if self.problem.transfers == "added" else max(compute, transfers)
        reduced = each * parameters + (once if parameters > 0 else 0.0)
        return self.problem.share(len(self.devices[stage])) * both + reduced

    def step(self, draw: random.Random, guide: float, heat: float) -> tuple[float, float] | None:
        """Draws a move and makes it or not; the loads of its two stages if it was made."""
        atoms = self.problem.atoms
        atom = draw.randrange(atoms.count)
        source = self.stage_of[atom]
        low = max((self.stage_of[b] for b in atoms.predecessors[atom]), default=0)
        high = min((self.stage_of[b] for b in atoms.successors[atom]), default=len(self.sizes) - 1)
        target = draw.randint(max(low, source - 2), min(high, source + 2))
        if target == source or self.sizes[source] == 1:
            return None
        if len(self.devices[target]) > 1 and not atoms.replicable[atom]:
            return None
        move = self.look(atom, target, guide)
        if move.worse > 0 and draw.random() >= math.exp(-move.worse / heat):
            return None
        self.make(move)
        return move.loads

    def look(self, atom: int, target: int, guide: float) -> _Move:
        """What a move would make of its two stages; no other changes."""
        source = self.stage_of[atom]
        left, joined = self.transfers.after(atom, source, target)
        amount = float(self.problem.atoms.parameter_bytes[atom])
        terms = (
            (self.compute[source] - self.seconds[source][atom], left, self.parameters[source] - amount),
            (self.compute[target] + self.seconds[target][atom], joined, self.parameters[target] + amount),
        )
        loads = self.load(source, *terms[0]), self.load(target, *terms[1])
        before = self.loads[source], self.loads[target]
        worse = sum((x / guide) ** _POWER for x in loads) - sum((x / guide) ** _POWER for x in before)
        return _Move(atom, source, target, terms, loads, worse)

    def make(self, move: _Move) -> None:
        for stage, terms, load in zip((move.source, move.target), move.terms, move.loads, strict=True):
            self.compute[stage], _, self.parameters[stage] = terms
            self.loads[stage] = load
        (_, left, _), (_, joined, _) = move.terms
        self.transfers.move(move.atom, move.source, move.target, (left, joined))
        self.stage_of[move.atom] = move.target
        self.sizes[move.source] -= 1
        self.sizes[move.target] += 1

    def cut(self) -> Cut:
        cut: list[list[int]] = [[] for _ in self.devices]
        for atom, stage in enumerate(self.stage_of):
            cut[stage].append(atom)
        return list(zip(cut, self.devices, strict=True))

    def stages(self) -> tuple[Stage, ...]:
        return stages_of(self.problem, self.cut())
