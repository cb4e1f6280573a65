"""Sums of gradients: over the replicas of a stage, or over all stages that hold copies of a parameter."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


def reduce_gradients(
    copies: Sequence[Sequence[nn.Parameter]],
    start: Callable[[Tensor], Callable[[], Tensor]],
    dtype: torch.dtype | None = None,
) -> Callable[[], None]:
    """Starts to sum gradients with other ranks; the result waits and puts the sums in place, once.

    One message holds all gradients of one dtype, and for each parameter how many ranks have one:
    a parameter without any stays without, as on one device.

    Args:
        copies: for each parameter, those that this rank holds, one at least. Their gradients are
            added first, in that order.
        start: starts the sum of a tensor over the ranks; what it gives waits for it.
        dtype: in which the sum travels; by default each parameter's own.
    """
    by_dtype: dict[torch.dtype, list[Sequence[nn.Parameter]]] = {}
    for held in copies:
        by_dtype.setdefault(held[0].dtype, []).append(held)
    pending = []
    for parameters in by_dtype.values():
        local = [_local_sum(held) for held in parameters]
        present = torch.tensor([float(gradient is not None) for gradient in local]).to(parameters[0][0])
        parts = [
            torch.zeros_like(held[0]).view(-1) if gradient is None else gradient.reshape(-1)
            for held, gradient in zip(parameters, local, strict=True)
        ]
        message = torch.cat([*parts, present])
        if dtype is not None:
            message = message.to(_complex_of(dtype) if message.is_complex() else dtype)
        pending.append((parameters, start(message)))

    def finish() -> None:
        while pending:
            parameters, wait = pending.pop(0)
            total = wait()
            *sums, present = torch.split(total, [*(held[0].numel() for held in parameters), len(parameters)])
            for held, gradient, count in zip(parameters, sums, present.real.tolist(), strict=True):
                for i, parameter in enumerate(held):
                    # Each copy has a gradient of its own, since clipping changes it in place.
                    own = gradient.clone() if i else gradient
                    parameter.grad = own.view_as(parameter).to(parameter.dtype) if count else None

    return finish


def _complex_of(dtype: torch.dtype) -> torch.dtype:
    """The complex type of which this is a part; there is none of halves that all kernels know."""
    return torch.complex128 if dtype is torch.float64 else torch.complex64


def _local_sum(held: Sequence[nn.Parameter]) -> Tensor | None:
    total: Tensor | None = None
    for parameter in held:
        if parameter.grad is not None:
            total = parameter.grad if total is None else total + parameter.grad
    return total
