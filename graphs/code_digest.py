"""A digest of the code that the layers of a graph run, as far as it is the user's own.

A graph's digest says what layers are made of: classes, shapes, arguments. How long they take is
decided by their code, which may be edited while all of that stays the same. So the code is
followed from the layers on: from a module to its class and those of its submodules, from a class
to its methods and bases, from a function to what it names. It ends where others' code begins:
torch's and Python's own are known by their versions.
"""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import nn

from pipeflow.graphs.layer import Function, Instance, Lazy, Source

_OTHERS = frozenset({"torch", "numpy", "pipeflow", *sys.stdlib_module_names})
"""Packages whose code is not followed."""


def code_digest(sources: Mapping[str, Source]) -> str:
    """SHA-256 of the code of layers, the same in every process.

    Args:
        sources: by the name of the layer.
    """
    walk = _Walk()
    for source in sources.values():
        match source:
            case Instance(module):
                walk.visit(module)
            case Lazy(factory, args, kwargs):
                walk.visit((factory, args, dict(kwargs)))
            case Function(function):
                walk.visit(function)
    return hashlib.sha256(
        repr([(where, sorted(texts)) for where, texts in sorted(walk.found.items())]).encode()
    ).hexdigest()


class _Walk:
    """What has been found so far: texts of code, by where it is defined.

    Several things may be defined in one place (instances, functions made in a loop), so texts add up.
    """

    def __init__(self) -> None:
        self.found: dict[str, set[str]] = {}
        self._seen: dict[int, object] = {}  # held, so that no other thing comes to have its id

    def visit(self, thing: Any) -> None:
        pending = [thing]
        while pending:
            thing = pending.pop()
            if id(thing) not in self._seen:
                self._seen[id(thing)] = thing
                pending += self._parts(thing)

    def _parts(self, thing: Any) -> Iterable[Any]:
        """Records what the thing is itself; gives what it leads to."""
        match thing:
            case nn.Module():
                attributes = {k: v for k, v in vars(thing).items() if k != "training"}
                self._record(type(thing), attributes)
                return [type(thing), *thing.children(), *_hooks(thing), *filter(callable, attributes.values())]
            case Lazy():
                return [thing.factory, *thing.args, *thing.kwargs.values()]
            case functools.partial():
                return [thing.func, *thing.args, *thing.keywords.values()]
            case MethodType():
                return [thing.__func__, thing.__self__]
            case FunctionType() if _is_own(thing):
                named, held = _named(thing), _held(thing)
                self._record(thing, named | held, _text(thing.__code__))
                return [*named.values(), *held.values()]
            case type() if _is_own(thing):
                self._record(thing, vars(thing))
                return [*thing.__bases__, *map(_unwrapped, vars(thing).values())]
            case type() | FunctionType() | BuiltinFunctionType() | ModuleType():
                return ()
            case list() | tuple() | set() | frozenset():
                return thing
            case dict():
                return thing.values()
            case _:
                if _is_own(type(thing)):
                    self._record(type(thing), getattr(thing, "__dict__", {}))
                return [type(thing)]

    def _record(self, where: type | FunctionType, settings: Mapping[str, Any], text: str = "") -> None:
        plain = {k: v for k, v in settings.items() if not k.startswith("__") and _is_plain(v)}
        texts = self.found.setdefault(f"{where.__module__}.{where.__qualname__}", set())
        texts.add(f"{text} {sorted(plain.items())}")


def _is_own(thing: Any) -> bool:
    """Whether it is code that its user may edit."""
    return str(thing.__module__).partition(".")[0] not in _OTHERS


def _hooks(module: nn.Module) -> Iterator[object]:
    for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks):
        yield from hooks.values()


def _unwrapped(member: object) -> object:
    """The function behind a static or class method or the getter of a property."""
    if isinstance(member, staticmethod | classmethod):
        return member.__func__
    return member.fget if isinstance(member, property) else member


def _named(function: FunctionType) -> dict[str, Any]:
    """The globals that a function names, and what it may take out of a module among them."""
    names, result = set(_names(function.__code__)), {}
    for name in names & function.__globals__.keys():
        value = result[name] = function.__globals__[name]
        if isinstance(value, ModuleType) and value.__name__.partition(".")[0] not in _OTHERS:
            result |= {f"{name}.{n}": vars(value)[n] for n in names & vars(value).keys()}
    return result


def _held(function: FunctionType) -> dict[str, Any]:
    """What a function closes over, its defaults and what it wraps."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    closed = {f"closure {name}": cell.cell_contents for name, cell in cells if cell != CellType()}
    defaults = {f"default {i}": value for i, value in enumerate(function.__defaults__ or ())}
    wrapped = {"wrapped": function.__wrapped__} if hasattr(function, "__wrapped__") else {}
    return {**closed, **defaults, **(function.__kwdefaults__ or {}), **wrapped}


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _text(code: CodeType) -> str:
    """Instructions, names and constants; neither lines nor files."""
    constants = [_text(c) if isinstance(c, CodeType) else _constant(c) for c in code.co_consts]
    return repr((code.co_code.hex(), code.co_names, code.co_varnames, constants))


def _constant(value: object) -> str:
    """The constant as text; sets in an order that is the same in every process."""
    return repr(sorted(map(repr, value))) if isinstance(value, frozenset) else repr(value)


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | complex | str | bytes)
