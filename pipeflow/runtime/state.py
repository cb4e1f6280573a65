"""Names of the model's state and of what an output depends on. Knows the graph, not the plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from pipeflow.errors import CheckpointError, EngineError
from pipeflow.graphs.layer_graph import LayerGraph
from pipeflow.graphs.tensor_spec import TensorSpec


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


def check_state(graph: LayerGraph, state: Mapping[str, Tensor], stored: Callable[[TensorSpec], torch.dtype]) -> None:
    """Refuses a state that is not the whole model's, before anything is copied: all ranks find the same.

    Args:
        state: new values by name.
        stored: the dtype in which a parameter or buffer is held.

    Raises:
        CheckpointError: a name is missing or unknown, or a shape or dtype differs.
    """
    specs = {**graph.parameters, **graph.buffers}
    if unknown := sorted(state.keys() - specs.keys()):
        raise CheckpointError(
            f"state has {unknown[0]!r}, which the model has not ({len(unknown)} such); is it another model's?"
        )
    if missing := sorted(specs.keys() - state.keys()):
        raise CheckpointError(f"state lacks {missing[0]!r} ({len(missing)} such); is it another model's?")
    for name, spec in specs.items():
        value, shape, dtype = state[name], spec.shape_at(1), stored(spec)
        if not isinstance(value, Tensor) or value.is_meta:
            what = "tensor without data" if isinstance(value, Tensor) else type(value).__name__
            raise CheckpointError(f"state has {name!r} as a {what}; give a tensor, {dtype} of {shape}")
        if tuple(value.shape) != shape or value.dtype != dtype:
            raise CheckpointError(
                f"state has {name!r} as {value.dtype} of {tuple(value.shape)}; the model has {dtype} of {shape}"
            )


@torch.no_grad()
def copy_into(tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Copies `state` into `tensors`, some of the model's, which have been found to fit.

    Args:
        tensors: to be changed, by name.
        state: new values.
    """
    for name, tensor in tensors.items():
        tensor.copy_(state[name])
