"""A batch cut into micro-batches.

Decides which samples each has. Every rank and the reference call the same functions, so all
agree without talking.
"""

from __future__ import annotations

import torch
from torch import Tensor


def microbatch_sizes(num_samples: int, num_microbatches: int) -> tuple[int, ...]:
    """Samples of each micro-batch: as even as can be, larger ones first, some 0 if there are few.

    >>> microbatch_sizes(10, 4)
    (3, 3, 2, 2)
    """
    base, extra = divmod(num_samples, num_microbatches)
    return tuple(base + (m < extra) for m in range(num_microbatches))


def split(value: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
    """The micro-batches of one input, as views."""
    return torch.split(value, list(sizes))
