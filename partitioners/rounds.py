"""Stages that go round the devices several times: how their slots become stages, and annealed moves between slots.

With K devices and c chunks there are c K slots in a row; slot s is on device s mod K, as interleaved
schedules place stages, and slots may stay empty. An atom may go to any slot between the last that holds
one of its predecessors and the first that holds one of its successors. As in `pipeflow.partitioners.moves`
the sum over devices of (load / bottleneck) ** 8 is made small, but a load is a device's: a tensor counts
once for each device that it touches. Loads are a guide; what they take for the best is priced by the
objective, checked against memory and pins, and only then kept. Draws and their number are fixed.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from pipeflow.partitioners.certify import stages_of
from pipeflow.partitioners.feasibility import atom_bytes, memory_limits, shortfall
from pipeflow.partitioners.net_transfers import NetTransfers
from pipeflow.partitioners.objective import compute_seconds, objective
from pipeflow.partitioners.partition import Stage
from pipeflow.partitioners.problem import PartitionProblem

_POWER = 8
_HOT, _COLD = (0.3, 3.0, 10.0, 1.0), 0.003
"""Temperatures at the start, one after the other, and at the end, in units of what is made small."""

_MOVES_PER_ATOM, _MOST_MOVES = 400, 100_000

_PRICED = 48
"""How often a search prices the best so far by the objective."""


def stages_in_rounds(problem: PartitionProblem, slot_of: Sequence[int]) -> tuple[Stage, ...]:
    """The stages that the slots of all atoms mean: empty ones left out, neighbours on one device joined."""
    count = problem.cluster.num_devices
    members: dict[int, list[int]] = {}
    for atom, slot in enumerate(slot_of):
        members.setdefault(slot, []).append(atom)
    cut: list[tuple[list[int], tuple[int]]] = []
    for slot in sorted(members):
        atoms, device = members[slot], slot % count
        if cut and cut[-1][1] == (device,) and problem.pinned.allows([*cut[-1][0], *atoms]):
            cut[-1] = ([*cut[-1][0], *atoms], (device,))
        else:
            cut.append((atoms, (device,)))
    return stages_of(problem, cut)


def slots_of(problem: PartitionProblem, stages: Sequence[Stage]) -> list[int]:
    """The first slots that the stages can be in, as they go round their devices."""
    count, slots = problem.cluster.num_devices, [-1]
    for stage in stages:
        ahead = (stage.devices[0] - slots[-1] - 1) % count
        slots.append(slots[-1] + 1 + ahead)
    return slots[1:]


def improve(
    problem: PartitionProblem, start: Sequence[Stage] | None, bound: float, *, seed: int = 0
) -> tuple[tuple[Stage, ...] | None, float]:
    """A partition with one replica a stage, at least as good as `start`, and `bound`, which it never raises.

    Args:
        problem: in which stages go round the devices, on whichever of them.
        start: a partition of it with one stage on a device; None where there is none.
        bound: what is proven already.
    """
    best = None if start is None else tuple(start)
    reach = math.inf if start is None else objective(problem, start)
    for turn, (hot, slots) in enumerate(itertools.product(_HOT, _beginnings(problem, start))):
        if reach * (1 - 1e-9) <= bound:
            break
        for candidate in _annealed(problem, slots, random.Random(seed + turn), hot):
            found = stages_in_rounds(problem, candidate)
            seconds = objective(problem, found)
            if seconds < reach * (1 - 1e-9) and not shortfall(problem, found):
                best, reach = found, seconds
    return best, bound


def _beginnings(problem: PartitionProblem, start: Sequence[Stage] | None) -> Iterator[list[int]]:
    """Slots to begin with: contiguous stages, all in one round or the later half in the next; else an even share."""
    count, atoms = problem.cluster.num_devices, problem.atoms
    slots = count * problem.chunks
    yield [a * slots // atoms.count for a in range(atoms.count)]
    if start is None or any(stage.num_replicas > 1 for stage in start):
        return
    index = {name: s for s, stage in enumerate(start) for name in stage.layers}
    places = [index[names[0]] for names in atoms.members]
    yield places
    half = (len(start) + 1) // 2
    yield [place + (count if place >= half else 0) for place in places]


def _annealed(problem: PartitionProblem, slots: list[int], draw: random.Random, hot: float) -> Iterator[list[int]]:
    """The best slots so far by the guide, every now and then, where they are better than the last."""
    state = _State(problem, slots)
    guide = max(state.loads)
    if guide == 0.0:
        return
    best, is_new = None, False
    steps = min(_MOST_MOVES, _MOVES_PER_ATOM * len(slots))
    pause = max(1, steps // _PRICED)
    for step in range(steps):
        moved = state.step(draw, guide, hot * (_COLD / hot) ** (step / steps))
        if moved and max(state.loads) < guide * (1 - 1e-9):
            guide, best, is_new = max(state.loads), state.slot_of[:], True
        if is_new and best is not None and step % pause == pause - 1:
            yield best
            is_new = False
    if is_new and best is not None:
        yield best


@dataclass
class _State:
    """The slot of every atom, and what that makes of every device."""

    problem: PartitionProblem
    slot_of: list[int]
    loads: list[float] = field(init=False)

    def __post_init__(self) -> None:
        problem, atoms = self.problem, self.problem.atoms
        devices = problem.cluster.devices
        self.slot_of = list(self.slot_of)
        self.num_devices, self.num_slots = len(devices), len(devices) * problem.chunks
        alike = problem.cluster.is_uniform
        rows = [[compute_seconds(group, d) for group in atoms.layers] for d in (devices[:1] if alike else devices)]
        self.seconds = rows * len(devices) if alike else rows
        self.limits = memory_limits(problem)
        self.sizes = atom_bytes(problem)
        self.compute, self.bytes = ([0.0] * self.num_devices for _ in range(2))
        device_of = [slot % self.num_devices for slot in self.slot_of]
        for atom, device in enumerate(device_of):
            self.compute[device] += self.seconds[device][atom]
            self.bytes[device] += self.sizes[atom]
        self.transfers = NetTransfers.of(problem, device_of, self.num_devices)
        self.loads = [self._load(c, t) for c, t in zip(self.compute, self.transfers.seconds, strict=True)]

    def _load(self, compute: float, transfers: float) -> float:
        return max(compute, transfers) if self.problem.transfers == "overlapped" else compute + transfers

    def step(self, draw: random.Random, guide: float, heat: float) -> bool:
        """Draws a move and makes it or not; whether it was made."""
        atoms = self.problem.atoms
        atom = draw.randrange(atoms.count)
        slot = self.slot_of[atom]
        low = max((self.slot_of[b] for b in atoms.predecessors[atom]), default=0)
        high = min((self.slot_of[b] for b in atoms.successors[atom]), default=self.num_slots - 1)
        target = draw.randint(low, high)
        source, device = slot % self.num_devices, target % self.num_devices
        if source == device:
            self.slot_of[atom] = target
            return False
        if self.bytes[device] + self.sizes[atom] > self.limits[device] and self.bytes[source] <= self.limits[source]:
            return False
        left, joined = self.transfers.after(atom, source, device)
        terms = {
            source: (self.compute[source] - self.seconds[source][atom], left),
            device: (self.compute[device] + self.seconds[device][atom], joined),
        }
        loads = {d: self._load(*pair) for d, pair in terms.items()}
        worse = sum((loads[d] / guide) ** _POWER - (self.loads[d] / guide) ** _POWER for d in loads)
        if worse > 0 and draw.random() >= math.exp(-worse / heat):
            return False
        for d, (compute, _) in terms.items():
            self.compute[d], self.loads[d] = compute, loads[d]
        self.transfers.move(atom, source, device, (left, joined))
        self.slot_of[atom] = target
        self.bytes[source] -= self.sizes[atom]
        self.bytes[device] += self.sizes[atom]
        return True
