"""Every partition of a tiny problem, one by one: the slowest oracle, and the one with least to go wrong.

It puts each layer on each stage and each stage on each set of devices, keeps what `check_stages` lets
pass, and prices it with the one objective. Unlike `pipeflow.partitioners.exhaustive` it knows no atoms,
no ideals and no bounds, and takes what that refuses: several chunks, nested levels, variants.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations, product

from pipeflow.errors import PlanError
from pipeflow.partitioners.objective import objective
from pipeflow.partitioners.partition import Stage, num_turns
from pipeflow.partitioners.problem import PartitionProblem
from pipeflow.testing.partitions import check_cut, check_stages

MOST_LAYERS = 6
MOST_DEVICES = 4


def least_objective(problem: PartitionProblem) -> float | None:
    """The objective of the best partition of a tiny problem; None if it has no partition.

    Raises:
        PlanError: more than 6 layers or 4 devices.
    """
    return min((objective(problem, stages) for stages in every_partition(problem)), default=None)


def every_partition(problem: PartitionProblem) -> Iterator[tuple[Stage, ...]]:
    """All partitions of a tiny problem that keep its rules; of like devices one choice for all.

    Raises:
        PlanError: more than 6 layers or 4 devices.
    """
    layers, devices = len(problem.costs.layers), problem.cluster.num_devices
    if layers > MOST_LAYERS or devices > MOST_DEVICES:
        raise PlanError(
            f"{layers} layers on {devices} devices; every partition is tried of at most {MOST_LAYERS} on "
            f"{MOST_DEVICES}, draw smaller problems"
        )
    for cut in _cuts(problem):
        for places in _places(problem, len(cut)):
            for stages in _ways(problem, cut, places):
                if _is_valid(problem, stages):
                    yield stages


def _cuts(problem: PartitionProblem) -> Iterator[list[tuple[str, ...]]]:
    """The layers of each stage, in an order in which data only flows forward."""
    names = [layer.name for layer in problem.costs.layers]
    for count in range(1, min(len(names), problem.chunks * problem.cluster.num_devices) + 1):
        for stage_of in product(range(count), repeat=len(names)):
            if len(set(stage_of)) < count:
                continue
            cut = [tuple(n for n, s in zip(names, stage_of, strict=True) if s == index) for index in range(count)]
            try:
                check_cut(cut, problem)
            except AssertionError:
                continue
            yield cut


def _places(problem: PartitionProblem, count: int) -> Iterator[Sequence[tuple[int, ...]]]:
    """The devices of each of `count` stages."""
    num_devices = problem.cluster.num_devices
    if problem.chunks == 1 and problem.cluster.is_uniform and not problem.nested and not problem.pins.on:
        for sizes in product(range(1, num_devices + 1), repeat=count):
            if sum(sizes) <= num_devices:
                yield [tuple(range(sum(sizes[:i]), sum(sizes[: i + 1]))) for i in range(count)]
        return
    if problem.chunks == 1:
        for stage_of in product(range(-1, count), repeat=num_devices):
            places = [tuple(d for d in range(num_devices) if stage_of[d] == index) for index in range(count)]
            if all(places):
                yield places
        return
    most = min(num_devices, problem.replica_limit)
    sets = [s for size in range(1, most + 1) for s in combinations(range(num_devices), size)]
    yield from (places for places in product(sets, repeat=count) if num_turns(places) <= problem.chunks)


def _ways(
    problem: PartitionProblem, cut: Sequence[tuple[str, ...]], places: Sequence[tuple[int, ...]]
) -> Iterator[tuple[Stage, ...]]:
    """The stages there, with each way to run each of their layers."""
    if not problem.costs.has_variants:
        yield tuple(Stage.replicated(names, devices) for names, devices in zip(cut, places, strict=True))
        return
    yield from product(*(_stage_ways(problem, names, devices) for names, devices in zip(cut, places, strict=True)))


def _stage_ways(problem: PartitionProblem, names: Sequence[str], devices: Sequence[int]) -> list[Stage]:
    layers = [problem.costs.layer_by_name[name] for name in names]
    result = []
    for degree in (t for t in range(1, len(devices) + 1) if len(devices) % t == 0):
        ways = [[v.name for v in c.variants if v.degree == degree] or [""] * (not c.variants) for c in layers]
        if degree > 1 and not all(c.variants for c in layers):
            continue
        result += [Stage.sharded(names, devices, degree=degree, variants=way) for way in product(*ways)]
    return result


def _is_valid(problem: PartitionProblem, stages: Sequence[Stage]) -> bool:
    try:
        check_stages(stages, problem)
    except (AssertionError, PlanError):  # a PlanError where levels are nested and the stages are not
        return False
    return True
