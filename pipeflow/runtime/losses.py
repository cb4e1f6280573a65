"""The losses of a batch: what each micro-batch's counts, and their sum, agreed by all ranks.

Each rank fills in the micro-batches it ran; a sum over the ranks completes the table, exactly,
since every entry is a number once and zero elsewhere. Then every rank adds up the micro-batches
in the same order, so all ranks and all layouts have the same losses to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pipeflow.errors import BatchError
from pipeflow.graphs.layer import Labels, Layer
from pipeflow.graphs.layer_graph import LayerGraph


def loss_factors(
    loss: Layer, sizes: Sequence[int], counted: Sequence[Tensor | None] = (), class_weights: Tensor | None = None
) -> list[float]:
    """What each micro-batch's loss counts in the batch's: its share of samples or of counts, or 1 for a sum.

    Args:
        loss: the loss layer.
        sizes: samples of each micro-batch.
        counted: each micro-batch's part of the loss's `counted` input, if it is to be looked at.
        class_weights: what each class counts, where labels are counted.

    Raises:
        BatchError: the counts of the batch are negative, not finite or all 0.
    """
    if loss.reduction == "sum":
        return [1.0] * len(sizes)
    if not counted:
        return [size / sum(sizes) for size in sizes]
    labels = loss.labels
    counts = [
        0.0
        if part is None
        else float(part.double().sum())
        if labels is None
        else count_labels(labels, part, class_weights)
        for part in counted
    ]
    total = sum(counts)
    if not (min(counts) >= 0 and 0 < total < float("inf")):
        what = "counts" if labels is None else f"labels other than {labels.ignored}, by the weights of their classes,"
        raise BatchError(
            f"the {what} {loss.counted!r} of loss {loss.name!r} add up to {total:g}, {min(counts):g} in one "
            "micro-batch; they must be at least 0, and some above"
        )
    return [count / total for count in counts]


def count_labels(labels: Labels, part: Tensor, class_weights: Tensor | None) -> float:
    """What torch's mean over these labels divides by.

    Raises:
        BatchError: a label is none of the weighted classes.
    """
    numbers = part.long()  # as torch compares those of other types
    if class_weights is None:
        return float((numbers != labels.ignored).sum())
    kept = numbers[numbers != labels.ignored].to(class_weights.device)
    if kept.numel() and not 0 <= int(kept.min()) <= int(kept.max()) < len(class_weights):
        raise BatchError(
            f"the labels {labels.tensor!r} lie between {int(kept.min())} and {int(kept.max())}, and there are weights "
            f"for {len(class_weights)} classes; give labels from 0 to {len(class_weights) - 1}, or {labels.ignored} "
            "for those that do not count"
        )
    return float(class_weights.double()[kept].sum())


def class_weights(graph: LayerGraph, modules: Mapping[str, nn.Module]) -> Mapping[str, Tensor]:
    """What each class counts, for the losses among the modules whose labels are counted by it; not copies."""
    return {
        name: modules[name].get_buffer(labels.class_weights)
        for name in graph.losses
        if name in modules and (labels := graph.layers[name].labels) is not None and labels.class_weights is not None
    }


def barring(loss: Layer, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of a loss, which is not given the label that nobody could weigh (`Layer.barred_label`).

    Raises, when it is called:
        BatchError: the label is there.
    """
    label = loss.barred_label
    assert label is not None

    def call(*args: Any, **kwargs: Any) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor) and _may_label(tensor) and bool(tensor.eq(label).any()):
                raise BatchError(
                    f"loss {loss.name!r} was given labels of {label}, which torch's mean leaves out, and "
                    "what its micro-batches count cannot be told: pass count=, an input that says what each label "
                    "counts, or let torch's cross-entropy itself be the loss, without label smoothing where classes "
                    "have weights, of labels that are an input of the graph"
                )
        return function(*args, **kwargs)

    return call


def _may_label(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.int64, torch.int32, torch.int16, torch.int8)


def loss_table(
    graph: LayerGraph,
    values: Mapping[str, Sequence[Tensor | float | None]],
    factors: Mapping[str, Sequence[float]],
    num_microbatches: int,
    tag: int,
) -> Tensor:
    """What one rank gives to the sum: each micro-batch's part in a loss, zero for those it did not compute.

    After these come the call's tag and a one, by which `same_call` tells whether all ranks made the same.

    Args:
        values: for each loss that this rank computes, its value on each micro-batch or None.
        factors: what each counts.
        tag: of the call that this rank makes.

    Returns:
        float64 of losses * micro-batches + 2 elements, on the CPU.
    """
    row = [0.0] * (len(graph.losses) * num_microbatches)
    for index, name in enumerate(graph.losses):
        for m, value in enumerate(values.get(name, ())):
            if value is not None and factors[name][m]:
                row[index * num_microbatches + m] = float(value) * factors[name][m]
    return torch.tensor([*row, tag, 1.0], dtype=torch.float64)


def same_call(table: Tensor, position: int, tag: int) -> bool:
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
