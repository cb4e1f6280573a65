"""A batch as micro-batches: read, checked and cut, or taken as they are given.

The one place where the sizes of a step are worked out. Every rank and the reference do it for
themselves from what they are given, so all agree without talking: shapes are never exchanged. A
rank need not have the data of inputs that it does not read, but what it is given must tell the
samples and the lengths; a tensor on the meta device does. A batch of the same shapes as the one
before is not looked at again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pipeflow.errors import BatchError, ShapeError
from pipeflow.graphs.batch import Extent, measure_batch
from pipeflow.graphs.layer import Labels, Layer
from pipeflow.graphs.layer_graph import LayerGraph
from pipeflow.runtime.cut import Cut, LengthPairs, even_cut
from pipeflow.runtime.losses import loss_factors
from pipeflow.runtime.state import read_inputs

Batch = Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]]
"""Tensors by input name, to be cut along their first dimension; or one such mapping for each micro-batch."""


@dataclass(frozen=True)
class MicroBatches:
    """A batch that fits the graph, and how it is cut.

    Attributes:
        cut: samples and lengths of each.
        given: the batch as it came.
        factors: for each loss that is computed here and whose samples do not count alike, what each
            micro-batch's counts in the batch's.
    """

    cut: Cut
    given: Batch
    factors: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def parts(self, name: str, device: torch.device | None = None) -> Sequence[Tensor | None]:
        """An input's part of each micro-batch; None for those that were not given."""
        if isinstance(self.given, Mapping):
            value = _trainable(self.given[name])
            if device is not None:
                value = value.to(device, non_blocking=True)
            return torch.split(value, list(self.cut.sizes))
        parts = [_trainable(microbatch[name]) for microbatch in self.given]
        if device is not None:
            parts = [part.to(device, non_blocking=True) for part in parts]
        return [*parts, *[None] * (len(self.cut.sizes) - len(parts))]


