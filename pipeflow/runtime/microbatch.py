"""A batch as micro-batches: which samples each has, of which lengths, and what its losses count.

The one place where the shapes of a step are worked out. Every rank and the reference call the
same functions on what they are given, so all agree without talking: shapes are never exchanged.
A rank need not have the data of inputs that it does not read, but what it is given must tell the
samples and the lengths; a tensor on the meta device does.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from pipeflow.errors import BatchError
from pipeflow.graphs.batch import Extent, measure_batch
from pipeflow.graphs.layer import Layer
from pipeflow.graphs.layer_graph import LayerGraph
from pipeflow.runtime.losses import loss_factors
from pipeflow.runtime.state import read_inputs

Batch = Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]]
"""Tensors by input name, to be cut along their first dimension; or one such mapping for each micro-batch."""

LengthPairs = tuple[tuple[str, int], ...]

_TAG_BASE = 1 << 29


@dataclass(frozen=True)
class Cut:
    """How large the micro-batches of a step are: all that its shapes follow from.

    Attributes:
        sizes: samples of each micro-batch, 0 for one that is not computed.
        lengths: of each micro-batch, (name, size) of every length of the layers that run.
        even: whether it is that of a whole batch: sizes as even as can be, all lengths alike.
    """

    sizes: tuple[int, ...]
    lengths: tuple[LengthPairs, ...]
    even: bool

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """The first sample of each micro-batch."""
        return tuple(accumulate(self.sizes, initial=0))[:-1]

    @cached_property
    def num_samples(self) -> int:
        return sum(self.sizes)

    @cached_property
    def tag(self) -> int:
        """A number below 2**30 that tells cuts apart; that of a batch without lengths is its samples."""
        if self.even and not self.lengths[0] and self.num_samples < _TAG_BASE:
            return self.num_samples
        return _TAG_BASE + zlib.crc32(repr((self.sizes, self.lengths)).encode()) % _TAG_BASE

    def __str__(self) -> str:
        if self.even:
            return ", ".join([f"{self.num_samples} samples", *(f"{name} {size}" for name, size in self.lengths[0])])
        each = (
            f"{size}{' (' if pairs else ''}{', '.join(f'{n} {v}' for n, v in pairs)}{')' if pairs else ''}"
            for size, pairs in zip(self.sizes, self.lengths, strict=True)
        )
        return f"micro-batches of {', '.join(each)} samples"


@lru_cache(maxsize=256)
def even_cut(num_samples: int, num_microbatches: int, lengths: LengthPairs = ()) -> Cut:
    """The cut of a batch: as even as can be, larger ones first, some 0 if there are few.

    >>> even_cut(10, 4).sizes
    (3, 3, 2, 2)
    """
    base, extra = divmod(num_samples, num_microbatches)
    sizes = tuple(base + (m < extra) for m in range(num_microbatches))
    return Cut(sizes, (lengths,) * num_microbatches, even=True)


@dataclass(frozen=True)
class MicroBatches:
    """A batch that fits the graph, and how it is cut.

    Attributes:
        cut: samples and lengths of each.
        given: the batch as it came.
        factors: for each counted loss that is computed here, what each micro-batch's counts in the batch's.
    """

    cut: Cut
    given: Batch
    factors: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def parts(self, name: str, device: torch.device | None = None) -> Sequence[Tensor | None]:
        """An input's part of each micro-batch; None for those that were not given."""
        if isinstance(self.given, Mapping):
            value = self.given[name]
            if device is not None:
                value = value.to(device, non_blocking=True)
            return torch.split(value, list(self.cut.sizes))
        parts = [microbatch[name] for microbatch in self.given]
        if device is not None:
            parts = [part.to(device, non_blocking=True) for part in parts]
        return [*parts, *[None] * (len(self.cut.sizes) - len(parts))]


@dataclass(frozen=True, slots=True)
class Needs:
    """What a batch must tell.

    Attributes:
        inputs: that must be there, with data.
        lengths: that must be known; all that the layers to run depend on, on any rank.
        counted: losses whose counts are added up here.
    """

    inputs: frozenset[str]
    lengths: frozenset[str]
    counted: tuple[Layer, ...]


def needs_of(graph: LayerGraph, layers: Collection[str], inputs: frozenset[str]) -> Needs:
    """What a batch must tell to run layers.

    Args:
        layers: all that run, on any rank.
        inputs: those that this process reads.
    """
    lengths = frozenset(n for name in read_inputs(graph, layers) for n in graph.specs[name].lengths)
    losses = [graph.layers[name] for name in graph.losses if name in layers]
    return Needs(inputs, lengths, tuple(loss for loss in losses if loss.count in inputs))


