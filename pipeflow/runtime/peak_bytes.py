"""The most bytes that a rank's tensors take during one step, counted while it runs.

On the CPU operators are watched (`pipeflow.graphs.live_bytes`), which slows the step down; on CUDA
the allocator has counted anyway. What is there before counts too: parameters, buffers, gradients,
the optimizer's state, and of the batch what the rank reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pipeflow.graphs.live_bytes import meter
from pipeflow.runtime.microbatch import Batch
from pipeflow.runtime.replica import StageReplica


class PeakBytes:
    """What one rank held at most, during the steps that were watched.

    Attributes:
        bytes: the most; 0 before the first step.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.bytes = 0

    @contextmanager
    def watched(self, replicas: Iterable[StageReplica], batch: Batch, read: Iterable[str]) -> Iterator[None]:
        """Counts meanwhile, on this thread.

        Args:
            replicas: of the rank.
            batch: of the step, whole or cut.
            read: the inputs that the rank reads.
        """
        counter = meter(self._device)
        for replica in replicas:
            counter.count(
                *replica.parameters.values(),
                *replica.tensors().values(),
                *_gradients(replica),
                *_optimizer_tensors(replica),
            )
        for part in [batch] if isinstance(batch, Mapping) else batch:
            for value in (part[name] for name in read):
                counter.count(value, as_bytes=value.numel() * value.element_size())
        counter.reset_peak()
        try:
            with counter:
                yield
        finally:
            self.bytes = max(self.bytes, counter.peak)


def _gradients(replica: StageReplica) -> list[Tensor]:
    return [p.grad for p in replica.parameters.values() if p.grad is not None]


def _optimizer_tensors(replica: StageReplica) -> list[Any]:
    if replica.optimizer is None:
        return []
    return [value for state in replica.optimizer.state.values() for value in state.values()]
