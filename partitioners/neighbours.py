"""The partitions one step away from a partition, for searches by other measures than the objective.

A step moves the least that can move over a cut, joins two stages that follow each other, divides a
stage, gives a device that is not used to a stage, or hands a replica from one stage to another. Every
partition that comes out is valid for the problem: in order, within memory, pins and counts kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from pipeflow.partitioners.explain import moved_layers
from pipeflow.partitioners.feasibility import shortfall
from pipeflow.partitioners.partition import Stage
from pipeflow.partitioners.problem import PartitionProblem

_MOST_CUTS = 3
"""A stage is divided at so many places at most: around the middle of its work."""


def neighbours(problem: PartitionProblem, stages: Sequence[Stage]) -> Iterator[tuple[Stage, ...]]:
    """Valid partitions one step away, each once, in an order that depends on the problem alone.

    Args:
        stages: a valid partition with one stage on a device. Those that share layers among devices or
            chose variants of them have no neighbours.
    """
    if any(stage.variants for stage in stages):
        return
    seen = {tuple(stages)}
    for candidate in _steps(problem, tuple(stages)):
        if candidate not in seen and _is_valid(problem, candidate):
            yield candidate
        seen.add(candidate)


def _steps(problem: PartitionProblem, stages: tuple[Stage, ...]) -> Iterator[tuple[Stage, ...]]:
    for index in range(len(stages) - 1):
        for giver, taker in ((index, index + 1), (index + 1, index)):
            for atom in _movable(problem, stages, giver, taker):
                yield moved_layers(problem, stages, problem.atoms.members[atom], giver, taker)
    used = {device for stage in stages for device in stage.devices}
    free = [device for device in range(problem.cluster.num_devices) if device not in used]
    if problem.cluster.is_uniform and not problem.pins.on:
        free = free[:1]
    for index, stage in enumerate(stages):
        for device in free:
            yield _with(stages, index, _on(stage, (*stage.devices, device)))
            yield from _divided(problem, stages, index, stage.devices, (device,))
            yield from _divided(problem, stages, index, (device,), stage.devices)
        for device in stage.devices if stage.num_replicas > 1 else ():
            rest = tuple(d for d in stage.devices if d != device)
            yield _with(stages, index, _on(stage, rest))
            given = _with(stages, index, _on(stage, rest))
            for other, receiver in enumerate(stages):
                if other != index:
                    yield _with(given, other, _on(receiver, (*receiver.devices, device)))
            yield from _divided(problem, stages, index, rest, (device,))
            yield from _divided(problem, stages, index, (device,), rest)
    yield from _joined(problem, stages)


def _movable(problem: PartitionProblem, stages: Sequence[Stage], giver: int, taker: int) -> list[int]:
    """The atoms of a stage that its neighbour can take with the order kept; none if it has but one."""
    atoms = problem.atoms
    stage_of = {name: s for s, stage in enumerate(stages) for name in stage.layers}
    places = [stage_of[names[0]] for names in atoms.members]
    following = atoms.successors if taker > giver else atoms.predecessors
    if places.count(giver) < 2:
        return []
    return [a for a, s in enumerate(places) if s == giver and all(places[b] != giver for b in following[a])]


def _joined(problem: PartitionProblem, stages: tuple[Stage, ...]) -> Iterator[tuple[Stage, ...]]:
    """Two stages that follow each other as one: on the devices of the one, of the other, of both."""
    for index, (a, b) in enumerate(pairwise(stages)):
        both = _sorted(problem, (*a.layers, *b.layers))
        again = _sorted(problem, (*a.recompute, *b.recompute))
        for devices in (a.devices, b.devices, tuple(sorted((*a.devices, *b.devices)))):
            joined = _on(Stage.replicated(both, devices).with_recompute(again), devices)
            yield (*stages[:index], joined, *stages[index + 2 :])


def _divided(
    problem: PartitionProblem, stages: tuple[Stage, ...], index: int, first: Sequence[int], second: Sequence[int]
) -> Iterator[tuple[Stage, ...]]:
    """A stage as two, cut around the middle of its work in the order of the atoms."""
    stage, inside = stages[index], set(stages[index].layers)
    atoms = [a for a, names in enumerate(problem.atoms.members) if names[0] in inside]
    work = [sum(layer.seconds for layer in problem.atoms.layers[a]) for a in atoms]
    half = sum(work) / 2
    cuts = sorted(range(1, len(atoms)), key=lambda cut: (abs(sum(work[:cut]) - half), cut))
    for cut in cuts[:_MOST_CUTS]:
        parts = [
            _sorted(problem, [name for a in part for name in problem.atoms.members[a]])
            for part in (atoms[:cut], atoms[cut:])
        ]
        halves = [
            Stage.replicated(names, tuple(sorted(devices))).with_recompute([n for n in names if n in stage.recompute])
            for names, devices in zip(parts, (first, second), strict=True)
        ]
        yield (*stages[:index], *halves, *stages[index + 1 :])


def _sorted(problem: PartitionProblem, names: Sequence[str]) -> tuple[str, ...]:
    return tuple(sorted(names, key=problem.costs.position_by_layer.__getitem__))


def _on(stage: Stage, devices: Sequence[int]) -> Stage:
    return Stage.replicated(stage.layers, tuple(sorted(devices))).with_recompute(stage.recompute)


def _with(stages: tuple[Stage, ...], index: int, stage: Stage) -> tuple[Stage, ...]:
    return (*stages[:index], stage, *stages[index + 1 :])


def _is_valid(problem: PartitionProblem, stages: Sequence[Stage]) -> bool:
    """Whether counts, replicas, memory and pins are as the problem says; the order is kept by every step."""
    counts = tuple(stage.num_replicas for stage in stages)
    if problem.replicas is not None and counts != problem.replicas:
        return False
    if problem.stage_count not in (None, len(stages)) or len(stages) > (problem.max_stages or len(stages)):
        return False
    if max(counts) > problem.replica_limit or not all(problem.allows(count) for count in counts):
        return False
    layers = problem.costs.layer_by_name
    if any(s.num_replicas > 1 and not all(layers[n].replicable for n in s.layers) for s in stages):
        return False
    return not shortfall(problem, stages)
