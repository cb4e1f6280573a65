"""What follows from how layers are joined: order, sharing, where gradients flow, what is wrong.

Works on names and specs alone; knows neither modules nor torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

import networkx as nx

from pipeflow.errors import GraphError
from pipeflow.graphs.layer import Layer
from pipeflow.graphs.sizes import size_of
from pipeflow.graphs.tensor_spec import TensorSpec


def differentiable(layers: Iterable[Layer], specs: Mapping[str, TensorSpec]) -> frozenset[str]:
    """The tensors that carry a gradient in training: autograd records them and a loss needs them.

    Args:
        layers: in a topological order.
        specs: of every tensor.
    """
    result: set[str] = set()
    for layer in reversed(list(layers)):
        if layer.is_loss:
            result.update(t for t in layer.outputs if specs[t].requires_grad)
        if not result.isdisjoint(layer.outputs):
            result.update(t for t in layer.inputs if specs[t].requires_grad)
    return frozenset(result)


def colocated(
    shared: Sequence[Sequence[str]], layer_by_tensor: Mapping[str, str], order: Sequence[str]
) -> tuple[tuple[str, ...], ...]:
    """Groups of layers that share parameters or buffers, directly or through one another.

    Args:
        shared: groups of names that are one tensor.
        layer_by_tensor: the layer that each of those names belongs to.
        order: of the layers.
    """
    graph: nx.Graph[str] = nx.Graph()
    for group in shared:
        owners = list(dict.fromkeys(layer_by_tensor[name] for name in group))
        graph.add_edges_from(pairwise(owners))
    position = {name: i for i, name in enumerate(order)}
    groups = [tuple(sorted(component, key=position.__getitem__)) for component in nx.connected_components(graph)]
    return tuple(sorted(groups, key=lambda group: position[group[0]]))


def default_outputs(layers: Sequence[Layer], specs: Mapping[str, TensorSpec]) -> tuple[str, ...]:
    """What the graph predicts: tensors of non-loss layers that feed a loss or that nobody reads.

    Only those whose first dimension is the batch, since predictions of micro-batches are joined there;
    or a length, where batches cannot be cut and predictions are not joined.
    """
    computed = frozenset(t for layer in layers for t in layer.outputs)
    cut = all(specs[t].shape[:1] == ("B",) for layer in layers for t in layer.inputs if t not in computed)
    read = {t for layer in layers for t in layer.inputs}
    feed_loss = {t for layer in layers if layer.is_loss for t in layer.inputs}
    return tuple(
        t
        for layer in layers
        if not layer.is_loss
        for t in layer.outputs
        if (t in feed_loss or t not in read) and _is_output(specs[t], cut=cut)
    )


def _is_output(spec: TensorSpec, *, cut: bool) -> bool:
    return spec.shape[:1] == ("B",) or (not cut and bool(spec.shape) and bool(size_of(spec.shape[0]).terms))


def joined(
    graph_name: str, inputs: Mapping[str, TensorSpec], layers: Sequence[Layer], specs: Mapping[str, TensorSpec]
) -> nx.DiGraph[str]:
    """Inputs and layers as nodes, tensors as edges. Frozen.

    Nodes have `kind` ("input" or "layer") and, if a layer, `layer`; edges have `tensors`, a mapping
    from the names of the tensors that go that way to their specs.
    """
    graph: nx.DiGraph[str] = nx.DiGraph(name=graph_name)
    producer: dict[str, str] = {}
    for name in inputs:
        graph.add_node(name, kind="input")
        producer[name] = name
    for layer in layers:
        graph.add_node(layer.name, kind="layer", layer=layer)
        producer.update(dict.fromkeys(layer.outputs, layer.name))
        for tensor in dict.fromkeys(layer.inputs):
            source = producer[tensor]
            if not graph.has_edge(source, layer.name):
                graph.add_edge(source, layer.name, tensors={})
            graph.edges[source, layer.name]["tensors"][tensor] = specs[tensor]
    nx.freeze(graph)
    return graph


def check(
    graph_name: str, inputs: Mapping[str, TensorSpec], layers: Sequence[Layer], specs: Mapping[str, TensorSpec]
) -> None:
    """Refuses what cannot be a model.

    Raises:
        GraphError: no layer, an input that nobody reads, or a loss that no trainable parameter reaches.
    """
    if not layers:
        raise GraphError(f"graph {graph_name!r} has no layers; add at least one")
    read = {t for layer in layers for t in (*layer.inputs, layer.count)}
    if not any(spec.scales for spec in inputs.values()):
        raise GraphError(
            f'no input of graph {graph_name!r} has the batch as its first size, "B"; one must, since losses are means '
            "over samples: the label of each example, for example"
        )
    if unused := [name for name in inputs if name not in read]:
        raise GraphError(f"input {unused[0]!r} is read by no layer; use it or leave it out")
    for layer in layers:
        if layer.is_loss and not specs[layer.outputs[0]].requires_grad:
            raise GraphError(
                f"loss {layer.name!r} is reached by no trainable parameter, so training cannot make it smaller; "
                "let it read a layer that has some, or add it as a layer that is no loss"
            )
