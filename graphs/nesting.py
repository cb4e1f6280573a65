"""How tensors stand in tuples, lists, dicts and named tuples, among constants: as a frozen template.

A template has the leaves numbered in the order in which they are met, so what holds tensors can
be taken apart into a flat list and put together again. It is data: nothing in it is run. What a
leaf is (a handle, a tensor, a name) is the caller's to say; this file knows no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, fields, is_dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Leaf:
    """The leaf of that number."""

    position: int


@dataclass(frozen=True, slots=True)
class Constant:
    """A value that is the same in every call. As an argument of a layer: taken as it is, text too."""

    value: Any


@dataclass(frozen=True, slots=True)
class Branch:
    """A container.

    Attributes:
        kind: `tuple`, `list`, `dict`, or the class of a named tuple.
        keys: a dict's keys or a named tuple's fields; positions otherwise.
        items: what stands there.
    """

    kind: type
    keys: tuple[Any, ...]
    items: tuple[Nest, ...]


Nest = Leaf | Constant | Branch
"""A template."""


def flatten(value: Any, is_leaf: Callable[[Any], bool], *, exact: bool = True) -> tuple[list[Any], Nest]:
    """The leaves in a value, in order, and its template. Containers without leaves are constants.

    Args:
        value: whatever may hold leaves.
        is_leaf: whether a value is one.
        exact: take apart tuples, lists, dicts and named tuples alone; otherwise their subclasses
            too, as what they derive from.

    Raises:
        TypeError: a leaf is in a container that is not taken apart; the message names its class.
    """
    leaves: list[Any] = []
    return leaves, _flatten(value, is_leaf, leaves, exact)


def _flatten(value: Any, is_leaf: Callable[[Any], bool], leaves: list[Any], exact: bool) -> Nest:
    if is_leaf(value):
        leaves.append(value)
        return Leaf(len(leaves) - 1)
    if isinstance(value, Constant):
        return value
    kind = _kind(value, exact)
    if kind is None:
        if any(is_leaf(held) for held in _held(value)):
            raise TypeError(type(value).__name__)
        return Constant(value)
    keys, values = (tuple(value), value.values()) if kind is dict else (_keys(kind, len(value)), value)
    items = [_flatten(v, is_leaf, leaves, exact) for v in values]
    constants = [item.value for item in items if isinstance(item, Constant)]
    if len(constants) == len(items):  # a copy, so that what is changed outside is not changed here
        return Constant(_put(kind, keys, constants))
    return Branch(kind, keys, tuple(items))


def _kind(value: object, exact: bool) -> type | None:
    """As what a container is rebuilt; None for what is not taken apart."""
    if isinstance(value, tuple) and isinstance(getattr(value, "_fields", None), tuple):
        return type(value)
    if exact:
        return type(value) if type(value) in (tuple, list, dict) else None
    return next((kind for kind in (tuple, list, dict) if isinstance(value, kind)), None)


def _keys(kind: Any, length: int) -> tuple[Any, ...]:
    return tuple(range(length)) if kind in (tuple, list) else tuple(kind._fields)


def _held(value: object) -> Iterator[Any]:
    """What stands directly in a container that this file does not rebuild."""
    if isinstance(value, Mapping):
        yield from value.values()
    elif isinstance(value, Set | Sequence) and not isinstance(value, str | bytes | range):
        yield from value
    elif is_dataclass(value) and not isinstance(value, type):
        yield from (getattr(value, f.name) for f in fields(value))


def _put(kind: type, keys: Sequence[Any], values: Sequence[Any]) -> Any:
    if kind is dict:
        return dict(zip(keys, values, strict=True))
    return kind(values) if kind in (tuple, list) else kind(*values)


def rebuild(nest: Nest, leaves: Sequence[Any]) -> Any:
    """The value that the template describes, with these leaves."""
    match nest:
        case Leaf(position):
            return leaves[position]
        case Constant(value):
            return value
        case Branch(kind, keys, items):
            return _put(kind, keys, [rebuild(item, leaves) for item in items])


def paths(nest: Nest, prefix: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to each leaf, in order: the keys and positions on it."""
    match nest:
        case Leaf():
            yield prefix
        case Branch(_, keys, items):
            for key, item in zip(keys, items, strict=True):
                yield from paths(item, (*prefix, key))


def take(nest: Nest, value: Any, is_leaf: Callable[[Any], bool]) -> list[Any] | None:
    """The leaves of a value that has the template's form and constants; None if it has another.

    A tuple may stand for a list and a subclass for its class; numbers, keys and constants must agree.
    """
    leaves: list[Any] = []
    return leaves if _take(nest, value, is_leaf, leaves) else None


def _take(nest: Nest, value: Any, is_leaf: Callable[[Any], bool], leaves: list[Any]) -> bool:
    match nest:
        case Leaf():
            leaves.append(value)
            return is_leaf(value)
        case Constant(constant):
            return alike(constant, value)
        case Branch(kind, keys, items):
            if kind is dict:
                if not isinstance(value, dict) or len(value) != len(keys) or any(key not in value for key in keys):
                    return False
                values: Any = [value[key] for key in keys]
            elif isinstance(value, tuple | list) and len(value) == len(keys):
                values = value
            else:
                return False
            return all(_take(item, v, is_leaf, leaves) for item, v in zip(items, values, strict=True))


def alike(one: object, other: object) -> bool:
    """Whether two constants or templates are of one class and equal; not-a-number equals itself here."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, Constant) and isinstance(other, Constant):
        return alike(one.value, other.value)
    if isinstance(one, Branch) and isinstance(other, Branch):
        return one.kind is other.kind and alike(one.keys, other.keys) and alike(one.items, other.items)
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(alike(v, other[k]) for k, v in one.items())
    return bool(one == other) or (one != one and other != other)


def describe(value: Any, is_leaf: Callable[[Any], bool]) -> str:
    """A value's form as text: "(Tensor, {h: Tensor, n: 3})"."""
    if is_leaf(value):
        return "Tensor"
    match value:
        case dict():
            return "{" + ", ".join(f"{key}: {describe(v, is_leaf)}" for key, v in value.items()) + "}"
        case list() | tuple():
            inner = ", ".join(describe(v, is_leaf) for v in value)
            return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' if len(value) == 1 else ''})"
        case None | bool() | int() | float() | str():
            return repr(value)
        case _:
            return type(value).__name__


def form_of(nest: Nest) -> str:
    """A template's form as text, as `describe`."""
    here = object()
    return describe(rebuild(nest, [here] * sum(1 for _ in paths(nest))), lambda value: value is here)
