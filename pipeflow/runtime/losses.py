"""The losses of a batch, agreed by all ranks.

Each rank fills in the micro-batches it ran; a sum over the ranks completes the table, exactly,
since every entry is a number once and zero elsewhere. Then every rank adds up the micro-batches
in the same order, so all ranks and all layouts have the same losses to the last bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pipeflow.graphs.layer_graph import LayerGraph
from pipeflow.runtime.microbatch import loss_factor


def loss_table(graph: LayerGraph, values: Mapping[str, Sequence[Tensor | None]], num_microbatches: int) -> Tensor:
    """What one rank gives to the sum: losses by micro-batch, zero for those it did not compute.

    Args:
        values: for each loss that this rank computes, its value on each micro-batch or None.

    Returns:
        float64 of losses * micro-batches elements, on the CPU.
    """
    row = [0.0] * (len(graph.losses) * num_microbatches)
    for index, name in enumerate(graph.losses):
        for m, value in enumerate(values.get(name, ())):
            if value is not None:
                row[index * num_microbatches + m] = float(value)
    return torch.tensor(row, dtype=torch.float64)


def read_losses(graph: LayerGraph, table: Tensor, sizes: Sequence[int]) -> Mapping[str, float]:
    """Each loss over the whole batch, from the summed table."""
    row, count = table.tolist(), len(sizes)
    return {
        name: add_losses(graph, name, row[i * count : (i + 1) * count], sizes) for i, name in enumerate(graph.losses)
    }


def add_losses(graph: LayerGraph, name: str, values: Sequence[float], sizes: Sequence[int]) -> float:
    """One loss over the batch: its micro-batches, weighted, added in order."""
    reduction, num_samples = graph.layers[name].reduction, sum(sizes)
    total = 0.0
    for value, size in zip(values, sizes, strict=True):
        if size:
            total += value * loss_factor(reduction, size, num_samples)
    return total
