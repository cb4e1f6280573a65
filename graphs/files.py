"""Graphs as JSON files. Reading one builds only what is allowed and never runs anything else.

Everything that a file names is resolved and checked before the first layer is built.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal

import networkx as nx
from pydantic import Field

from pipeflow.errors import FormatError, GraphError, ShapeError
from pipeflow.graphs.description import (
    Resolver,
    TensorName,
    decode,
    encode_layer,
    encode_lengths,
    encode_phases,
    encode_spec,
    refuse,
)
from pipeflow.graphs.import_path import Role, check_prefixes, resolve
from pipeflow.graphs.layer import Function, Handle, Lazy
from pipeflow.graphs.layer_graph import LayerGraph
from pipeflow.graphs.nesting import Constant, flatten, rebuild
from pipeflow.graphs.sizes import Length
from pipeflow.graphs.tensor_spec import TensorSpec, list_specs
from pipeflow.values import Value, read_value, write_text


class _Spec(Value):
    shape: tuple[int | str, ...]
    dtype: str


class _Loss(Value):
    weight: float = Field(default=1.0, allow_inf_nan=False)
    reduction: Literal["mean", "sum"] = "mean"
    count: str | None = None


class _Layer(Value):
    name: str
    source: dict[str, Any]
    inputs: tuple[str, ...]
    args: list[Any] | None = None
    kwargs: dict[str, Any] = Field(default_factory=dict)
    outputs: dict[str, _Spec]
    loss: _Loss | None = None


_Call = tuple[tuple[Any, ...], dict[str, Any]]


class _Length(Value):
    low: int = 1
    high: int | None = None
    multiple_of: int = 1


class _Phase(Value):
    name: str
    losses: tuple[str, ...]
    trains: tuple[str, ...]


class _Graph(Value):
    format: Literal["pipeflow-graph-1"]
    name: str
    lengths: dict[str, _Length] = Field(default_factory=dict)
    inputs: dict[str, _Spec]
    layers: tuple[_Layer, ...]
    phases: tuple[_Phase, ...] = ()


def save(graph: LayerGraph, path: str | os.PathLike[str]) -> None:
    """Writes the graph; see `LayerGraph.save`."""
    description = {
        "format": "pipeflow-graph-1",
        "name": graph.name,
        **encode_lengths(graph.lengths),
        "inputs": {name: encode_spec(spec) for name, spec in graph.inputs.items()},
        "layers": [encode_layer(layer, graph.specs, refuse) for layer in graph.layers.values()],
        **encode_phases(graph.phases),
    }
    write_text(path, json.dumps(description, indent=1, allow_nan=False) + "\n", error=FormatError)


def load(path: str | os.PathLike[str], allow: Sequence[str]) -> LayerGraph:
    """Reads a graph; see `LayerGraph.load`."""
    check_prefixes(allow)
    name = os.fspath(path)
    file = read_value(_Graph, path, what="a graph", error=FormatError)
    _check_order(file)

    def find(target: str, role: Role) -> Callable[..., Any]:
        return resolve(target, allow, role=role)

    sources: dict[str, Lazy | Function] = {}
    calls: dict[str, _Call] = {}
    for layer in file.layers:
        try:
            sources[layer.name] = _source(layer, find)
            calls[layer.name] = _call(layer, find)
        except FormatError as error:
            raise FormatError(f"{name}, layer {layer.name!r}: {error}") from error
    graph = LayerGraph(file.name)
    lengths = {n: Length(n, limits.low, limits.high, limits.multiple_of) for n, limits in file.lengths.items()}
    for input_name, spec in file.inputs.items():
        graph.input(input_name, [lengths.get(str(dim), dim) for dim in spec.shape], spec.dtype)
    for layer in file.layers:
        _add(graph, layer, sources[layer.name], *calls[layer.name])
    for phase in file.phases:
        graph.phase(phase.name, losses=phase.losses, trains=phase.trains)
    return graph


def _source(layer: _Layer, find: Resolver) -> Lazy | Function:
    source = decode(layer.source, find)
    if isinstance(source, Lazy):
        return source
    if not callable(source):
        raise FormatError("its source is neither {'lazy': ...} nor {'function': ...}")
    return Function(source)


def _call(layer: _Layer, find: Resolver) -> _Call:
    """The arguments of a layer, with `TensorName`s in the place of tensors."""
    kwargs = {key: decode(value, find, tensors=layer.args is not None) for key, value in layer.kwargs.items()}
    if layer.args is None:
        return tuple(map(TensorName, layer.inputs)), kwargs
    args = tuple(decode(value, find, tensors=True) for value in layer.args)
    read, _ = flatten((args, kwargs), _is_name)
    if [t.name for t in read] != list(layer.inputs):
        raise FormatError(f"its arguments read {[t.name for t in read]}, its inputs are {list(layer.inputs)}")
    return args, kwargs


def _is_name(value: object) -> bool:
    return isinstance(value, TensorName)


def _add(
    graph: LayerGraph, layer: _Layer, source: Lazy | Function, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    thing = source.function if isinstance(source, Function) else source
    names, nest = flatten((args, kwargs), _is_name)
    args, kwargs = rebuild(nest, [Handle(t.name, graph.specs[t.name], graph) for t in names])
    args = tuple(Constant(v) if isinstance(v, str) else v for v in args)
    if layer.loss is None:
        graph.add(layer.name, thing, *args, **kwargs)
    else:
        weight, reduction, count = layer.loss.weight, layer.loss.reduction, layer.loss.count
        if "weight" in kwargs or kwargs.get("reduction", reduction) != reduction:
            raise FormatError(f"loss {layer.name!r}: weight and reduction belong under 'loss', not under 'kwargs'")
        others = {k: v for k, v in kwargs.items() if k != "reduction"}
        graph.loss(layer.name, thing, *args, weight=weight, reduction=reduction, count=count, **others)
    said = {n: TensorSpec(s.shape, s.dtype) for n, s in layer.outputs.items()}
    gives = {tensor: graph.specs[tensor] for tensor in graph.layers[layer.name].outputs}
    if {n: (s.shape, s.dtype) for n, s in said.items()} != {n: (s.shape, s.dtype) for n, s in gives.items()}:
        raise ShapeError(
            f"layer {layer.name!r} gives {list_specs(list(gives.values()))}, but the file says "
            f"{list_specs(list(said.values()))}; it was written for another version of the layer"
        )


def _check_order(file: _Graph) -> None:
    """Refuses names that stand twice, tensors that nothing gives, and cycles, before anything is built."""
    producers: dict[str, str] = {}
    for owner, tensors in ((n, [n]) for n in file.inputs):
        producers.update(dict.fromkeys(tensors, owner))
    seen = set(file.inputs)
    for layer in file.layers:
        if layer.name in seen:
            raise GraphError(f"{layer.name!r} names two layers or inputs of graph {file.name!r}; names must be unique")
        seen.add(layer.name)
        producers.update(dict.fromkeys(layer.outputs, layer.name))
    edges: nx.DiGraph[str] = nx.DiGraph()
    for layer in file.layers:
        for tensor in layer.inputs:
            if tensor not in producers:
                raise GraphError(f"layer {layer.name!r} reads {tensor!r}, which no input and no layer gives")
            edges.add_edge(producers[tensor], layer.name)
    if not nx.is_directed_acyclic_graph(edges):
        cycle = [a for a, _ in nx.find_cycle(edges)]
        raise GraphError(f"layers {' -> '.join([*cycle, cycle[0]])} form a cycle; data must flow one way")
    position = {layer.name: i for i, layer in enumerate(file.layers)}
    for layer in file.layers:
        for tensor in layer.inputs:
            if position.get(producers[tensor], -1) >= position[layer.name]:
                raise GraphError(
                    f"layer {layer.name!r} stands before {producers[tensor]!r}, which it reads; list layers in the "
                    "order in which they run"
                )
