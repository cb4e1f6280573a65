"""The ideals as rows: the order of their work is one of inclusion, however sums round."""

from __future__ import annotations

import random

from pipeflow.graphs.costs import GraphCosts, LayerCosts, TensorCosts
from pipeflow.partitioners.cluster import Cluster
from pipeflow.partitioners.lattice import Lattice, enumerate_ideals
from pipeflow.partitioners.problem import PartitionProblem


def test_layers_without_work_do_not_let_a_subset_stand_behind_its_superset() -> None:
    """The whole graph once stood before itself less a free layer: the two sums had rounded differently."""
    draw = random.Random(4)
    seconds = [0.0 if i >= 45 else draw.random() for i in range(51)]
    costs = GraphCosts(
        layers=tuple(
            LayerCosts(
                name=f"n{i}",
                inputs=(f"n{i - 2}",) if i > 1 else (),
                outputs=(TensorCosts(name=f"n{i}", bytes=8),),
                forward_seconds=s,
            )
            for i, s in enumerate(seconds)
        )
    )
    problem = PartitionProblem(costs=costs, cluster=Cluster.uniform(3), max_replicas=1)
    masks = enumerate_ideals(problem, 1000)
    assert masks is not None
    lattice = Lattice(problem, masks)
    assert lattice.sorted_masks[-1] == 2**51 - 1
    for row in range(0, len(masks), 50):
        mask = lattice.sorted_masks[row]
        assert all(later & mask != later for later in lattice.sorted_masks[row + 1 :])
