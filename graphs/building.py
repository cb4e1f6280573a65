"""Callables for layers: fresh modules with the initial weights, or the functions themselves.

Decides how a module is copied or made, and with which random numbers; not where it lives.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from pipeflow.errors import GraphError
from pipeflow.graphs.layer import Function, Instance, Lazy, Source
from pipeflow.graphs.randomness import LOCK, isolated, seed_of


def make_module(name: str, lazy: Lazy) -> nn.Module:
    """Calls the factory of the layer `name`, recipes among its arguments first.

    Raises:
        GraphError: the factory fails, or gives something else than a module.
    """
    try:
        module = _make(lazy)
    except Exception as error:
        factory = getattr(lazy.factory, "__name__", repr(lazy.factory))
        raise GraphError(
            f"layer {name!r}: {factory} cannot be built from its arguments: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(module, nn.Module):
        raise GraphError(
            f"layer {name!r}: the factory gave a {type(module).__name__}; pf.lazy is for factories of modules, "
            "a function of tensors is a layer as it is"
        )
    return module


def _make(value: Any) -> Any:
    """The value with its recipes made; everything else is copied, so that no two builds share it."""
    match value:
        case Lazy():
            return value.factory(*map(_make, value.args), **{k: _make(v) for k, v in value.kwargs.items()})
        case list() | tuple() if type(value) in (list, tuple):
            return type(value)(map(_make, value))
        case dict() if type(value) is dict:
            return {k: _make(v) for k, v in value.items()}
        case _:
            return copy.deepcopy(value)


def build(sources: Mapping[str, Source], seed: int) -> dict[str, Callable[..., Any]]:
    """The callable of every layer, modules on the CPU and in training mode.

    Instances are copied together, so that parameters they share stay shared among the copies.
    A recipe's weights depend on (seed, layer name) alone. Threads may call it.

    Raises:
        GraphError: a module cannot be copied or made.
    """
    built: dict[str, Callable[..., Any]] = {}
    memo: dict[int, Any] = {}
    with LOCK:
        for name, source in sources.items():
            match source:
                case Instance(module):
                    built[name] = _copy(name, module, memo).to("cpu").train()
                case Lazy():
                    with isolated(seed_of(seed, name)), torch.device("cpu"):
                        built[name] = make_module(name, source).train()
                case Function(function):
                    built[name] = function
    return built


def _copy(name: str, module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    try:
        return copy.deepcopy(module, memo)
    except Exception as error:
        raise GraphError(
            f"layer {name!r}: its {type(module).__name__} cannot be copied ({type(error).__name__}: {error}); "
            "give pf.lazy(factory, ...) so that it is built where it runs"
        ) from error