def make_microbatches(graph: LayerGraph, batch: Batch, num_microbatches: int, needs: Needs) -> MicroBatches:
    """The micro-batches of a batch, or those that were given.

    Args:
        graph: says what fits.
        num_microbatches: into how many a batch is cut, and the most that may be given.
        needs: what it must tell.

    Raises:
        BatchError: the batch does not fit; does not tell a size; has too many micro-batches, or no
            samples; cannot be cut; or its counts make no mean.
    """
    if isinstance(batch, Mapping):
        cut = _cut_of(graph, batch, num_microbatches, needs)
    elif isinstance(batch, Sequence) and all(isinstance(part, Mapping) for part in batch):
        cut = _cut_given(graph, batch, num_microbatches, needs)
    else:
        raise BatchError(
            f"the batch is a {type(batch).__name__}; it must be a mapping of tensors by input name, or a list of such "
            "mappings, one for each micro-batch"
        )
    whole = MicroBatches(cut, batch)
    if not needs.counted:
        return whole
    factors = {loss.name: loss_factors(loss, cut.sizes, whole.parts(loss.count or "")) for loss in needs.counted}
    return MicroBatches(cut, batch, factors)


def _cut_of(graph: LayerGraph, batch: Mapping[str, Tensor], num_microbatches: int, needs: Needs) -> Cut:
    whole = [name for name in batch if name in graph.inputs and graph.inputs[name].shape[:1] != ("B",)]
    if whole:
        raise BatchError(
            f"input {whole[0]!r} is {graph.inputs[whole[0]]}, so a batch with it cannot be cut; give a list of "
            "micro-batches, of one if need be: [batch]"
        )
    extent = measure_batch(graph.inputs, batch, required=needs.inputs, lengths=graph.lengths)
    if not extent.samples:
        raise BatchError("the batch has no samples; it needs at least 1")
    return even_cut(extent.samples, num_microbatches, _pairs(graph, extent, needs.lengths) if needs.lengths else ())


def _cut_given(
    graph: LayerGraph, microbatches: Sequence[Mapping[str, Tensor]], num_microbatches: int, needs: Needs
) -> Cut:
    if len(microbatches) > num_microbatches:
        raise BatchError(
            f"{len(microbatches)} micro-batches are given, and there is room for {num_microbatches}; plan with "
            f"num_microbatches={len(microbatches)}, or join some of them"
        )
    sizes: list[int] = []
    pairs: list[LengthPairs] = []
    for index, batch in enumerate(microbatches):
        try:
            extent = measure_batch(graph.inputs, batch, required=needs.inputs, lengths=graph.lengths)
            if extent.samples is None:
                names = ", ".join(name for name, spec in graph.inputs.items() if spec.scales)
                raise BatchError(f"nothing given tells the number of samples; give one of the inputs {names}")
            sizes.append(extent.samples)
            pairs.append(_pairs(graph, extent, needs.lengths))
        except BatchError as error:
            raise BatchError(f"micro-batch {index}: {error}") from None
    if not any(sizes):
        raise BatchError("the batch has no samples; it needs at least 1 in one of its micro-batches")
    missing = num_microbatches - len(sizes)
    kinds = {pair for size, pair in zip(sizes, pairs, strict=True) if size}
    even = even_cut(sum(sizes), num_microbatches, kinds.pop()) if len(kinds) == 1 else None
    if even is not None and even.sizes == (*sizes, *[0] * missing):
        return even
    return Cut((*sizes, *[0] * missing), (*pairs, *[()] * missing), even=False)


def _pairs(graph: LayerGraph, extent: Extent, lengths: Collection[str]) -> LengthPairs:
    """The lengths that are asked for, and all that layers make of them where there are samples."""
    if unknown := [name for name in graph.lengths if name in lengths and name not in extent.lengths]:
        inputs = ", ".join(name for name, spec in graph.inputs.items() if unknown[0] in spec.lengths)
        raise BatchError(
            f"nothing given tells the length {unknown[0]!r}; give one of the inputs {inputs}, on the meta device if "
            "its data is not read here"
        )
    known = {name: size for name, size in extent.lengths.items() if name in lengths}
    return tuple(sorted((graph.sizes_at(known) if extent.samples else known).items()))
