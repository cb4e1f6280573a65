"""One training forward of a layer on tensors without data, and what is seen on the way.

Fake kernels check less than real ones; what is known to slip through (mixed dtypes, running
statistics, changes in place) is watched here. Which shapes to try is not decided here.
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
from torch.utils._python_dispatch import TorchDispatchMode

from pipeflow.errors import GraphError, ShapeError
from pipeflow.graphs.calling import read_results
from pipeflow.graphs.effects import Effects, check_effects, foreign_calls, kept_tensors
from pipeflow.graphs.label_means import LABEL_OPS, LabelMean, SeenMean, label_means, seen_mean
from pipeflow.graphs.layer import Source, kind_of
from pipeflow.graphs.module_check import check_module
from pipeflow.graphs.nesting import Nest, rebuild
from pipeflow.graphs.norms import norm_calls, refuse_synchronised
from pipeflow.graphs.numerics import Numerics
from pipeflow.graphs.tensor_spec import TensorSpec, list_specs
from pipeflow.graphs.trials import Trial

# Fake kernels of these let dtypes pass that the real ones refuse.
_SAME_DTYPE_OPS = frozenset({"mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "convolution"})
_NORM_OPS = frozenset({"native_layer_norm", "native_batch_norm", "native_group_norm"})
# Batch-norm kernels update running statistics without saying so in their signature.
_BATCH_NORM_OPS = frozenset({"native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm"})


@dataclass(frozen=True, slots=True)
class Run:
    outputs: tuple[torch.Tensor, ...]
    results: Nest
    is_random: bool
    mutated: frozenset[str]
    norm_calls: tuple[str, ...]
    strided_outputs: frozenset[int]
    strided_gradients: frozenset[int]
    kept: Mapping[str, torch.Tensor]
    label_means: tuple[LabelMean, ...]


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's base is not annotated
    """Sees every kernel: random ones, running statistics, and dtypes that real kernels refuse."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_random = False
        self.updated: list[torch.Tensor] = []
        self.label_means: list[SeenMean] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        op = func._schema.name.removeprefix("aten::")
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.is_random = True
        if op.startswith("quantize_per_"):
            raise RuntimeError(
                f"{op} makes a quantized tensor, which autograd and transfers do not know; fake-quantize"
            )
        if op in _SAME_DTYPE_OPS or op in _NORM_OPS or op == "_prelu_kernel":
            _check_same_dtype(op, args)
        if op in LABEL_OPS:
            _check_target(args[1])
        if op in _BATCH_NORM_OPS and args[5]:
            self.updated += [t for t in args[3:5] if t is not None]
        result = func(*args, **(kwargs or {}))
        if op in LABEL_OPS and (mean := seen_mean(args, result)) is not None:
            self.label_means.append(mean)
        return result


def _check_same_dtype(op: str, args: tuple[Any, ...]) -> None:
    dtypes = list(dict.fromkeys(a.dtype for a in args if isinstance(a, torch.Tensor)))
    if op in _NORM_OPS and dtypes[0] in (torch.bfloat16, torch.float16) and dtypes[1:] == [torch.float32]:
        return  # half inputs with float32 statistics are ordinary
    if len(dtypes) > 1:
        raise RuntimeError(f"{op} takes tensors of one dtype, not {' and '.join(dtype_name(d) for d in dtypes)}")


def _check_target(target: torch.Tensor) -> None:
    if target.dtype not in (torch.int64, torch.uint8):
        raise RuntimeError(f"class indices must be int64, not {dtype_name(target.dtype)}")


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
    with (
        torch.enable_grad(),
        numerics.context(),
        mode,
        norm_calls(function) as calls,
        foreign_calls(function) as foreign,
        effects,
        _Watch() as watch,
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
    check_effects(f"layer {name!r} ({kind_of(source)})", function, tensors, outputs, effects, foreign, kept)
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
        strided_gradients=_strided_gradients(mode, tensors, outputs),
        kept=kept,
        label_means=label_means(watch.label_means, function, tensors, outputs),
    )


def is_straight(tensor: torch.Tensor) -> bool:
    """Whether the memory of a tensor holds its numbers in order, and not their conjugates or negatives."""
    return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def _strided_gradients(
    mode: FakeTensorMode, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]
) -> frozenset[int]:
    """The inputs whose gradients are not contiguous though those of the outputs are.

    All that could have one, where backward does not run without data.
    """
    learned = [i for i, t in enumerate(inputs) if t.requires_grad]
    roots = [t for t in outputs if t.requires_grad]
    if not learned or not roots:
        return frozenset()
    try:
        with mode:
            ones = [torch.ones(t.shape, dtype=t.dtype, device=t.device) for t in roots]
            gradients = torch.autograd.grad(roots, [inputs[i] for i in learned], ones, allow_unused=True)
    except Exception:  # whatever a backward may need that is not here
        return frozenset(learned)
    return frozenset(i for i, g in zip(learned, gradients, strict=True) if g is not None and not is_straight(g))


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


def spec_of(tensor: torch.Tensor) -> TensorSpec:
    return TensorSpec(tuple(int(n) for n in tensor.shape), dtype_name(tensor.dtype), tensor.requires_grad)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps torch from logging tracebacks of layers that do not fit: the error says it."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    was, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = was
