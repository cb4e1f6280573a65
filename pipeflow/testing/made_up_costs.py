"""Costs of a layer graph without measuring it: what has to fit is right, seconds are made up."""

from __future__ import annotations

from pipeflow.graphs.costs import GraphCosts, LayerCosts, TensorCosts
from pipeflow.graphs.layer_graph import LayerGraph
from pipeflow.graphs.phase import phase_costs


def unit_costs(graph: LayerGraph, *, samples: int = 1, seconds: float = 1e-3) -> GraphCosts:
    """Costs in which every layer takes the same time each for forward and the halves of backward.

    Args:
        graph: the layer graph; names, edges, bytes and what can be replicated are its own.
        samples: of one micro-batch.
        seconds: of every layer's forward.
    """

    def tensor(name: str) -> TensorCosts:
        size = graph.specs[name].bytes_at(samples, graph.example_lengths)
        return TensorCosts(name=name, bytes=size, gradient_bytes=size if name in graph.differentiable else 0)

    return GraphCosts(
        name=graph.name,
        samples=samples,
        device="none: every layer takes the same",
        inputs=tuple(tensor(name) for name in graph.inputs),
        layers=tuple(
            LayerCosts(
                name=name,
                kind=layer.kind,
                inputs=layer.inputs,
                outputs=tuple(tensor(t) for t in layer.outputs),
                forward_seconds=seconds,
                backward_input_seconds=seconds if layer.has_backward else 0.0,
                backward_weight_seconds=seconds if layer.has_backward and graph.parameter_bytes[name] else 0.0,
                parameter_bytes=graph.parameter_bytes[name],
                saved_bytes=sum(graph.specs[t].bytes_at(samples, graph.example_lengths) for t in layer.outputs),
                has_backward=layer.has_backward,
                replicable=layer.is_replicable,
                statistics_bytes=graph.statistics_bytes[name],
            )
            for name, layer in graph.layers.items()
        ),
        colocated=graph.colocated,
        phases=phase_costs(graph),
        shared=graph.shared,
    )
