"""The objective in numbers that one can check by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipeflow.errors import PlanError
from pipeflow.graphs.costs import GraphCosts, LayerCosts, TensorCosts
from pipeflow.partitioners.cluster import Cluster, Device, Level
from pipeflow.partitioners.objective import device_bytes, objective, stage_terms
from pipeflow.partitioners.partition import Stage
from pipeflow.partitioners.problem import PartitionProblem, Position, one_forward_one_backward, stashed


def layer(name: str, *inputs: str, seconds: float, out: int = 0, gradient: int = 0, **more: object) -> LayerCosts:
    return LayerCosts.model_validate(
        {
            "name": name,
            "inputs": inputs,
            "outputs": (TensorCosts(name=name, bytes=out, gradient_bytes=gradient),),
            "forward_seconds": seconds,
            **more,
        }
    )


# x -> a -> b -> c -> d, and a skip from a to c and to d
GRAPH = GraphCosts(
    inputs=(TensorCosts(name="x", bytes=10**6),),
    layers=(
        layer("a", "x", seconds=1, out=100, gradient=50, parameter_bytes=1000, saved_bytes=10),
        layer("b", "a", seconds=2, out=10),
        layer("c", "b", "a", seconds=4, out=20, has_backward=False),
        layer("d", "c", "a", seconds=8, parameter_bytes=8),
    ),
)
CLUSTER = Cluster.uniform(5, bandwidth=100.0, latency=0.5)
PROBLEM = PartitionProblem(costs=GRAPH, cluster=CLUSTER, num_microbatches=4)


def stages(*parts: tuple[str, tuple[int, ...]]) -> tuple[Stage, ...]:
    return tuple(Stage.replicated(tuple(layers), devices) for layers, devices in parts)


def test_one_stage_pays_for_its_layers_alone() -> None:
    assert objective(PROBLEM, stages(("abcd", (0,)))) == 15.0


def test_a_skip_goes_straight_to_each_stage_that_reads_it() -> None:
    cut = stages(("ab", (0,)), ("c", (1,)), ("d", (2,)))
    first, second, third = stage_terms(PROBLEM, cut)
    # a to c and to d: 0.5 + 1 s each; its gradient back from d alone (c has no backward): 0.5 + 0.5;
    # b to c: 0.5 + 0.1; c to d: 0.5 + 0.2.
    assert first.transfer_seconds == pytest.approx(1.5 + 1.5 + 1.0 + 0.6)
    assert second.transfer_seconds == pytest.approx(1.5 + 0.6 + 0.7)
    assert third.transfer_seconds == pytest.approx(0.7 + 1.5 + 1.0)
    assert objective(PROBLEM, cut) == pytest.approx(8 + 3.2)
    assert objective(replace(PROBLEM, transfers="overlapped"), cut) == pytest.approx(8.0)
    once = stage_terms(replace(PROBLEM, fan_out="tensor"), cut)
    assert once[0].transfer_seconds == pytest.approx(1.5 + 1.0 + 0.6)
    assert once[1:] == (second, third)


def test_relayed_transfers_run_beside_compute_in_both_directions() -> None:
    cut = stages(("a", (0,)), ("b", (1, 2)), ("c", (3,)), ("d", (4,)))
    first, second, third, fourth = stage_terms(replace(PROBLEM, transfers="relayed"), cut)
    # a passes every cut, for c and d; its gradient comes back from d through all of them: 1.5 + 1.0
    passing = [1.5 + 1.0, 1.5 + 1.0 + 0.6, 1.5 + 1.0 + 0.7]
    assert first.transfer_seconds == 0.0  # counted where they arrive
    assert second.transfer_seconds == pytest.approx(max(passing[0], passing[1]))
    assert third.transfer_seconds == pytest.approx(max(passing[1], passing[2]))
    assert fourth.transfer_seconds == pytest.approx(passing[2])
    assert second.seconds == pytest.approx(passing[1] / 2)
    assert third.seconds == 4.0
    free = stage_terms(replace(PROBLEM, transfers="free"), cut)
    assert [t.seconds for t in free] == pytest.approx([1.0, 2 / 2, 4.0, 8.0])


def test_a_server_moves_twice_what_a_ring_does() -> None:
    cut = stages(("abc", (0, 1, 2)), ("d", (3,)))
    first = stage_terms(replace(PROBLEM, reduction="server"), cut)[0]
    assert first.reduce_seconds == pytest.approx(4 * 2 / 3 * 1000 / 100 + 2 * 0.5)


def test_stashes_are_held_for_what_is_in_flight_beyond_a_stage() -> None:
    problem = replace(
        PROBLEM,
        in_flight=stashed,
        weight_versions=stashed,
        gradient_ratio=0.0,
        optimizer_ratio=0.0,
        holds_received=False,
    )
    cut = stages(("a", (0, 1)), ("bc", (2,)), ("d", (3, 4)))
    # 3 replicas after the first stage's 2: 2 micro-batches of 1,000 + 10 bytes; none after the last
    assert device_bytes(cut, stage_terms(problem, cut)) == {0: 2020, 1: 2020, 2: 0, 3: 0, 4: 0}


def test_stages_that_relay_must_be_a_chain() -> None:
    with pytest.raises(PlanError, match="count transfers as 'added'"):
        replace(PROBLEM, transfers="relayed", chunks=2)
    with pytest.raises(PlanError, match="are a chain"):
        replace(PROBLEM, transfers="relayed", unordered=frozenset("d"))


def test_replicas_share_the_micro_batches_and_reduce_once() -> None:
    cut = stages(("abc", (0, 1, 2)), ("d", (3,)))
    first, second = stage_terms(PROBLEM, cut)
    transfers = (0.5 + 0.2) + (0.5 + 1.0) + (0.5 + 0.5)
    reduction = 2 * 2 / 3 * 1000 / 100 + 2 * 2 * 0.5
    assert first.reduce_seconds == pytest.approx(reduction)
    # 4 micro-batches on 3 replicas: the busiest runs 2 of 4
    assert first.seconds == pytest.approx(2 / 4 * (7 + transfers) + reduction / 4)
    assert second.seconds == pytest.approx(8 + transfers)


def test_memory_grows_with_what_is_in_flight() -> None:
    cut = stages(("a", (0,)), ("bcd", (1, 2)))
    first, second = stage_terms(PROBLEM, cut)
    assert (first.parameter_bytes, first.gradient_bytes, first.optimizer_bytes) == (1000, 1000, 2000)
    assert first.in_flight == 3
    assert first.activation_bytes == 3 * 10
    assert second.in_flight == 1
    assert second.activation_bytes == 1 * 100  # received from a, once for all three readers
    assert device_bytes(cut, (first, second)) == {0: 4030, 1: 132, 2: 132}


def test_unlike_devices_and_links() -> None:
    cluster = Cluster(
        devices=(
            Device(name="fast", speed=4, speed_by_kind={"slow-here": 0.5}),
            Device(name="plain"),
            Device(name="far"),
        ),
        levels=(Level(size=2, bandwidth=1000.0), Level(size=4, bandwidth=10.0, latency=1.0)),
    )
    graph = GraphCosts(
        inputs=(TensorCosts(name="x"),),
        layers=(
            layer("a", "x", seconds=4, out=100),
            layer("b", "a", seconds=1, kind="slow-here"),
            layer("c", "b", "a", seconds=2),
        ),
    )
    problem = PartitionProblem(costs=graph, cluster=cluster, num_microbatches=2)
    terms = stage_terms(problem, stages(("ab", (0,)), ("c", (1, 2))))
    assert terms[0].compute_seconds == 4 / 4 + 1 / 0.5
    # two tensors over the slowest link to the replicas of c: b is empty, but pays the latency
    assert terms[0].transfer_seconds == (1 + 10.0) + 1
    assert terms[1].seconds_by_device == ((2 + 12) / 2, (2 + 12) / 2)


@pytest.mark.parametrize(
    ("position", "expected"),
    [
        (Position(1, 4, 8), 4),
        (Position(1, 4, 3), 3),
        (Position(1, 1, 8), 1),
        (Position(2, 5, 8), 3),
        (Position(2, 5, 3), 2),
        (Position(3, 3, 8), 1),
    ],
)
def test_micro_batches_in_flight_under_1f1b(position: Position, expected: int) -> None:
    assert one_forward_one_backward(position) == expected


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_microbatches": 0},
        {"num_stages": 0},
        {"replicas": ()},
        {"replicas": (1, 0)},
        {"replicas": (1, 2), "num_stages": 3},
        {"replicas": (1, 2), "max_replicas": 1},
        {"num_stages": 3, "max_stages": 2},
        {"optimizer_ratio": -1.0},
    ],
)
def test_contradictions_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(PlanError, match=r"must|may|give|are|raise|a number of"):
        PartitionProblem(costs=GRAPH, cluster=CLUSTER, **wrong)  # type: ignore[arg-type]  # drawn by name
