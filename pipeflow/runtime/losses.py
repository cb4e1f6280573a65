"""The losses of a batch: what each micro-batch's counts, and their sum, agreed by all ranks.

Each rank fills in the micro-batches it ran; a sum over the ranks completes the table, exactly,
since every entry is a number once and zero elsewhere. Then every rank adds up the micro-batches
in the same order, so all ranks and all layouts have the same losses to the last bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pipeflow.errors import BatchError
from pipeflow.graphs.layer import Layer
from pipeflow.graphs.layer_graph import LayerGraph


def loss_factors(loss: Layer, sizes: Sequence[int], counted: Sequence[Tensor | None] = ()) -> list[float]:
    """What each micro-batch's loss counts in the batch's: its share of samples or of counts, or 1 for a sum.

    Args:
        loss: the loss layer.
        sizes: samples of each micro-batch.
        counted: each micro-batch's part of the loss's `count` input, if it has one.

    Raises:
        BatchError: the counts of the batch are negative, not finite or all 0.
    """
    if loss.reduction == "sum":
        return [1.0] * len(sizes)
    if loss.count is None:
        return [size / sum(sizes) for size in sizes]
    counts = [0.0 if part is None else float(part.double().sum()) for part in counted]
    total = sum(counts)
    if not (min(counts) >= 0 and 0 < total < float("inf")):
        raise BatchError(
            f"the counts {loss.count!r} of loss {loss.name!r} add up to {total:g}, {min(counts):g} in one micro-batch; "
            "they must be at least 0, and some above"
        )
    return [count / total for count in counts]


def loss_table(
    graph: LayerGraph,
    values: Mapping[str, Sequence[Tensor | float | None]],
    factors: Mapping[str, Sequence[float]],
    num_microbatches: int,
    tag: int,
) -> Tensor:
    """What one rank gives to the sum: each micro-batch's part in a loss, zero for those it did not compute.

    After these come the batch's tag and a one, by which `same_batch` tells whether all ranks had the same.

    Args:
        values: for each loss that this rank computes, its value on each micro-batch or None.
        factors: what each counts.
        tag: of the batch that this rank was given.

    Returns:
        float64 of losses * micro-batches + 2 elements, on the CPU.
    """
    row = [0.0] * (len(graph.losses) * num_microbatches)
    for index, name in enumerate(graph.losses):
        for m, value in enumerate(values.get(name, ())):
            if value is not None and factors[name][m]:
                row[index * num_microbatches + m] = float(value) * factors[name][m]
    return torch.tensor([*row, tag, 1.0], dtype=torch.float64)


def same_batch(table: Tensor, position: int, tag: int) -> bool:
    """Whether the tags that were added up at `position` are all `tag`, as far as a sum tells."""
    total, num_ranks = table[position : position + 2].tolist()
    return bool(total == num_ranks * tag)


def read_losses(graph: LayerGraph, table: Tensor, num_microbatches: int) -> Mapping[str, float]:
    """Each loss over the whole batch, from the summed table."""
    row, count = table.tolist(), num_microbatches
    return {name: add_parts(row[i * count : (i + 1) * count]) for i, name in enumerate(graph.losses)}


def add_parts(parts: Sequence[float]) -> float:
    """The micro-batches' parts, added in order."""
    total = 0.0
    for part in parts:
        total += part
    return total