class BatchReader:
    """Reads the batches of one kind of work: a training step, or a prediction.

    Args:
        graph: says what fits.
        layers: all that run, on any rank.
        inputs: those that must be there, with data: what this process reads.
        num_microbatches: into how many a batch is cut, and the most that may be given.
        class_weights: what each class counts, for the losses here that count labels by it.
        all_count: whether a micro-batch of samples that count nothing is refused: it has no backward, for
            which replicas with synchronised norms would wait.
    """

    def __init__(
        self,
        graph: LayerGraph,
        layers: Collection[str],
        inputs: frozenset[str],
        num_microbatches: int,
        class_weights: Mapping[str, Tensor] | None = None,
        *,
        all_count: bool = False,
    ) -> None:
        self._all_count = all_count
        self._graph = graph
        self._inputs = inputs
        self._num_microbatches = num_microbatches
        self._lengths = frozenset(n for name in read_inputs(graph, layers) for n in graph.specs[name].lengths)
        losses = [graph.layers[name] for name in graph.losses if name in layers]
        self._counted = [(loss, loss.counted) for loss in losses if loss.counted is not None and loss.counted in inputs]
        self._class_weights = class_weights or {}
        self._signature: Any = None
        self._cut = even_cut(0, num_microbatches)

    def read(self, batch: Batch) -> MicroBatches:
        """The micro-batches of a batch, or those that were given.

        Raises:
            BatchError: the batch does not fit; does not tell a size; has too many micro-batches, or no
                samples; cannot be cut; or its counts make no mean, or none of a micro-batch where each must.
        """
        signature = _signature(batch)
        if signature is None or signature != self._signature:
            self._cut = self._measure(batch)
            self._signature = signature
        microbatches = MicroBatches(self._cut, batch)
        if not self._counted:
            return microbatches
        factors = {}
        for loss, name in self._counted:
            weights = self._class_weights.get(loss.name)
            if loss.labels is None or self._differ(loss.labels, microbatches, weights):
                factors[loss.name] = loss_factors(loss, self._cut.sizes, microbatches.parts(name), weights)
                if self._all_count:
                    self._check_all_count(loss, name, factors[loss.name])
        return MicroBatches(self._cut, batch, factors)

    def _check_all_count(self, loss: Layer, counts: str, factors: Sequence[float]) -> None:
        for m, (size, factor) in enumerate(zip(self._cut.sizes, factors, strict=True)):
            if size and not factor:
                raise BatchError(
                    f"micro-batch {m} counts nothing in loss {loss.name!r}, by {counts!r}, and so has no backward, for "
                    "which replicas with synchronised norms would wait; give each something that counts, or pass "
                    "batch_norm='deferred'"
                )

    @staticmethod
    def _differ(labels: Labels, microbatches: MicroBatches, class_weights: Tensor | None) -> bool:
        """Whether the labels of a sample may count otherwise than those of another."""
        if labels.class_weights is not None:
            return class_weights is not None  # else the loss is elsewhere
        given = microbatches.given
        return not isinstance(given, Mapping) or bool((given[labels.tensor] == labels.ignored).any())

    def _measure(self, batch: Batch) -> Cut:
        if isinstance(batch, Mapping):
            return self._cut_of(batch)
        if isinstance(batch, Sequence) and all(isinstance(part, Mapping) for part in batch):
            return self._cut_given(batch)
        raise BatchError(
            f"the batch is a {type(batch).__name__}; it must be a mapping of tensors by input name, or a list of such "
            "mappings, one for each micro-batch"
        )

    def _cut_of(self, batch: Mapping[str, Tensor]) -> Cut:
        inputs = self._graph.inputs
        if whole := [name for name in batch if name in inputs and inputs[name].shape[:1] != ("B",)]:
            raise BatchError(
                f"input {whole[0]!r} is {inputs[whole[0]]}, so a batch with it cannot be cut; give a list of "
                "micro-batches, of one if need be: [batch]"
            )
        extent = self._extent(batch)
        if not extent.samples:
            raise BatchError("the batch has no samples; it needs at least 1")
        return even_cut(extent.samples, self._num_microbatches, self._pairs(extent))

    def _cut_given(self, microbatches: Sequence[Mapping[str, Tensor]]) -> Cut:
        count = self._num_microbatches
        if len(microbatches) > count:
            raise BatchError(
                f"{len(microbatches)} micro-batches are given, and there is room for {count}; plan with "
                f"num_microbatches={len(microbatches)}, or join some of them"
            )
        sizes: list[int] = []
        pairs: list[LengthPairs] = []
        for index, batch in enumerate(microbatches):
            try:
                extent = self._extent(batch)
                sizes.append(extent.samples or 0)
                pairs.append(self._pairs(extent))
            except BatchError as error:
                raise BatchError(f"micro-batch {index}: {error}") from None
        if not any(sizes):
            raise BatchError("the batch has no samples; it needs at least 1 in one of its micro-batches")
        missing = count - len(sizes)
        even = even_cut(sum(sizes), count, pairs[0])
        if even.sizes == (*sizes, *[0] * missing) and len(set(pairs)) == 1:
            return even
        return Cut((*sizes, *[0] * missing), (*pairs, *[()] * missing), even=False)

    def _extent(self, batch: Mapping[str, Tensor]) -> Extent:
        inputs = self._graph.inputs
        extent = measure_batch(inputs, batch, required=self._inputs, lengths=self._graph.lengths)
        if extent.samples is None:
            names = ", ".join(name for name, spec in inputs.items() if spec.scales)
            raise BatchError(f"nothing given tells the number of samples; give one of the inputs {names}")
        return extent

    def _pairs(self, extent: Extent) -> LengthPairs:
        """The lengths that the layers depend on, and all that layers make of them where there are samples."""
        graph = self._graph
        if unknown := [name for name in graph.lengths if name in self._lengths and name not in extent.lengths]:
            inputs = ", ".join(name for name, spec in graph.inputs.items() if unknown[0] in spec.lengths)
            raise BatchError(
                f"nothing given tells the length {unknown[0]!r}; give one of the inputs {inputs}, on the meta device "
                "if its data is not read here"
            )
        known = {name: size for name, size in extent.lengths.items() if name in self._lengths}
        try:
            return tuple(sorted((graph.sizes_at(known) if extent.samples else known).items()))
        except ShapeError as error:
            sizes = ", ".join(f"{name} {size}" for name, size in known.items())
            raise BatchError(
                f"the graph does not take a batch of {sizes}; say what it takes by pf.Length: {error}"
            ) from error


def _trainable(value: Tensor) -> Tensor:
    """The tensor, of which backward may save parts: one made in inference mode is copied."""
    return value.clone() if value.is_inference() and not torch.is_inference_mode_enabled() else value


def _signature(batch: Any) -> Any:
    """Equal for batches that are checked and cut alike; None where something is no tensor."""
    if not isinstance(batch, Mapping):
        parts = [_signature(part) for part in batch] if type(batch) in (list, tuple) else [None]
        return None if None in parts else parts
    if not all(type(value) is Tensor and value.layout is torch.strided for value in batch.values()):
        return None
    return [(name, v.shape, v.dtype, v.is_meta, v.requires_grad) for name, v in batch.items()]
