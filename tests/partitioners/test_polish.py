"""Stages of a good partition are evened out, and it is never made worse."""

from __future__ import annotations

import random

from hypothesis import given, settings

from pipeflow.errors import Infeasible
from pipeflow.graphs.costs import GraphCosts, LayerCosts, TensorCosts
from pipeflow.partitioners import PARTITIONERS, moves
from pipeflow.partitioners.bounds import lower_bound
from pipeflow.partitioners.certify import certified
from pipeflow.partitioners.cluster import Cluster
from pipeflow.partitioners.objective import objective
from pipeflow.partitioners.problem import PartitionProblem
from pipeflow.testing import check_partition, problems


def three_chains(count: int) -> PartitionProblem:
    """Layers of any length, that hardly wait for each other, on 8 devices."""
    draw, layers = random.Random(0), []
    for index in range(count):
        inputs = (f"n{index - 3}",) if index >= 3 else ()
        outputs = (TensorCosts(name=f"n{index}", bytes=1),)
        layers.append(LayerCosts(name=f"n{index}", inputs=inputs, outputs=outputs, forward_seconds=draw.uniform(1, 30)))
    return PartitionProblem(costs=GraphCosts(layers=tuple(layers)), cluster=Cluster.uniform(8, bandwidth=1e3))


def test_stages_of_as_many_layers_are_evened_out() -> None:
    problem = three_chains(200)
    start = PARTITIONERS["uniform"](problem)
    better, _ = moves.polish(problem, start.stages, 0.0)
    assert better is not None
    least = lower_bound(problem)
    assert objective(problem, better) - least < 0.2 * (start.certificate.objective - least)


@given(problem=problems())
@settings(max_examples=30)
def test_nothing_is_made_worse_or_broken(problem: PartitionProblem) -> None:
    try:
        start = PARTITIONERS["chain"](problem)
    except Infeasible:
        return
    better, bound = moves.polish(problem, start.stages, start.certificate.lower_bound)
    assert better is not None
    assert bound == start.certificate.lower_bound
    assert objective(problem, better) <= start.certificate.objective
    check_partition(certified(problem, better, partitioner="polish", lower_bound=bound), problem)
