"""How a layer is called: what a user gives as its arguments, and what it gives back.

A layer has a flat tuple of input tensors and one of output tensors; that is all that costs, cuts
and transports know of. Here is what stands between them and the layer's own signature: tensors by
keyword and inside tuples, lists, dicts and named tuples, with constants beside them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pipeflow.errors import GraphError
from pipeflow.graphs.layer import Handle, Layer
from pipeflow.graphs.nesting import Branch, Constant, Leaf, Nest, describe, flatten, form_of, paths, rebuild, take
from pipeflow.graphs.tensor_spec import ITEMSIZE_BY_DTYPE

_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_\-/]*")


def is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


# -- arguments -------------------------------------------------------------------------------


def read_arguments(
    name: str, args: Sequence[Any], kwargs: Mapping[str, Any], resolve: Callable[[Any], str]
) -> tuple[tuple[str, ...], Nest]:
    """The names of the tensors among the arguments of a layer, in order, and the template of (args, kwargs).

    Args:
        name: of the layer, for errors.
        args, kwargs: handles, constants, and containers of both; text by position names a tensor.
        resolve: the name of a tensor for a handle or a name, or an error.

    Raises:
        GraphError: no tensor of the graph is among them, or something that is neither one nor a constant.
    """
    for where, value in [*enumerate(args), *kwargs.items()]:
        _check_constant(name, str(where), value)
    args = tuple(_Named(resolve(value)) if isinstance(value, str) else value for value in args)
    try:
        handles, nest = flatten((args, dict(kwargs)), lambda value: isinstance(value, Handle | _Named))
    except TypeError as error:
        raise GraphError(
            f"layer {name!r} is given tensors of the graph inside a {error}, which cannot be rebuilt for each call; "
            "use tuples, lists, dicts or named tuples"
        ) from None
    if not handles:
        raise GraphError(f"layer {name!r} reads nothing; a layer needs at least one input")
    return tuple(h.name if isinstance(h, _Named) else resolve(h) for h in handles), nest


class _Named:
    """A tensor that was given by its name."""

    def __init__(self, name: str) -> None:
        self.name = name


def _check_constant(name: str, where: str, value: object) -> None:
    """Refuses what is given as a constant and is none."""
    try:
        held, _ = flatten(value, lambda v: isinstance(v, Tensor | nn.Module), exact=False)
        kinds = [type(thing).__name__ for thing in held]
    except TypeError as error:
        kinds = [f"{error} of tensors"]
    if kinds:
        raise GraphError(
            f"layer {name!r}: argument {where} has a {kinds[0]}, which is not a constant: a tensor would be neither "
            "trained nor saved, nor move to a layer's device. Tensors of each batch are inputs of the graph; weights "
            "and tables belong into a module (register_buffer)"
        )


def plain_kwargs(nest: Nest) -> dict[str, Any] | None:
    """The constants of a call `function(*tensors, **constants)`; None for any other call."""
    assert isinstance(nest, Branch)
    args, kwargs = nest.items
    if not isinstance(kwargs, Constant) or not isinstance(args, Branch):
        return None
    return dict(kwargs.value) if all(isinstance(item, Leaf) for item in args.items) else None


# -- results ---------------------------------------------------------------------------------


def read_results(name: str, kind: str, result: Any) -> tuple[tuple[Tensor, ...], Nest]:
    """The tensors that a layer gave, in order, and their template.

    Raises:
        GraphError: there are none, or something among them is neither a container nor a constant.
    """
    try:
        tensors, nest = flatten(result, is_tensor, exact=False)
    except TypeError as error:
        raise GraphError(_no_results(name, kind, result, f"a {error} of tensors")) from None
    if bad := _no_constant(nest):
        raise GraphError(_no_results(name, kind, result, bad))
    if not tensors:
        raise GraphError(_no_results(name, kind, result, "no tensor"))
    for tensor in tensors:
        if kind_said := _unusual(tensor):
            raise GraphError(
                f"layer {name!r} ({kind}) gives a {kind_said} tensor, which cannot be sent as others are; give it as "
                "plain tensors, such as indices and values, or keep the layers that pass it in one module"
            )
    return tuple(tensors), nest


def _unusual(tensor: Tensor) -> str:
    """What keeps a tensor from being sent as numbers in order; "" for nothing."""
    if tensor.is_nested:
        return "nested"
    if tensor.is_quantized:
        return "quantized"
    if tensor.layout is not torch.strided:
        return str(tensor.layout).removeprefix("torch.")
    return "" if str(tensor.dtype).removeprefix("torch.") in ITEMSIZE_BY_DTYPE else str(tensor.dtype)


def _no_results(name: str, kind: str, result: Any, why: str) -> str:
    return (
        f"layer {name!r} ({kind}) gives {describe(result, is_tensor)}: {why}; a layer gives tensors, also in tuples, "
        "lists, dicts and named tuples, beside None, numbers and text: wrap it in a function that does"
    )


def _no_constant(nest: Nest) -> str:
    """What stands among the results and is no constant, as text."""
    match nest:
        case Leaf():
            return ""
        case Branch(_, _, items):
            return next((bad for item in items if (bad := _no_constant(item))), "")
        case Constant(None | bool() | int() | float() | str() | torch.dtype() | torch.device()):
            return ""
        case Constant(tuple() | list() as values):
            return next((bad for v in values if (bad := _no_constant(Constant(v)))), "")
        case Constant(dict() as values):
            return next((bad for v in values.values() if (bad := _no_constant(Constant(v)))), "")
        case Constant(value):
            return f"a {type(value).__name__}"


def output_names(name: str, nest: Nest) -> tuple[str, ...]:
    """The names of a layer's outputs: its own, or `name:` and the way to each.

    Raises:
        GraphError: a key is not fit for a name, or two ways read alike.
    """
    if isinstance(nest, Leaf):
        return (name,)
    names = []
    for path in paths(nest):
        for key in path:
            if isinstance(key, bool) or not isinstance(key, int | str) or not _KEY.fullmatch(str(key)):
                raise GraphError(
                    f"layer {name!r} gives a dict with the key {key!r}, which cannot name a tensor; use numbers or "
                    "letters, digits and _ - /"
                )
        names.append(f"{name}:{'.'.join(map(str, path))}")
    if len(set(names)) != len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise GraphError(f"layer {name!r} gives two tensors that would both be named {twice!r}; rename one of the keys")
    return tuple(names)


def is_plain_result(nest: Nest) -> bool:
    """Whether a layer gives a tensor, or a tuple or list of tensors."""
    flat = isinstance(nest, Branch) and nest.kind in (tuple, list)
    return isinstance(nest, Leaf) or (flat and all(isinstance(item, Leaf) for item in nest.items))  # type: ignore[union-attr]


# -- the call --------------------------------------------------------------------------------


def flat_call(layer: Layer, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` as one of the layer's flat input tensors alone, which gives a tensor or a tuple of them.

    Args:
        layer: says how it is called and what it gives.
        function: the layer's callable.

    Returns:
        A callable. What gives a structure raises ValueError where that is another than while the
        graph was described.
    """
    arguments, results = layer.arguments, layer.results
    if arguments is None and results is None:
        return partial(function, **layer.kwargs) if layer.kwargs else function

    def call(*tensors: Tensor) -> Any:
        if arguments is None:
            value = function(*tensors, **layer.kwargs)
        else:
            args, kwargs = rebuild(arguments, tensors)
            value = function(*args, **kwargs)
        if results is None:
            return value
        leaves = take(results, value, is_tensor)
        if leaves is None:
            seen = describe(value, is_tensor)
            raise ValueError(f"gave {seen}, but {form_of(results)} while the graph was described")
        return tuple(leaves)

    return call
