"""Stages on devices: never worse than they came, the best of all where there are few, heavy edges on fast links."""

from __future__ import annotations

from itertools import permutations
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeflow.errors import Infeasible
from pipeflow.graphs.costs import GraphCosts, LayerCosts, TensorCosts
from pipeflow.partitioners import PARTITIONERS, placement
from pipeflow.partitioners.certify import certified
from pipeflow.partitioners.cluster import Cluster, Device, Level
from pipeflow.partitioners.device_orders import best_of_device_orders, reordered
from pipeflow.partitioners.feasibility import shortfall
from pipeflow.partitioners.objective import objective
from pipeflow.partitioners.partition import Stage
from pipeflow.partitioners.placement import place
from pipeflow.partitioners.problem import PartitionProblem
from pipeflow.testing.drawn_problems import clusters, problems
from pipeflow.testing.partitions import check_partition

ROUNDING = 1e-9


def some_cut(problem: PartitionProblem) -> tuple[Stage, ...] | None:
    try:
        return PARTITIONERS["chain"](problem).stages
    except Infeasible:
        return None


def every_placement(problem: PartitionProblem, stages: tuple[Stage, ...]) -> float:
    """The least objective of the stages on any devices, by trying all of them."""
    best = objective(problem, stages)
    sizes = [stage.num_replicas for stage in stages]
    for devices in permutations(range(problem.cluster.num_devices), sum(sizes)):
        groups = [devices[sum(sizes[:i]) : sum(sizes[: i + 1])] for i in range(len(sizes))]
        moved = tuple(Stage.replicated(s.layers, tuple(sorted(g))) for s, g in zip(stages, groups, strict=True))
        if not shortfall(problem, moved):
            best = min(best, objective(problem, moved))
    return best


@given(problem=problems(cluster=clusters(min_devices=2, max_devices=4, is_uniform=False)))
@settings(max_examples=120)
def test_few_placements_are_all_tried(problem: PartitionProblem) -> None:
    stages = some_cut(problem)
    if stages is None:
        return
    placed = place(problem, stages)
    assert [s.layers for s in placed] == [s.layers for s in stages]
    assert objective(problem, placed) == pytest.approx(every_placement(problem, stages), rel=ROUNDING)
    check_partition(certified(problem, placed, partitioner="placed", lower_bound=0.0), problem)


@given(problem=problems(cluster=clusters(min_devices=3, max_devices=5, is_uniform=False)))
@settings(max_examples=120)
def test_exchanges_never_make_it_worse_and_keep_pins_and_memory(problem: PartitionProblem) -> None:
    stages = some_cut(problem)
    if stages is None:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placement, "MOST_TRIED", 0)
        placed = place(problem, stages)
        assert place(problem, placed) == placed
    assert objective(problem, placed) <= objective(problem, stages)
    check_partition(certified(problem, placed, partitioner="placed", lower_bound=0.0), problem)


def pairs(num_pairs: int) -> PartitionProblem:
    """A chain of pairs of stages with much between the two of a pair; fast links join like pairs of devices."""
    count = 2 * num_pairs
    layers = tuple(
        LayerCosts(
            name=f"l{i}",
            inputs=(f"l{i - 1}" if i else "x",),
            outputs=(TensorCosts(name=f"l{i}", bytes=1000 if i % 2 == 0 else 10),),
            forward_seconds=1.0,
        )
        for i in range(count)
    )
    devices = tuple(Device(name=f"d{i}") for i in range(count))
    levels = (Level(size=2, bandwidth=1e6), Level(size=count, bandwidth=1e3))
    cluster = Cluster(devices=devices, levels=levels)
    return PartitionProblem(costs=GraphCosts(inputs=(TensorCosts(name="x"),), layers=layers), cluster=cluster)


@pytest.mark.parametrize("num_pairs", [2, 16])
def test_heavy_edges_take_the_fast_links(num_pairs: int) -> None:
    """Of 4 devices every placement is tried; of 32 none could be, and exchanges find the same."""
    problem = pairs(num_pairs)
    count = 2 * num_pairs
    # The first half of every pair on the first half of the devices: all that is heavy is slow.
    on = [i // 2 if i % 2 == 0 else num_pairs + i // 2 for i in range(count)]
    apart = tuple(Stage.replicated([f"l{i}"], [on[i]]) for i in range(count))
    placed = place(problem, apart)
    assert objective(problem, apart) == pytest.approx(1.0 + 1.0 + 0.01, rel=0.01)
    assert objective(problem, placed) < 1.03
    assert all(a.devices[0] // 2 == b.devices[0] // 2 for a, b in zip(placed[::2], placed[1::2], strict=True))


@given(problem=problems(cluster=clusters(min_devices=2, max_devices=4, is_uniform=False)), draw=st.randoms())
@settings(max_examples=60)
def test_devices_in_another_order_are_the_same_devices(problem: PartitionProblem, draw: Random) -> None:
    count = problem.cluster.num_devices
    order = draw.sample(range(count), count)
    other = reordered(problem, order)
    stages = some_cut(other)
    if stages is None:
        return
    back = tuple(Stage.replicated(s.layers, tuple(sorted(order[d] for d in s.devices))) for s in stages)
    assert objective(problem, back) == pytest.approx(objective(other, stages), rel=ROUNDING)
    assert not shortfall(problem, back)


@given(problem=problems(cluster=clusters(min_devices=2, max_devices=4, is_uniform=False)))
@settings(max_examples=60)
def test_other_orders_of_the_devices_never_make_it_worse(problem: PartitionProblem) -> None:
    stages = some_cut(problem)
    found = best_of_device_orders(problem, stages, some_cut)
    if found is None:
        assert stages is None
        return
    check_partition(certified(problem, found, partitioner="found", lower_bound=0.0), problem)
    if stages is not None:
        assert objective(problem, found) <= objective(problem, stages)


def test_the_fast_device_may_stand_last() -> None:
    """Nothing is heavy until the end, and the only fast device comes first in the cluster."""
    layers = tuple(
        LayerCosts(
            name=f"l{i}",
            inputs=(f"l{i - 1}" if i else "x",),
            outputs=(TensorCosts(name=f"l{i}"),),
            forward_seconds=16.0 if i == 8 else 1.0,
        )
        for i in range(9)
    )
    devices = (Device(name="fast", speed=8), *(Device(name=f"slow{i}", speed=2) for i in range(3)))
    costs = GraphCosts(inputs=(TensorCosts(name="x"),), layers=layers)
    problem = PartitionProblem(costs=costs, cluster=Cluster(devices=devices), max_replicas=1)
    found = PARTITIONERS["auto"](problem)
    assert found.stages[-1].devices == (0,)
    assert found.certificate.objective == 2.0


def test_the_heavy_stage_gets_the_fast_device() -> None:
    layers = tuple(
        LayerCosts(name=n, inputs=(i,), outputs=(TensorCosts(name=n),), forward_seconds=s)
        for n, i, s in (("a", "x", 1.0), ("b", "a", 8.0), ("c", "b", 1.0))
    )
    cluster = Cluster(devices=(Device(name="fast", speed=4), Device(name="slow"), Device(name="slow too")))
    costs = GraphCosts(inputs=(TensorCosts(name="x"),), layers=layers)
    problem = PartitionProblem(costs=costs, cluster=cluster, max_replicas=1, num_stages=3)
    stages = tuple(Stage.replicated([n], [d]) for d, n in enumerate("abc"))
    assert place(problem, stages)[1].devices == (0,)
    assert PARTITIONERS["orders"](problem).certificate.objective == 2.0
    assert PARTITIONERS["auto"](problem).certificate.objective == 2.0
