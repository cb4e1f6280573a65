"""What a graph is made of, as JSON: for files, and for the digest by which ranks compare graphs.

A file must be enough to build the graph again, so only recipes, functions with an import path
and plain constants can be written. A digest must only tell graphs apart, the same way in every
process, so it describes the rest by class, shapes and code.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import CellType, EllipsisType, FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pipeflow.errors import FormatError, GraphError
from pipeflow.graphs.import_path import Role, path_of
from pipeflow.graphs.layer import Function, Instance, Layer, Lazy, Source
from pipeflow.graphs.nesting import rebuild
from pipeflow.graphs.sizes import Length
from pipeflow.graphs.tensor_spec import TensorSpec, normalise_dtype

if TYPE_CHECKING:
    from pipeflow.graphs.layer_graph import LayerGraph
    from pipeflow.graphs.phase import Phase

Json = Any
Fallback = Callable[[str, object], Json]
"""Describes what a file cannot hold, or raises; takes where it stands and the thing."""

Resolver = Callable[[str, Role], Callable[..., Any]]
"""Finds what a file names for a role, or raises FormatError."""


@dataclass(frozen=True, slots=True)
class TensorName:
    """A tensor of the graph, among the arguments of a layer."""

    name: str


_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def encode(where: str, value: object, fallback: Fallback) -> Json:
    """A constant as JSON. Lists, numbers, text stand for themselves; the rest is tagged.

    Args:
        where: names the constant in errors.
        value: None, numbers, text, tuples, lists, dicts by text, slices, dtypes, functions, recipes;
            names of tensors.
        fallback: called for anything else.
    """
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else {"float": str(value)}
        case list() if type(value) is list:
            return [encode(where, v, fallback) for v in value]
        case tuple() if isinstance(value, torch.Size) or type(value) is tuple:
            return {"tuple": [encode(where, v, fallback) for v in value]}
        case dict() if type(value) is dict and all(isinstance(k, str) for k in value):
            return {"dict": {k: encode(f"{where}[{k!r}]", v, fallback) for k, v in value.items()}}
        case slice():
            return {"slice": [encode(where, v, fallback) for v in (value.start, value.stop, value.step)]}
        case EllipsisType():
            return {"slice": "..."}
        case TensorName(name):
            return {"tensor": name}
        case torch.dtype():
            return {"dtype": normalise_dtype(value)}
        case Lazy():
            return encode_source(where, value, fallback)
        case type() if issubclass(value, nn.Module) and (path := path_of(value)):
            return {"class": path}
        case _ if callable(value) and not isinstance(value, nn.Module | type) and (path := path_of(value)):
            return {"function": path}
        case _:
            return fallback(where, value)


def encode_source(where: str, source: Source, fallback: Fallback) -> Json:
    """A source as JSON; `fallback` describes modules, and functions without an import path."""
    match source:
        case Lazy(factory, args, kwargs):
            return {
                "lazy": path_of(factory) or fallback(where, factory),
                "args": [encode(f"{where}, argument {i}", v, fallback) for i, v in enumerate(args)],
                "kwargs": {k: encode(f"{where}, argument {k}", v, fallback) for k, v in kwargs.items()},
            }
        case Function(function):
            path = path_of(function)
            return {"function": path} if path else fallback(where, function)
        case Instance(module):
            return fallback(where, module)


def decode(value: Json, resolve: Resolver, *, tensors: bool = False) -> Any:
    """The constant that `encode` wrote.

    Args:
        resolve: the object of an import path and its role.
        tensors: whether names of tensors may stand among it.

    Raises:
        FormatError: a tag that there is not.
    """
    match value:
        case list():
            return [decode(v, resolve, tensors=tensors) for v in value]
        case {"tuple": list(items)} if len(value) == 1:
            return tuple(decode(v, resolve, tensors=tensors) for v in items)
        case {"dict": dict(items)} if len(value) == 1:
            return {k: decode(v, resolve, tensors=tensors) for k, v in items.items()}
        case {"tensor": str(name)} if len(value) == 1 and tensors:
            return TensorName(name)
        case {"slice": [start, stop, step]} if len(value) == 1:
            return slice(*(decode(v, resolve) for v in (start, stop, step)))
        case {"slice": "..."} if len(value) == 1:
            return ...
        case {"float": ("inf" | "-inf" | "nan") as text} if len(value) == 1:
            return float(text)
        case {"dtype": str(name)} if len(value) == 1:
            try:
                return getattr(torch, normalise_dtype(name))
            except GraphError as error:
                raise FormatError(str(error)) from error
        case {"function": str(path)} if len(value) == 1:
            return resolve(path, "function")
        case {"class": str(path)} if len(value) == 1:
            return resolve(path, "class")
        case {"lazy": str(path), "args": list(args), "kwargs": dict(kwargs)} if len(value) == 3:
            return Lazy(
                resolve(path, "factory"),
                tuple(decode(v, resolve) for v in args),
                {k: decode(v, resolve) for k, v in kwargs.items()},
            )
        case None | bool() | int() | float() | str():
            return value
        case _:
            raise FormatError(
                f"{json.dumps(value)[:120]} is no constant; objects are written {{'tuple': [...]}}, {{'dict': ...}}, "
                "{'float': 'inf'}, {'dtype': ...}, {'function': ...}, {'class': ...} or "
                "{'lazy': ..., 'args': ..., 'kwargs': ...}"
            )


def encode_spec(spec: TensorSpec) -> Json:
    return {"shape": list(spec.shape), "dtype": spec.dtype}


def encode_lengths(lengths: Mapping[str, Length]) -> Mapping[str, Json]:
    """The limits of lengths under a key of their own; nothing where there are none."""
    limits = {n: {"low": v.low, "high": v.high, "multiple_of": v.multiple_of} for n, v in lengths.items()}
    return {"lengths": limits} if limits else {}


def refuse(where: str, thing: object) -> Json:
    """The fallback of files: nothing else can be written.

    Raises:
        GraphError: always; with the remedy.
    """
    if isinstance(thing, nn.Module):
        name = type(thing).__name__
        raise GraphError(
            f"{where} is a {name} whose constructor arguments are not known, so a file cannot describe it; give "
            f"pf.lazy({name}, ...), which records them"
        )
    if callable(thing):
        name = getattr(thing, "__qualname__", None) or type(thing).__name__
        raise GraphError(
            f"{where} is {name}, which no import path leads to; define it at the top level of a module and give "
            "that function or class"
        )
    raise GraphError(
        f"{where} is a {type(thing).__name__}, which JSON cannot hold; use None, numbers, text, lists, tuples, dicts, "
        "dtypes, functions or pf.lazy"
    )


def describe(where: str, thing: object) -> Json:
    """The fallback of digests: by class, shapes and code; never by address or weights."""
    if isinstance(thing, nn.Module):
        tensors = {**dict(thing.named_parameters()), **dict(thing.named_buffers())}
        return {
            "module": _kind(where, thing),
            "repr": _ADDRESS.sub("", repr(thing)),
            "tensors": {n: [list(t.shape), str(t.dtype), t.requires_grad] for n, t in tensors.items()},
        }
    if isinstance(thing, torch.Tensor):
        return {"tensor": [list(thing.shape), str(thing.dtype)]}
    if isinstance(thing, FunctionType):
        return _describe_function(where, thing)
    if isinstance(thing, type):
        return {"class": f"{thing.__module__}.{thing.__qualname__}"}
    if isinstance(thing, functools.partial):
        return {
            "partial": encode(where, thing.func, describe),
            "args": encode(where, list(thing.args), describe),
            "kwargs": encode(where, dict(thing.keywords), describe),
        }
    return {"object": _kind(where, thing), "repr": _ADDRESS.sub("", repr(thing))}


def _kind(_where: str, thing: object) -> Json:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def _describe_function(where: str, function: FunctionType) -> Json:
    """A function without an import path, such as a lambda: its code and what it closes over."""
    code = function.__code__
    constants = [c for c in code.co_consts if isinstance(c, int | float | str | None)]
    # Closures may hold themselves, so what they hold is only named.
    cells = [c.cell_contents for c in function.__closure__ or () if c != CellType()]
    return {
        "code": f"{function.__module__}.{function.__qualname__}",
        "sha256": hashlib.sha256(code.co_code + repr((code.co_names, constants)).encode()).hexdigest(),
        "defaults": encode(where, list(function.__defaults__ or ()), _kind),
        "closure": encode(where, cells, _kind),
    }


def encode_layer(layer: Layer, specs: Mapping[str, TensorSpec], fallback: Fallback) -> Json:
    """A layer as JSON."""
    where = f"layer {layer.name!r}"
    args: Any = None
    kwargs = layer.kwargs
    if layer.arguments is not None:
        args, kwargs = rebuild(layer.arguments, [TensorName(t) for t in layer.inputs])
    description = {
        "name": layer.name,
        "source": encode_source(where, layer.source, fallback),
        "inputs": list(layer.inputs),
        "kwargs": {k: encode(f"{where}, {k}", v, fallback) for k, v in kwargs.items()},
        "outputs": {t: encode_spec(specs[t]) for t in layer.outputs},
    }
    if args is not None:
        description["args"] = [encode(f"{where}, argument {i}", v, fallback) for i, v in enumerate(args)]
    if layer.is_loss:
        description["loss"] = {"weight": layer.weight, "reduction": layer.reduction, "count": layer.count}
    return description


def encode_phases(phases: Mapping[str, Phase]) -> dict[str, Json]:
    """The phases of a graph; nothing for one without."""
    if not phases:
        return {}
    return {
        "phases": [
            {"name": phase.name, "losses": list(phase.losses), "trains": list(phase.trains)}
            for phase in phases.values()
        ]
    }


def digest(graph: LayerGraph) -> str:
    """SHA-256 of the graph's structure, the same in every process."""
    description = {
        "name": graph.name,
        **encode_lengths(graph.lengths),
        "inputs": {name: encode_spec(spec) for name, spec in graph.inputs.items()},
        "layers": [encode_layer(layer, graph.specs, describe) for layer in graph.layers.values()],
        "differentiable": sorted(graph.differentiable),
        "parameters": {n: [*encode_spec(s).values(), s.requires_grad] for n, s in graph.parameters.items()},
        "buffers": {n: list(encode_spec(s).values()) for n, s in graph.buffers.items()},
        "shared": [list(group) for group in graph.shared_parameters],
        **encode_phases(graph.phases),
    }
    return hashlib.sha256(json.dumps(description, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
