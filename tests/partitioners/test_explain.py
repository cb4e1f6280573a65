"""What an explanation says of small partitions, and that it never contradicts the optimum."""

from __future__ import annotations

import pytest
from hypothesis import given, settings

from pipeflow.errors import Infeasible
from pipeflow.graphs.costs import GraphCosts, LayerCosts, TensorCosts
from pipeflow.partitioners import PARTITIONERS
from pipeflow.partitioners.cluster import Cluster
from pipeflow.partitioners.explain import explain
from pipeflow.partitioners.problem import PartitionProblem
from pipeflow.testing.drawn_problems import costs, problems

LINE = GraphCosts(
    inputs=(TensorCosts(name="x"),),
    layers=tuple(
        LayerCosts(name=n, inputs=(i,), outputs=(TensorCosts(name=n, bytes=10, gradient_bytes=5),), forward_seconds=s)
        for n, i, s in (("a", "x", 1.0), ("b", "a", 2.0), ("c", "b", 4.0), ("d", "c", 4.0))
    ),
)


def test_a_line_on_two_devices() -> None:
    problem = PartitionProblem(costs=LINE, cluster=Cluster.uniform(2, bandwidth=100.0), max_replicas=1)
    story = explain(problem, PARTITIONERS["chain"](problem), partitioner=PARTITIONERS["chain"])
    (cut,) = story.cuts
    assert story.seconds == pytest.approx(7.15)  # abc | d
    assert story.bottleneck == 0
    assert (cut.tensors, cut.bytes) == (("c",), 15)
    assert cut.earlier is not None
    assert cut.earlier.layers == ("c",)
    assert cut.earlier.seconds == pytest.approx(8.15)
    assert cut.later is None  # d is all that its stage has
    assert cut.seconds == pytest.approx(0.15)
    assert {richer.what: richer.seconds for richer in story.richer} == {
        "the same devices": pytest.approx(7.15),
        "one more device": pytest.approx(4.3),
        "links twice as fast": pytest.approx(7.075),
    }


@given(problem=problems(graphs=costs(max_layers=5)))
@settings(max_examples=30)
def test_no_shift_of_an_optimum_helps(problem: PartitionProblem) -> None:
    try:
        best = PARTITIONERS["exhaustive"](problem)
    except Infeasible:
        return
    story = explain(problem, best)
    assert story.seconds == best.certificate.objective
    assert story.terms[story.bottleneck].seconds == pytest.approx(story.seconds)
    for cut in story.cuts:
        for shift in (cut.earlier, cut.later):
            assert shift is None or shift.seconds >= story.seconds * (1 - 1e-9)
