"""How large the micro-batches of a step are: all that its shapes follow from.

A value that every rank makes for itself from the batch that it is given. Ranks compare it, so that
none takes what another sends of a batch of another size.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate

LengthPairs = tuple[tuple[str, int], ...]
"""(name, size) of lengths, in order of name."""

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
