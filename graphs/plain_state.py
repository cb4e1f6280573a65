"""What a layer keeps outside of tensors: numbers, text and generators that one call could leave for the next.

Tensors are followed kernel by kernel (`effects`); of a number nobody sees that it is read. But what
is different after each call of one size, although nothing else was, is more than a note: a counter,
or a generator of random numbers. Nothing here runs a layer.
"""

from __future__ import annotations

import functools
import itertools
import random
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from pipeflow.errors import GraphError

OF_EVERY_MODULE = frozenset(vars(nn.Module()))
"""Attributes in which torch keeps what it knows of a module."""

_NOT_OF_USERS = frozenset({"builtins", "torch", "numpy", "random", "functools", "types", "collections"})
_MOST_VALUES = 64
"""Larger containers are tables, and not looked into."""


@dataclass(frozen=True, slots=True)
class _GeneratorState:
    """What a generator of random numbers would give next."""

    state: object


class _NotPlain(Exception):
    """Something that is neither a number nor text, nor a generator, nor a small container of these."""


def plain_state(function: Callable[..., Any]) -> dict[str, object]:
    """The values that a layer could keep between calls, by where they are.

    Args:
        function: the layer's callable; of a module, what its parts, their hooks and classes hold.
    """
    found: dict[str, object] = {}
    for where, value in _places(function):
        try:
            found[where] = _frozen(value)
        except _NotPlain:
            continue
    return found


def check_plain_state(who: str, before: Mapping[str, object], after: Mapping[str, object]) -> None:
    """Refuses a layer that leaves something else after a call than before, where the call before was alike.

    Args:
        who: the layer, for errors.
        before, after: its plain state, and that of common generators.

    Raises:
        GraphError: names the place and the remedy.
    """
    for where in changed(before, after):
        value = after[where]
        if isinstance(value, _GeneratorState):
            raise GraphError(f"{who} draws random numbers from {where}, {UNKEYED}")
        raise GraphError(
            f"{who} changes {where} in each call, here to {str(value)[:40]}; calls for other micro-batches run on "
            "other replicas, and again where they are recomputed: register it as a buffer, or leave it out"
        )


UNKEYED = (
    "which differ from layout to layout; draw them as tensors from torch's default generator, which is seeded for each "
    "step, layer and micro-batch"
)


def changed(before: Mapping[str, object], after: Mapping[str, object]) -> list[str]:
    """Where values are others after than they were before; places that are new do not count."""
    return [where for where, value in after.items() if where in before and before[where] != value]


def common_generators() -> Mapping[str, object]:
    """The states of generators that every layer can reach, torch's apart."""
    states: dict[str, object] = {"Python's random": _GeneratorState(random.getstate())}
    if numpy := sys.modules.get("numpy"):
        _, words, *rest = numpy.random.get_state()
        states["numpy.random"] = _GeneratorState((words.tobytes(), *rest))
    return states


def check_generators(who: str, own: Sequence[Sequence[torch.Generator]]) -> None:
    """Refuses a layer that draws random numbers from a generator that it keeps.

    Args:
        who: the layer, for errors.
        own: of each call, the generators that kernels were given beside torch's default one.

    Raises:
        GraphError: two calls had the same. One that is made anew in each call is none of state.
    """
    seen: set[int] = set()
    for generators in own:
        if not seen.isdisjoint(map(id, generators)):
            raise GraphError(f"{who} draws random numbers from a torch.Generator of its own, {UNKEYED}")
        seen.update(map(id, generators))


def _places(function: Callable[..., Any]) -> Iterator[tuple[str, Any]]:
    if not isinstance(function, nn.Module):
        yield from _of_function(function)
        return
    classes: dict[type, None] = {}
    for path, part in function.named_modules():
        if type(part).__module__.startswith("torch.nn."):
            continue
        classes |= dict.fromkeys(c for c in type(part).__mro__ if not c.__module__.startswith(("torch.", "builtins")))
        for name, value in vars(part).items():
            if name not in OF_EVERY_MODULE:
                yield from _of_value(f"its attribute '{path}.{name}'".replace("'.", "'"), value)
        for table in (part._forward_hooks, part._forward_pre_hooks):
            for hook in table.values():
                yield from _of_function(hook)
    for kind in classes:
        yield from ((f"the attribute {name!r} of {kind.__name__}", value) for name, value in vars(kind).items())
        if isinstance(forward := vars(kind).get("forward"), FunctionType):
            yield from _of_function(forward)


def _of_value(where: str, value: Any) -> Iterator[tuple[str, Any]]:
    """A value, or what an object of a class of somebody's own has in its attributes."""
    yield where, value
    home = type(value).__module__.partition(".")[0]
    if hasattr(value, "__dict__") and not isinstance(value, nn.Module | type) and home not in _NOT_OF_USERS:
        yield from ((f"{where}, {name!r} of it", inner) for name, inner in vars(value).items())


def _of_function(function: Any) -> Iterator[tuple[str, Any]]:
    """What a function closes over, has as attributes and defaults, and reads or writes of its module."""
    while isinstance(function, functools.partial):
        function = function.func
    if isinstance(function, MethodType):
        if not isinstance(function.__self__, nn.Module):
            yield from _of_value("its object", function.__self__)
        function = function.__func__
    if not isinstance(function, FunctionType):
        if not isinstance(function, type):
            yield from _of_value("its object", function)
        return
    if function.__module__.startswith("torch."):
        return
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield f"the variable {name!r}", cell.cell_contents
        except ValueError:  # empty
            continue
    for name in function.__code__.co_names:
        if name in function.__globals__:
            yield f"the variable {name!r}", function.__globals__[name]
    yield from ((f"the attribute {name!r} of {function.__name__}", value) for name, value in vars(function).items())
    yield from ((f"default {i} of {function.__name__}", value) for i, value in enumerate(function.__defaults__ or ()))


def _frozen(value: Any, room: int = _MOST_VALUES) -> object:
    """The value so that it stays as it is, and can be compared.

    Raises:
        _NotPlain: it holds something else than numbers, text and generators, or too much.
    """
    match value:
        case None | bool() | int() | float() | complex() | str() | bytes():
            return value if value == value else repr(value)
        case random.Random():
            return _GeneratorState(value.getstate())
        case Tensor() | nn.Module():
            raise _NotPlain
        case Mapping() if len(value) <= room:
            return ("mapping", *((_frozen(k), _frozen(v, room // 2)) for k, v in value.items()))
        case itertools.count():
            return repr(value)
        case Set() if len(value) <= room:
            return (type(value), frozenset(_frozen(v, room // 2) for v in value))
        case list() | tuple() | deque() if len(value) <= room:
            return (type(value), *(_frozen(v, room // 2) for v in value))
        case _ if type(value).__module__.startswith("numpy.random"):
            return _GeneratorState(_numpy_state(value))
        case _:
            raise _NotPlain


def _numpy_state(generator: Any) -> object:
    """Of numpy's generators, old and new."""
    source = getattr(generator, "bit_generator", None) or getattr(generator, "_bit_generator", generator)
    return repr(getattr(source, "state", None))
