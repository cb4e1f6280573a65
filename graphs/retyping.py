"""A graph as it is computed in other types than those it was declared with.

Decides nothing but the specs: what passes between layers under autocast, or from parameters that
were cast, is found as it was when the graph was described, by running each layer without data.
"""

from __future__ import annotations

import copy
from dataclasses import replace

from pipeflow.graphs.inference import infer
from pipeflow.graphs.layer_graph import LayerGraph
from pipeflow.graphs.numerics import Numerics


def retyped(graph: LayerGraph, numerics: Numerics) -> LayerGraph:
    """The graph with the specs that its tensors have under `numerics`.

    Layers, parameters and buffers are those of `graph`, in the types it declares.

    Raises:
        ShapeError: a layer does not run in those types.
    """
    if numerics.autocast is None and numerics.parameters is None:
        return graph
    result = copy.copy(graph)
    result._changed()
    result._specs = dict(graph.inputs)
    result._layers = {}
    for name, layer in graph.layers.items():
        inputs = [result._specs[tensor] for tensor in layer.inputs]
        facts = infer(name, layer.source, inputs, layer.template, graph._lengths.trials(inputs), numerics)
        for tensor, spec in zip(layer.outputs, facts.outputs, strict=True):
            result._specs[tensor] = replace(graph.specs[tensor], dtype=spec.dtype)
        result._layers[name] = replace(
            layer, strided_outputs=facts.strided_outputs, strided_gradients=facts.strided_gradients
        )
    assert result.differentiable == graph.differentiable
    return result
