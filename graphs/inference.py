"""What a layer gives for what it is given, found by running it on tensors without data.

A layer runs on fake tensors, in training mode, for two batch sizes: sizes that differ between
the two grow with the batch. The same runs tell whether autograd records the outputs, whether
random numbers are drawn and which buffers change. Neither the user's modules nor the
process's random generators are touched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pipeflow.errors import GraphError, ShapeError
from pipeflow.graphs.building import make_module
from pipeflow.graphs.fake_run import dtype_name, fake_copy, quiet, run, spec_of
from pipeflow.graphs.layer import Function, Instance, Lazy, Source
from pipeflow.graphs.randomness import isolated
from pipeflow.graphs.tensor_spec import Dim, TensorSpec

BATCH_SIZES = (3, 5)
"""Small, different, coprime: a size is a multiple of both only if it grows with the batch."""


@dataclass(frozen=True, slots=True)
class Inferred:
    """What is known of a layer after inference.

    Attributes:
        outputs: specs, in order.
        gives_tuple: whether the callable returns a tuple, of one tensor even.
        is_random: whether random numbers are drawn.
        mutated_buffers: names of buffers that the forward changes.
        norm_calls: paths of the norms with running statistics that it calls, in order.
        strided_outputs: positions of outputs that are not contiguous.
        strided_gradients: positions of inputs whose gradients are not contiguous.
        parameters: spec of each parameter by its name in the module; each of a tie.
        buffers: the same for buffers.
        persistent: names of the buffers that belong to the state dict.
        ties: groups of parameter or buffer names that are one tensor within the module.
    """

    outputs: tuple[TensorSpec, ...]
    gives_tuple: bool
    is_random: bool
    mutated_buffers: tuple[str, ...]
    norm_calls: tuple[str, ...]
    strided_outputs: frozenset[int]
    strided_gradients: frozenset[int]
    parameters: Mapping[str, TensorSpec]
    buffers: Mapping[str, TensorSpec]
    persistent: frozenset[str]
    ties: tuple[tuple[str, ...], ...]


def infer(name: str, source: Source, inputs: Sequence[TensorSpec], kwargs: Mapping[str, Any]) -> Inferred:
    """Runs the layer without data.

    Args:
        name: of the layer, for errors.
        source: its callable.
        inputs: what it is called with.
        kwargs: constants of the call.

    Raises:
        ShapeError: the layer does not take those shapes or dtypes; or its output's shape
            depends on the data, or is neither fixed nor a multiple of the batch.
        GraphError: it returns something else than tensors, a number of them that changes, or it
            changes its inputs in place.
    """
    default = torch.get_default_dtype()
    try:
        key = (default, tuple(inputs), _key(source), *((k, _key(v)) for k, v in sorted(kwargs.items())))
        return _answer(_Question(key, name, source, tuple(inputs), kwargs))
    except _NoKey:
        return _answer_anew(_Question((), name, source, tuple(inputs), kwargs))


class _NoKey(Exception):
    """Something whose answer may change, so it is asked anew each time."""


def _key(value: object) -> object:
    """Equal for what must have equal answers: recipes and functions by identity, constants by value.

    Raises:
        _NoKey: a module, a closure, or anything else that may change.
    """
    match value:
        case Lazy(factory, args, kwargs):
            named = tuple((k, _key(v)) for k, v in sorted(kwargs.items()))
            return (_key(factory), tuple(_key(v) for v in args), named)
        case Function(function):
            return _key(function)
        case list() | tuple():
            return (type(value), *map(_key, value))
        case type() | BuiltinFunctionType() | torch.dtype():
            return value
        case FunctionType() if value.__closure__ is None or value.__module__.startswith("torch."):
            return value
        case None | bool() | int() | float() | str():
            return (type(value), value)  # 1, 1.0 and True are equal, but not alike
        case _:
            raise _NoKey


@dataclass(frozen=True, slots=True)
class _Question:
    """What inference is asked; equal questions have equal answers, names in errors apart."""

    key: object
    name: str = field(compare=False)
    source: Source = field(compare=False)
    inputs: tuple[TensorSpec, ...] = field(compare=False)
    kwargs: Mapping[str, Any] = field(compare=False)


def _answer_anew(question: _Question) -> Inferred:
    name, source, inputs, kwargs = question.name, question.source, question.inputs, question.kwargs
    with isolated(0), quiet():
        mode = FakeTensorMode()
        if isinstance(source, Lazy):
            try:
                with mode, torch.device("cpu"):  # built without memory
                    module = make_module(name, source).train()
                return _infer(name, source, module, mode, inputs, kwargs)
            except Exception:
                # Some factories need real numbers: what is wrong, if anything, shows below.
                with torch.device("cpu"):
                    module = make_module(name, source)
            return _infer(name, source, fake_copy(name, module, mode), mode, inputs, kwargs)
        if isinstance(source, Instance):
            return _infer(name, source, fake_copy(name, source.module, mode), mode, inputs, kwargs)
        return _infer(name, source, source.function, mode, inputs, kwargs)


# Models repeat their blocks, and a run on fake tensors takes milliseconds.
_answer = lru_cache(maxsize=1024)(_answer_anew)


def _infer(
    name: str,
    source: Source,
    function: Callable[..., Any],
    mode: FakeTensorMode,
    inputs: Sequence[TensorSpec],
    kwargs: Mapping[str, Any],
) -> Inferred:
    module = function if isinstance(function, nn.Module) else nn.Module()
    runs = [run(name, source, function, mode, inputs, kwargs, samples) for samples in BATCH_SIZES]
    first, second = runs
    if len(first.outputs) != len(second.outputs) or first.gives_tuple != second.gives_tuple:
        raise GraphError(
            f"layer {name!r} gives {len(first.outputs)} tensors for a batch of {BATCH_SIZES[0]} and "
            f"{len(second.outputs)} for {BATCH_SIZES[1]}; the number of outputs must not depend on the batch"
        )
    parameters = dict(module.named_parameters(remove_duplicate=False))
    buffers = dict(module.named_buffers(remove_duplicate=False))
    return Inferred(
        outputs=tuple(_merge(name, a, b) for a, b in zip(first.outputs, second.outputs, strict=True)),
        gives_tuple=first.gives_tuple,
        is_random=first.is_random or second.is_random,
        mutated_buffers=tuple(n for n in buffers if n in first.mutated | second.mutated),
        norm_calls=first.norm_calls if first.norm_calls == second.norm_calls else (),
        strided_outputs=first.strided_outputs | second.strided_outputs,
        strided_gradients=first.strided_gradients | second.strided_gradients,
        parameters={n: spec_of(p) for n, p in parameters.items()},
        buffers={n: spec_of(b) for n, b in buffers.items()},
        persistent=frozenset(buffers) & frozenset(module.state_dict(keep_vars=True)),
        ties=_ties({**parameters, **buffers}),
    )


def _merge(name: str, first: torch.Tensor, second: torch.Tensor) -> TensorSpec:
    """The spec that both runs agree on."""
    shapes = f"{tuple(first.shape)} for a batch of {BATCH_SIZES[0]} and {tuple(second.shape)} for {BATCH_SIZES[1]}"
    if first.dim() != second.dim() or first.dtype != second.dtype:
        raise ShapeError(f"layer {name!r} gives {shapes}; its rank and dtype must not depend on the batch")
    dims: list[Dim] = []
    for a, b in zip(first.shape, second.shape, strict=True):
        multiple, rest = divmod(a, BATCH_SIZES[0])
        if a == b:
            dims.append(int(a))
        elif rest == 0 and multiple * BATCH_SIZES[1] == b:
            dims.append(f"{multiple}*B")
        else:
            raise ShapeError(
                f"layer {name!r} gives {shapes}; each size must be fixed or a multiple of the batch, so that "
                "micro-batches of any size work"
            )
    return TensorSpec(tuple(dims), dtype_name(first.dtype), first.requires_grad)


def _ties(tensors: Mapping[str, torch.Tensor]) -> tuple[tuple[str, ...], ...]:
    names: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    return tuple(tuple(group) for group in names.values() if len(group) > 1)
