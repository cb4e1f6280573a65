"""One training forward of a layer on tensors without data, and what is seen on the way.

Fake kernels check less than real ones; what is known to slip through is watched (`kernels`,
`effects`, `fake_backward`). Which shapes to try is not decided here.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeCopyMode,
    FakeTensorMode,
    UnsupportedOperatorException,
)

from pipeflow.errors import GraphError, ShapeError
from pipeflow.graphs.calling import read_results
from pipeflow.graphs.effects import Effects, check_effects, foreign_calls, kept_tensors
from pipeflow.graphs.fake_backward import Backward, check_backward, is_straight, run_backward
from pipeflow.graphs.kernels import Watch, dtype_name
from pipeflow.graphs.label_means import LabelMean, label_means
from pipeflow.graphs.layer import Source, kind_of
from pipeflow.graphs.module_check import check_module, spec_of
from pipeflow.graphs.nesting import Nest, rebuild
from pipeflow.graphs.norms import norm_calls, refuse_synchronised
from pipeflow.graphs.numerics import Numerics
from pipeflow.graphs.plain_state import plain_state
from pipeflow.graphs.tensor_spec import TensorSpec, list_specs
from pipeflow.graphs.trials import Trial


@dataclass(frozen=True, slots=True)
class Run:
    outputs: tuple[torch.Tensor, ...]
    results: Nest
    is_random: bool
    mutated: frozenset[str]
    norm_calls: tuple[str, ...]
    strided_outputs: frozenset[int]
    strided_gradients: frozenset[int]
    withholds: bool
    kept: Mapping[str, torch.Tensor]
    label_means: tuple[LabelMean, ...]
    plain_state: tuple[Mapping[str, object], Mapping[str, object]]
    generators: tuple[torch.Generator, ...]


def run(
    name: str,
    source: Source,
    function: Callable[..., Any],
    mode: FakeTensorMode,
    inputs: Sequence[TensorSpec],
    arguments: Nest,
    trial: Trial,
    numerics: Numerics | None = None,
    earlier: Mapping[str, torch.Tensor] | None = None,
) -> Run:
    """One forward on fake tensors of the sizes to try.

    Args:
        name, source: of the layer.
        function: its callable, in the mode that is to be seen.
        mode: of its tensors.
        inputs: specs of what it is called with.
        arguments: the template of the call.
        trial: the sizes.
        numerics: the device and autocast to run under; by default the device of the weights alone.
        earlier: what the run before left in the layer's attributes (`Run.kept`).
    """
    refuse_synchronised(name, function)
    module = function if isinstance(function, nn.Module) else nn.Module()
    buffers = dict(module.named_buffers())
    before = {n: b._version for n, b in buffers.items()}
    there = {id(t) for t in kept_tensors(module).values()}
    # A module may already be on an accelerator; without data its inputs can be there too.
    device = next((p.device for p in module.parameters()), None)
    if numerics is None:
        numerics = Numerics(device.type if device is not None else "cpu")
    else:
        device = torch.device(numerics.device)
    effects = Effects(earlier or {})
    plain = plain_state(function)
    with (
        torch.enable_grad(),
        numerics.context(),
        mode,
        norm_calls(function) as calls,
        foreign_calls(function) as foreign,
        effects,
        Watch() as watch,
    ):
        tensors = [_fake(spec, trial, device) for spec in inputs]
        watch.is_random = False
        effects.start((*tensors, *module.parameters()))
        try:
            args, kwargs = rebuild(arguments, tensors)
            result = function(*args, **kwargs)
        except Exception as error:
            raise _refusal(name, source, function, inputs, trial, error) from error
    outputs, results = read_results(name, kind_of(source), result)
    kept = {n: t for n, t in kept_tensors(module).items() if id(t) not in there and effects.is_derived(t)}
    who = f"layer {name!r} ({kind_of(source)})"
    check_effects(who, function, tensors, outputs, effects, foreign, kept)
    # In evaluation there is none.
    if module.training:
        backward = run_backward(module, mode, tensors, outputs, by_hooks=watch.saves_by_hooks)
        check_backward(who, backward)
    else:
        backward = Backward()
    updated = {id(t) for t in watch.updated}
    mutated = frozenset(
        n
        for n, b in module.named_buffers()
        if n not in buffers or b is not buffers[n] or b._version != before[n] or id(b) in updated
    )
    again = {i for i, t in enumerate(outputs) if any(t is other for other in outputs[:i])}
    return Run(
        outputs=outputs,
        results=results,
        is_random=watch.is_random,
        mutated=mutated,
        norm_calls=tuple(calls),
        # One tensor given twice would have its gradients added in the order of no layout in particular.
        strided_outputs=frozenset(i for i, t in enumerate(outputs) if not is_straight(t)) | again,
        strided_gradients=backward.strided_gradients,
        withholds=backward.withholds,
        kept=kept,
        label_means=label_means(watch.label_means, function, tensors, outputs),
        plain_state=(plain, plain_state(function)),
        generators=tuple(watch.generators),
    )


def _fake(spec: TensorSpec, trial: Trial, device: torch.device | None) -> torch.Tensor:
    """A tensor without data. One that requires grad is not a leaf, as in the middle of a graph."""
    shape = spec.shape_at(trial.samples, dict(trial.lengths))
    tensor = torch.empty(shape, dtype=getattr(torch, spec.dtype), device=device or "cpu")
    return tensor.requires_grad_().clone() if spec.requires_grad else tensor


def fake_copy(name: str, module: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """The module with tensors that have no data, in training mode."""
    if any(t.is_meta for t in (*module.parameters(), *module.buffers())):
        raise GraphError(
            f"layer {name!r}: its {type(module).__name__} is on the meta device and has no weights to train; give "
            "pf.lazy(factory, ...) instead"
        )
    check_module(name, module)
    try:
        with FakeCopyMode(mode):
            return copy.deepcopy(module).train()
    except Exception as error:
        raise GraphError(
            f"layer {name!r}: its {type(module).__name__} cannot be copied ({type(error).__name__}: {error}); "
            "give pf.lazy(factory, ...) so that it is built where it runs"
        ) from error


def _refusal(
    name: str, source: Source, function: object, inputs: Sequence[TensorSpec], trial: Trial, error: Exception
) -> GraphError:
    """The error for a layer that does not run, from the exception it raised."""
    who = f"layer {name!r} ({kind_of(source)})"
    if isinstance(error, DynamicOutputShapeException | DataDependentOutputException):
        return ShapeError(
            f"{who}, given {list_specs(inputs)}: what it gives depends on the data ({error}); shapes and control flow "
            "must follow from shapes alone"
        )
    if isinstance(error, UnsupportedOperatorException):
        return ShapeError(
            f"{who} uses {error}, whose result torch cannot tell without data (nested tensors, for example); pad, or "
            "use operators that can run on the meta device"
        )
    reason = str(error).strip()
    if "convert all Tensors to FakeTensors" in reason:
        return GraphError(
            f"{who} uses a tensor that is neither an input nor its own parameter or buffer; pass it as an input or "
            "register it in a module"
        )
    expected = _expected(function)
    return ShapeError(
        f"{who} does not take what it is given: {list_specs(inputs)}"
        f"{f'; it expects {expected}' if expected else ''}. "
        f"{type(error).__name__}, tried with {trial}: {reason}"
    )


def _expected(function: object) -> str:
    """What a module says of its input: its own attributes, else the shapes of its parameters."""
    if not isinstance(function, nn.Module):
        return ""
    dtype = next((f"{dtype_name(p.dtype)} " for p in function.parameters(recurse=False)), "")
    for attribute, text in (
        ("in_features", "(B, ..., {})"),
        ("in_channels", "(B, {}, ...)"),
        ("num_features", "(B, {}, ...)"),
        ("num_channels", "(B, {}, ...)"),
        ("num_embeddings", "integers below {}"),
    ):
        if isinstance(value := getattr(function, attribute, None), int):
            return text.format(value) if attribute == "num_embeddings" else dtype + text.format(value)
    if isinstance(value := getattr(function, "normalized_shape", None), tuple):
        return f"{dtype}(B, ..., {', '.join(map(str, value))})"
    shapes = [f"{n} {spec_of(p)}" for n, p in function.named_parameters()][:4]
    return f"what fits its parameters {', '.join(shapes)}" if shapes else ""


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps torch from logging tracebacks of layers that do not fit: the error says it."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    was, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = was
