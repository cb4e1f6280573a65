"""Plans by the time of an iteration: where that differs from the bottleneck, and never to the worse."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pipeflow as pf
from pipeflow.errors import Infeasible, PlanError
from pipeflow.execution_plan import Plan
from pipeflow.graphs.costs import GraphCosts, LayerCosts, TensorCosts
from pipeflow.iteration_search import shorten
from pipeflow.partitioners.certify import certified
from pipeflow.partitioners.cluster import Cluster
from pipeflow.partitioners.neighbours import neighbours
from pipeflow.partitioners.problem import PartitionProblem
from pipeflow.simulator import simulate
from pipeflow.testing.drawn_plans import learnable_costs
from pipeflow.testing.drawn_problems import clusters, problems
from pipeflow.testing.partitions import check_partition
from pipeflow.verifier import verify
from tests.partitioners.test_laws import attempt


def line(*seconds: float, out: tuple[int, ...] | int = 0) -> GraphCosts:
    outs = out if isinstance(out, tuple) else (out,) * len(seconds)
    return GraphCosts(
        name="line",
        inputs=(TensorCosts(name="x"),),
        layers=tuple(
            LayerCosts(
                name=f"l{i}",
                inputs=(f"l{i - 1}" if i else "x",),
                outputs=(TensorCosts(name=f"l{i}", bytes=outs[i], gradient_bytes=outs[i]),),
                forward_seconds=s / 3,
                backward_input_seconds=s / 3,
                backward_weight_seconds=s / 3,
                parameter_bytes=8,
            )
            for i, s in enumerate(seconds)
        ),
    )


def test_an_iteration_waits_for_messages_that_the_bottleneck_hardly_counts() -> None:
    """Cut after l0, the busiest device has 17 s per micro-batch; after l1 it has 18, and nothing to send.

    With two micro-batches nobody is busy enough to hide what travels: every message is waited for,
    and the better bottleneck is an iteration that takes a third longer.
    """
    costs = line(15, 3, 12, out=(1000, 0, 0))
    options = {"batch_size": 2, "num_microbatches": 2, "num_stages": 2, "max_replicas": 1, "schedule": "1f1b"}
    busy, short = (
        pf.plan(None, costs, Cluster.uniform(2, bandwidth=1000.0), objective=o, **options)  # type: ignore[arg-type]  # by name
        for o in ("bottleneck", "iteration")
    )
    assert (busy.certificate.objective, short.certificate.objective) == (17.0, 18.0)
    assert [len(stage.layers) for stage in busy.stages] == [1, 2]
    assert [len(stage.layers) for stage in short.stages] == [2, 1]
    assert simulate(short).makespan < 0.9 * simulate(busy).makespan
    assert short.certificate.partitioner.endswith(", shortened")
    verify(short)


@given(learnable_costs(max_layers=5), clusters(max_devices=3), st.integers(1, 6))
@settings(max_examples=30)
def test_never_longer_than_by_the_bottleneck(costs: GraphCosts, cluster: Cluster, batch_size: int) -> None:
    def attempt_plan(objective: str) -> Plan | None:
        try:
            return pf.plan(None, costs, cluster, batch_size=batch_size, objective=objective)  # type: ignore[arg-type]  # drawn
        except Infeasible:
            return None

    slow, short = attempt_plan("bottleneck"), attempt_plan("iteration")
    assert (slow is None) == (short is None)
    if slow is None or short is None:
        return
    verify(short)
    assert Plan.model_validate_json(short.model_dump_json()) == short
    assert simulate(short).makespan <= simulate(slow).makespan * (1 + 1e-8)
    assert short.certificate.lower_bound <= short.certificate.objective * (1 + 1e-9)
    assert attempt_plan("iteration") == short


@given(problem=problems())
@settings(max_examples=100)
def test_neighbours_are_valid_and_none_is_the_partition_itself(problem: PartitionProblem) -> None:
    start = attempt("chain", problem)
    if start is None:
        return
    found = list(neighbours(problem, start.stages))
    assert start.stages not in found
    assert len(set(found)) == len(found)
    for stages in found:
        check_partition(certified(problem, stages, partitioner="near", lower_bound=0.0), problem)


def test_pins_are_kept() -> None:
    pins = pf.Pins(together=(("l0", "l2"),))
    made = pf.plan(
        None,
        line(3, 3, 3, 3, 12),
        Cluster.uniform(3),
        batch_size=2,
        num_microbatches=2,
        max_replicas=1,
        pins=pins,
        objective="iteration",
    )
    assert not pins.broken(made.stages)


def test_another_word_is_refused() -> None:
    with pytest.raises(PlanError, match="objective='speed'; give 'bottleneck' or 'iteration'"):
        pf.plan(None, line(1, 1), Cluster.uniform(2), batch_size=2, objective="speed")  # type: ignore[arg-type]  # that it fails is the test


def test_a_neighbour_that_cannot_be_lowered_is_passed_over() -> None:
    """It once ended the whole search, though the plan to begin with is fine."""
    costs = line(15, 3, 12, out=(1000, 0, 0))
    cluster = Cluster.uniform(2, bandwidth=1000.0)
    plan = pf.plan(None, costs, cluster, batch_size=2, num_microbatches=2, max_replicas=1, schedule="1f1b")
    problem = PartitionProblem(costs=plan.costs, cluster=cluster, num_microbatches=2, max_replicas=1)

    def price(candidate: Plan) -> tuple[float, int, int, int]:
        if len(candidate.stages) != 2:
            raise PlanError("this schedule is for two stages")
        return simulate(candidate).makespan, 2, 2, 0

    assert any(len(stages) != 2 for stages in neighbours(problem, plan.stages))
    found, rank = shorten(plan, price(plan), problem, price)
    assert len(found.stages) == 2
    assert rank < price(plan)
