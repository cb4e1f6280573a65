"""How many bytes of tensors are alive on a device, and were at most.

On the CPU the framework's operators are watched: each storage that one of them gives counts from
then until it is freed, whoever holds it; what a kernel allocates and frees inside is not seen. On
CUDA it is what the allocator counts.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts storages that operators of this thread give on the CPU, while entered.

    What was counted stays counted, and is taken off when it is freed, also while not entered.

    Attributes:
        held: bytes alive now.
        peak: the most that were since the last `reset_peak`.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held = 0
        self.peak = 0
        self._alive: dict[int, weakref.ref[Any]] = {}
        self._lock = threading.RLock()  # another thread may free; a collection may free while this one counts

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.count(result) if isinstance(result, Tensor) else self.count(*tree_leaves(result))
        return result

    def count(self, *values: Any, as_bytes: int | None = None) -> None:
        """Counts the storages of those of the values that are tensors, each once.

        Args:
            as_bytes: what a new one counts, where only a part of it is meant; by default its size.
        """
        for value in values:
            if not isinstance(value, Tensor) or value.device.type != "cpu":
                continue
            storage = value.untyped_storage()
            key = storage._cdata
            if key in self._alive and self._alive[key]() is not None:
                continue
            amount = storage.nbytes() if as_bytes is None else as_bytes
            with self._lock:
                self._alive[key] = weakref.ref(storage, partial(self._freed, key, amount))
                self.held += amount
                self.peak = max(self.peak, self.held)

    def _freed(self, key: int, amount: int, reference: weakref.ref[Any]) -> None:
        with self._lock:
            self.held -= amount
            if self._alive.get(key) is reference:
                del self._alive[key]

    def reset_peak(self) -> None:
        self.peak = self.held


class CudaBytes:
    """The same of a CUDA device, by its allocator: of all threads, in blocks of 512 bytes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __enter__(self) -> CudaBytes:
        return self

    def __exit__(self, *args: object) -> None: ...

    def count(self, *values: Any, as_bytes: int | None = None) -> None:
        """Nothing: the allocator has counted them."""

    @property
    def held(self) -> int:
        return torch.cuda.memory_allocated(self._device)

    @property
    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self._device)

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)


Meter = LiveBytes | CudaBytes


def meter(device: torch.device) -> Meter:
    """What counts on the device."""
    return CudaBytes(device) if device.type == "cuda" else LiveBytes()


def tensor_bytes(values: Iterable[Tensor]) -> int:
    """Bytes of tensors of which none shares memory with another."""
    return sum(value.numel() * value.element_size() for value in values)
