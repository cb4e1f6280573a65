"""Whether a layer looks at one step of a sequence alone, found by trying.

From outside nobody can tell that a function sums over steps, attends to others or adds a table of
positions. What can be told is whether it gives, for some steps by themselves, what it gives for
these within a sequence:

    whole     f(x)                  y0 y1 y2        a layer that looks at one step alone
    pieces    f(x[:, :1])           y0
              f(x[:, 1:])              y1 y2

It is tried on random numbers, in evaluation, with parameters moved a little from where they are: a
table that starts at zero will not stay there. What does not run on such numbers is not judged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeflow.graphs.calling import flat_call
from pipeflow.graphs.layer import Instance, Layer, Lazy, Source
from pipeflow.graphs.randomness import isolated
from pipeflow.graphs.sizes import Length, size_of
from pipeflow.graphs.tensor_spec import TensorSpec

_SAMPLES = 2
_MOST_STEPS = 12
_AT_ONE_STEP = (nn.Linear, nn.Embedding)
"""Large, and known to look at one step alone: not tried."""


def is_known(source: Source) -> bool:
    """Whether a layer need not be tried, nor built for that."""
    return (isinstance(source, Lazy) and source.factory in _AT_ONE_STEP) or (
        isinstance(source, Instance) and type(source.module) in _AT_ONE_STEP
    )


def obstacle_of(
    layer: Layer,
    function: Callable[..., Any],
    specs: Mapping[str, TensorSpec],
    length: Length,
    sizes: Callable[[int], Mapping[str, int]],
) -> str:
    """Why the layer would not give step by step what it gives for the whole; "" where nothing says so.

    Args:
        layer: how it is called.
        function: its callable, built for this: it is changed.
        specs: of its inputs and outputs.
        length: of which steps are taken.
        sizes: all lengths, when this one has a size.
    """
    inputs = [specs[t] for t in layer.inputs]
    cut = _cut_of(length)
    if cut is None or any(_steps(spec, length.name) is None for spec in inputs):
        return ""
    first, total = cut
    for tensor in layer.outputs:
        if _steps(specs[tensor], length.name) is None:
            return f"it gives {specs[tensor]}, which is no number of steps for each step"
    with isolated(0), torch.no_grad():
        if isinstance(function, nn.Module):
            _moved(function)
        call = flat_call(layer, function)
        given = [_random(spec, sizes(total)) for spec in inputs]
        try:
            whole = _outputs(call(*given))
            if not _close(whole, _outputs(call(*given))):  # random in evaluation: there is nothing to compare
                return ""
        except Exception:  # what these numbers are no input for
            return ""
        for start, stop in ((0, first), (first, total)):
            piece = [_cut(t, spec, length.name, start, stop) for t, spec in zip(given, inputs, strict=True)]
            try:
                seen = _outputs(call(*piece))
            except Exception:  # it says so itself when it is given so few steps
                continue
            outputs = [specs[t] for t in layer.outputs]
            expected = [_cut(t, spec, length.name, start, stop) for t, spec in zip(whole, outputs, strict=True)]
            if not _close(expected, seen):
                return "for some steps by themselves it gives something else than for these within a sequence"
    return ""


def _cut_of(length: Length) -> tuple[int, int] | None:
    """How many steps to take at first, and all in all; None where there are not enough."""
    least = next(n for n in range(length.low, length.low + length.multiple_of) if length.allows(n))
    allowed = [n for n in range(least, _MOST_STEPS * least + 1, least) if length.allows(n)]
    return (allowed[len(allowed) // 3], allowed[-1]) if len(allowed) > 1 else None


def _steps(spec: TensorSpec, length: str) -> list[tuple[int, int, bool]] | None:
    """(dimension, entries for each step, whether the batch is folded in); None where a size is of another kind."""
    found = []
    for dim, written in enumerate(spec.shape):
        size = size_of(written)
        names = [name for name, _ in size.terms]
        if any(name.startswith("<") for name in names):
            return None
        if length in names:
            if len(names) > 1 or size.constant:
                return None
            found.append((dim, size.terms[0][1], size.batch))
    return found


def _cut(tensor: Tensor, spec: TensorSpec, length: str, start: int, stop: int) -> Tensor:
    """Some steps of a tensor."""
    for dim, times, folded in _steps(spec, length) or ():
        if folded:
            tensor = tensor.view(*tensor.shape[:dim], _SAMPLES, -1, *tensor.shape[dim + 1 :])
            tensor = tensor.narrow(dim + 1, times * start, times * (stop - start)).flatten(dim, dim + 1)
        else:
            tensor = tensor.narrow(dim, times * start, times * (stop - start))
    return tensor.contiguous()


def _moved(module: nn.Module) -> None:
    """Brings the module to evaluation, on float32 or wider, with parameters that are no round numbers."""
    module.eval()
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = tensor.data.to(_wide(tensor.dtype))
    for parameter in module.parameters():
        if parameter.is_floating_point():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)


def _random(spec: TensorSpec, lengths: Mapping[str, int]) -> Tensor:
    """Normal numbers; integers below 2, of which there is nearly always an entry."""
    shape, dtype = spec.shape_at(_SAMPLES, lengths), getattr(torch, spec.dtype)
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape, dtype=_wide(dtype))
    return torch.randint(0, 2, shape).to(dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else dtype


def _outputs(result: Any) -> Sequence[Tensor]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _close(expected: Sequence[Tensor], seen: Sequence[Tensor]) -> bool:
    """Whether tensors are equal, up to the order of sums."""
    return all(
        a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=1e-3, atol=1e-4 * _scale(a), equal_nan=True)
        for a, b in zip(expected, seen, strict=True)
    )


def _scale(tensor: Tensor) -> float:
    finite = tensor.double().nan_to_num(0.0, 0.0, 0.0).abs()
    return float(finite.max()) if finite.numel() else 0.0
