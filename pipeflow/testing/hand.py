"""Small costs and plans made by hand, for examples and tests. Nothing here imports torch."""

from __future__ import annotations

from pipeflow.execution_plan import Plan
from pipeflow.graphs.costs import GraphCosts, LayerCosts, TensorCosts
from pipeflow.partitioners.cluster import Cluster
from pipeflow.partitioners.partition import Certificate, Stage
from pipeflow.program import Placement


def chain_costs(num_layers: int, *, skips: tuple[tuple[int, int], ...] = (), parameter_bytes: int = 1000) -> GraphCosts:
    """Layers l0, l1, ... of 1 s forward and 2 s backward, each reading the one before and its skips."""
    layers = []
    for index in range(num_layers):
        inputs = [f"l{index - 1}" if index else "x", *(f"l{a}" for a, b in skips if b == index)]
        is_last = index == num_layers - 1
        layers.append(
            LayerCosts(
                name=f"l{index}",
                inputs=tuple(inputs),
                outputs=(TensorCosts(name=f"l{index}", bytes=100, gradient_bytes=0 if is_last else 100),),
                forward_seconds=1,
                backward_input_seconds=1.5,
                backward_weight_seconds=0.5,
                parameter_bytes=parameter_bytes,
                saved_bytes=300,
            )
        )
    return GraphCosts(name="chain", inputs=(TensorCosts(name="x", bytes=100),), layers=tuple(layers))


def hand_plan(
    costs: GraphCosts,
    placement: Placement,
    num_microbatches: int,
    *,
    schedule: str = "1f1b",
    cluster: Cluster | None = None,
) -> Plan:
    """The layers cut evenly, in their order, over the stages of a placement."""
    share = len(costs.layers) // len(placement)
    names = [layer.name for layer in costs.layers]
    return Plan(
        costs=costs,
        cluster=cluster or Cluster.uniform(1 + max(rank for ranks in placement for rank in ranks)),
        stages=tuple(
            Stage.replicated(names[s * share : (s + 1) * share if s < len(placement) - 1 else None], ranks)
            for s, ranks in enumerate(placement)
        ),
        certificate=Certificate(partitioner="hand", objective=0, lower_bound=0),
        schedule=schedule,
        num_microbatches=num_microbatches,
        batch_size=num_microbatches,
    )
