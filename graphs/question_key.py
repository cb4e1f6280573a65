"""When two layers must have the same answers from inference, so that one is asked for both."""

from __future__ import annotations

from collections.abc import Mapping
from types import BuiltinFunctionType, EllipsisType, FunctionType, MappingProxyType

import torch

from pipeflow.graphs.layer import Function, Lazy
from pipeflow.graphs.nesting import Branch, Constant, Leaf


class NoKey(Exception):
    """Something whose answer may change, so it is asked anew each time."""


def key_of(value: object) -> object:
    """Equal for what must have equal answers: recipes and functions by identity, constants by value.

    Raises:
        NoKey: a module, a closure, or anything else that may change.
    """
    match value:
        case Lazy(factory, args, kwargs):
            named = tuple((k, key_of(v)) for k, v in sorted(kwargs.items()))
            return (key_of(factory), tuple(key_of(v) for v in args), named)
        case Function(function):
            return key_of(function)
        case Leaf(position):
            return (Leaf, position)
        case Constant(constant):
            return (Constant, key_of(constant))
        case Branch(kind, keys, items):
            return (kind, *map(key_of, keys), *map(key_of, items))
        case list() | tuple():
            return (type(value), *map(key_of, value))
        case Mapping() if type(value) in (dict, MappingProxyType):
            return (dict, *((key_of(k), key_of(v)) for k, v in value.items()))
        case slice(start=start, stop=stop, step=step):
            return (slice, key_of(start), key_of(stop), key_of(step))
        case type() | BuiltinFunctionType() | torch.dtype():
            return value
        case FunctionType() if value.__closure__ is None or value.__module__.startswith("torch."):
            return value
        case None | EllipsisType() | bool() | int() | float() | str():
            return (type(value), value)  # 1, 1.0 and True are equal, but not alike
        case _:
            raise NoKey
