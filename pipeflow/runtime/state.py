"""Names of the model's state and of what an output depends on. Knows the graph, not the plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from pipeflow.errors import CheckpointError, EngineError
from pipeflow.graphs.layer_graph import LayerGraph


def needed_layers(graph: LayerGraph, outputs: Iterable[str]) -> frozenset[str]:
    """The layers that the tensors depend on.

    Raises:
        EngineError: a name is no tensor that a layer computes.
    """
    producer = {tensor: layer for layer in graph.layers.values() for tensor in layer.outputs}
    needed: set[str] = set()
    pending = list(outputs)
    for name in pending:
        if name not in producer:
            raise EngineError(f"output {name!r} is computed by no layer; choose among {sorted(producer)}")
    while pending:
        layer = producer.get(pending.pop())
        if layer is not None and layer.name not in needed:
            needed.add(layer.name)
            pending.extend(layer.inputs)
    return frozenset(needed)


def read_inputs(graph: LayerGraph, layers: Iterable[str]) -> frozenset[str]:
    """The graph inputs that the layers read."""
    return frozenset(t for layer in layers for t in graph.layers[layer].inputs if t in graph.inputs)


def required_inputs(graph: LayerGraph, layers: Iterable[str]) -> frozenset[str]:
    """What a batch must have to run the layers: what they read, and what losses are counted by."""
    names = list(layers)
    counts = (graph.layers[layer].count for layer in names)
    return read_inputs(graph, names).union(count for count in counts if count is not None)


def copy_into(tensors: Mapping[str, Tensor], state: Mapping[str, Tensor], all_names: Iterable[str]) -> None:
    """Copies `state` into `tensors`, which are some of the model's.

    Args:
        tensors: to be changed, by name.
        state: new values; must have every name of `all_names` and no other.

    Raises:
        CheckpointError: a name is missing or unknown, or a shape or dtype differs.
    """
    names = set(all_names)
    if unknown := sorted(state.keys() - names):
        raise CheckpointError(
            f"state has {unknown[0]!r}, which the model has not ({len(unknown)} such); is it another model's?"
        )
    if missing := sorted(names - state.keys()):
        raise CheckpointError(f"state lacks {missing[0]!r} ({len(missing)} such); is it another model's?")
    for name, tensor in tensors.items():
        value = state[name]
        if value.shape != tensor.shape or value.dtype != tensor.dtype:
            raise CheckpointError(
                f"state has {name!r} as {value.dtype} of {tuple(value.shape)}; the model has {tensor.dtype} of "
                f"{tuple(tensor.shape)}"
            )
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(state[name])
