"""Batch-norm over the micro-batches that the replicas of a stage run at the same time.

A stage with R replicas runs micro-batches in groups of R. A synchronised norm divides by the
statistics of its whole group, as `torch.nn.SyncBatchNorm` does by those of all ranks:

    forward     count, mean and squared deviations of each channel, of every micro-batch of the
                group, joined in the order of the micro-batches (Chan et al., "Updating formulae and
                a pairwise algorithm for computing sample variances", 1979)
    backward    the sums of the gradient, and of the gradient times the normalised input, over
                the group; what goes to weight and bias is each replica's own, and summed with all
                other gradients

Knows nothing of ranks or transports: how to reach the others of a group is given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@dataclass(frozen=True, slots=True)
class Group:
    """The micro-batches that are normalised together, as one of their replicas sees them.

    Attributes:
        size: how many have samples, this one included.
        gather: gives the others a float64 CPU tensor and takes theirs: a row for each micro-batch, in
            their order. Each calls it as often, in the same order.
    """

    size: int
    gather: Callable[[Tensor], Tensor]


def normalise(norm: _BatchNorm, input: Tensor, group: Group) -> tuple[Tensor, int, tuple[Tensor, Tensor]]:
    """Calls a norm that is in training on the input, with the statistics of the group.

    Returns:
        The output; of the group, how many values a channel has, and its mean and unbiased variance
        (float64 on the CPU). The norm's running statistics stay as they are.

    Raises:
        ValueError: the group has one value in each channel.
    """
    norm._check_input_dim(input)  # type: ignore[no-untyped-call]  # torch's
    dims = [d for d in range(input.dim()) if d != 1]
    num_values = input.numel() // input.shape[1]
    with torch.no_grad():
        variance, mean = torch.var_mean(_wide(input), dims, correction=0)
        row = torch.cat([mean.double(), variance.double() * num_values, mean.new_tensor([num_values]).double()])
        rows = group.gather(row.cpu())
    count, mean, squares = _join(rows)
    if count < 2:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.size()}")
    statistics = mean, squares / (count - 1)
    dtype = torch.promote_types(input.dtype, torch.float32)
    mean, variance = (t.to(input.device, dtype) for t in (mean, squares / count))
    weight = norm.weight.to(dtype) if norm.weight is not None else torch.ones_like(mean)
    bias = norm.bias.to(dtype) if norm.bias is not None else torch.zeros_like(mean)
    output = _Normalise.apply(input, weight, bias, mean, variance, norm.eps, int(count), group)  # type: ignore[no-untyped-call]
    return output, int(count), statistics


def _wide(input: Tensor) -> Tensor:
    """In a type that sums of squares fit."""
    return input.to(torch.promote_types(input.dtype, torch.float32))


def _join(rows: Tensor) -> tuple[float, Tensor, Tensor]:
    """(values of each channel, mean, squared deviations from it) of all rows together."""
    channels = (rows.shape[1] - 1) // 2
    means, squares, counts = torch.split(rows, [channels, channels, 1], dim=1)
    total = counts.sum()
    mean = (counts * means).sum(0) / total
    return float(total), mean, (squares + counts * (means - mean).square()).sum(0)


class _Normalise(torch.autograd.Function):
    """Normalises by given statistics, as if they were the input's own: backward goes through them too."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        variance: Tensor,
        eps: float,
        count: int,
        group: Group,
    ) -> Tensor:
        ctx.save_for_backward(input, weight, mean, variance)
        ctx.eps, ctx.count, ctx.group = eps, count, group
        return nn.functional.batch_norm(input, mean, variance, weight, bias, training=False, eps=eps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, mean, variance = ctx.saved_tensors
        # With statistics that are taken for constants: of the input, the weight and the bias.
        constant, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            gradient.contiguous(), input, weight, mean, variance, None, None, False, ctx.eps, [True, True, True]
        )
        sums = ctx.group.gather(torch.cat([of_weight, of_bias]).double().cpu()).sum(0)
        scaled_sum, plain_sum = sums.to(mean.device, mean.dtype).chunk(2)
        invstd = (variance + ctx.eps).rsqrt()
        # What the statistics add for each value is affine in the value, channel by channel.
        slope = -weight * invstd.square() * scaled_sum / ctx.count
        offset = -weight * invstd * plain_sum / ctx.count - slope * mean
        shape = [1, -1, *[1] * (input.dim() - 2)]
        constant += (_wide(input) * slope.view(shape) + offset.view(shape)).to(constant.dtype)
        return constant, of_weight, of_bias, None, None, None, None, None
