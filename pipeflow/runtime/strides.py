"""Tensors between layers are contiguous, forward and backward, in any layout and on one device.

So are conjugates and negatives, which torch may hold as a mark on the memory of the number itself.

Kernels add in another order over a view than over a contiguous tensor, which shows in the last
bit. What crosses between ranks is contiguous when it arrives; what stays where it is would not
be, and a cut would change the training. So where a layer is known to give a view, or a gradient
that is one (`pipeflow.graphs.inference`), it is made contiguous at the layer's border, by the
pipeline and by the reference alike.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Straight(torch.autograd.Function):
    """A view whose gradient is passed on contiguous."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.resolve_conj().resolve_neg().contiguous()


def straight(value: Tensor) -> Tensor:
    """The value as an input whose gradient is made contiguous."""
    result: Tensor = _Straight.apply(value)  # type: ignore[no-untyped-call]
    return result


def packed(value: Tensor) -> Tensor:
    """The value in memory of its own; a view of one sample may look contiguous and lie elsewhere."""
    return value.clone(memory_format=torch.contiguous_format)
