"""Means that torch takes over labels: of those that it leaves out, and of classes that count more than others.

Cross-entropy divides by what its labels count, not by their number. Over micro-batches that is no
mean of means: each must count what its labels do. Here is what sees such a mean in a run without
data, and what tells whether the labels of a batch say how it is to be weighed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional

from pipeflow.errors import GraphError
from pipeflow.graphs.layer import Labels

if TYPE_CHECKING:
    from pipeflow.graphs.inference import Inferred

LABEL_OPS = frozenset({"nll_loss_forward", "nll_loss2d_forward"})
"""Kernels with the arguments (scores, labels, weights of classes, reduction, label to leave out)."""

_MEAN = 1
_USUAL = -100
"""The label that torch leaves out where nobody says which."""

_OWN = [getattr(functional, name, None) for name in ("cross_entropy", "nll_loss", "linear_cross_entropy")]
_OWN_MODULES = [getattr(nn, name, None) for name in ("CrossEntropyLoss", "NLLLoss", "LinearCrossEntropyLoss")]


class SeenMean(NamedTuple):
    """A call of such a kernel that took a mean."""

    labels: Tensor
    weights: Tensor | None
    ignored: int
    result: Tensor


def seen_mean(args: Sequence[Any], result: Any) -> SeenMean | None:
    """The call of a kernel of `LABEL_OPS`, if it took a mean."""
    return SeenMean(args[1], args[2], args[4], result[0]) if args[3] == _MEAN else None


@dataclass(frozen=True, slots=True)
class LabelMean:
    """A mean over labels within a layer.

    Attributes:
        position: of the input that has the labels, all of them; None where none has.
        ignored: the label that it leaves out.
        is_weighted: whether classes count unequally.
        class_weights: the buffer that says what each class counts; None where there is none.
        is_result: whether it is what the layer gives.
        is_smoothed: whether that is so but for torch's label smoothing.
    """

    position: int | None
    ignored: int
    is_weighted: bool
    class_weights: str | None
    is_result: bool
    is_smoothed: bool


def label_means(
    seen: Sequence[SeenMean], function: Callable[..., Any], inputs: Sequence[Tensor], outputs: Sequence[Tensor]
) -> tuple[LabelMean, ...]:
    """What is known of the means that a layer took over labels.

    Args:
        seen: the calls, in one run.
        function: the layer's callable.
        inputs, outputs: of the run.
    """
    buffers = dict(function.named_buffers()) if isinstance(function, nn.Module) else {}
    own = function.func if isinstance(function, partial) else function
    is_own = own in _OWN or type(own) in _OWN_MODULES
    return tuple(
        LabelMean(
            position=next((i for i, t in enumerate(inputs) if _has_all(t, mean.labels)), None),
            ignored=mean.ignored,
            is_weighted=mean.weights is not None,
            class_weights=next((name for name, b in buffers.items() if b is mean.weights), None),
            is_result=len(outputs) == 1 and outputs[0] is mean.result,
            is_smoothed=is_own and outputs[0] is not mean.result,
        )
        for mean in seen
    )


def _has_all(input: Tensor, labels: Tensor) -> bool:
    """Whether the labels are the input's numbers, in another shape at most."""
    return input.untyped_storage()._cdata == labels.untyped_storage()._cdata and input.numel() == labels.numel()


def counted_labels(
    name: str, facts: Inferred, reads: Sequence[str], graph_inputs: Collection[str]
) -> tuple[Labels | None, int | None]:
    """What says how much a micro-batch of a loss counts, and the label that must not be in it.

    The first where the loss is a mean over labels that are an input of the graph; the second
    where a mean that it takes would leave some out, and what is left could not be counted.

    Args:
        name: of the loss, for errors.
        facts: what inference found of it.
        reads: its inputs.
        graph_inputs: the names of what a batch brings.

    Raises:
        GraphError: its labels count unequally in any case, and cannot be counted.
    """
    for mean in facts.label_means:
        named = mean.position is not None and reads[mean.position] in graph_inputs
        weighed = not mean.is_weighted or mean.class_weights is not None
        alone = len(facts.label_means) == 1 and (mean.is_result or mean.is_smoothed)
        if named and weighed and alone:
            assert mean.position is not None
            # Smoothed and weighted, torch divides by the weights of the ignored labels too, in one of its two terms.
            barred = mean.ignored if mean.is_smoothed and mean.is_weighted else None
            return Labels(reads[mean.position], mean.ignored, mean.class_weights), barred
        if mean.is_weighted or mean.ignored != _USUAL:
            what = "classes that count unequally" if mean.is_weighted else f"ignore_index={mean.ignored}"
            raise GraphError(
                f"loss {name!r} takes a mean over labels with {what}, and what a micro-batch counts in it cannot be "
                "told: pass count=, an input that says what each label counts, or let torch's cross-entropy itself be "
                "the loss, of labels that are an input of the graph"
            )
    return None, _USUAL if facts.label_means else None
