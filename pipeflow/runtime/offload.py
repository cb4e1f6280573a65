"""What offloaded layers save for backward: on the device, on its way, or on the host.

Decides where saved tensors are; when, the program does (`pipeflow.lowering`). One copy is made of
each storage, as it is, however many saved tensors lie in it, so that what comes back has the same
strides and backward the same bits.

    forward     a layer has saved tensors: once it is done, their storages start to leave         [1]
    offload     once all have left, the device lets go of them                                    [2]
    fetch       they start to come back, beside the compute before the backward                   [3]
    backward    a saved tensor is asked for: wait for its storage                                 [4]

Not before: a layer may still write to a storage of which it has saved a part (LSTM cells do), and
backward is to see what is there in the end, as it does without offloading.

On CUDA the copies run on a stream of their own, to and from pinned memory. On the CPU, which is its
own host, they are made at once, and what is on the host is not counted as the rank's
(`pipeflow.graphs.live_bytes`): plans for devices with little memory can be tried there.

What stays: parameters and buffers, inputs of the batch, what came from other stages, and tensors
that are not plain memory (sparse ones, conjugates, subclasses).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import _disable_current_modes

from pipeflow.runtime.stage import Call, Slots


@dataclass(slots=True, eq=False, weakref_slot=True)
class _Parcel:
    """One storage. Autograd holds it, by the tensors that are saved in it, and lets go as backward goes on.

    Attributes:
        here: its bytes on the device; None while it is away.
        host: its bytes on the host, once they are wanted there.
        moved: the event at which the last copy is done; None on the CPU.
        is_awaited: whether this device's work waits for that already.
    """

    here: Tensor | None
    host: Tensor | None = None
    moved: Any = None
    is_awaited: bool = False


_Parcels = WeakValueDictionary[int, _Parcel]
"""By storage."""


@dataclass(frozen=True, slots=True)
class _Saved:
    """A saved tensor: which part of which parcel."""

    parcel: _Parcel
    dtype: torch.dtype
    offset: int
    size: torch.Size
    stride: tuple[int, ...]


class HostStore:
    """What one stage replica saved on the host, by micro-batch.

    Args:
        device: of the replica.
        staying: its parameters and buffers.
    """

    def __init__(self, device: torch.device, staying: Iterable[Tensor]) -> None:
        self._device = device
        self._stream: Any = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._staying = frozenset(_key(tensor) for tensor in staying)
        self._parcels: dict[int, _Parcels] = {}
        self._current: _Parcels | None = None
        self._resident: set[int] = set()
        self._new: list[_Parcel] = []  # of the layer that runs

    def wrapped(self, call: Call) -> Call:
        """The call, so that what it saves while `saving` is offloaded."""

        def run(slots: Slots) -> None:
            if self._current is None:
                call(slots)
                return
            with saved_tensors_hooks(self._pack, self._unpack):
                call(slots)
            for parcel in self._new:
                assert parcel.here is not None
                with _disable_current_modes():
                    parcel.host = torch.empty(parcel.here.shape, dtype=torch.uint8, pin_memory=self._stream is not None)
                self._copy(parcel, parcel.host, parcel.here)
            self._new.clear()

        return run

    @contextmanager
    def saving(self, microbatch: int, resident: Sequence[Tensor]) -> Iterator[None]:
        """What is saved meanwhile is of this micro-batch and will be offloaded.

        Args:
            resident: tensors that are held on the device anyway.
        """
        self._current = self._parcels[microbatch] = WeakValueDictionary()
        self._resident = {_key(tensor) for tensor in resident}
        try:
            yield
        finally:
            self._current = None

    def let_go(self, microbatch: int) -> None:
        """Waits until all of the micro-batch has left, and lets go of it on the device [2]."""
        for parcel in self._of(microbatch):
            self._await(parcel)
            parcel.here = None

    def fetch(self, microbatch: int) -> None:
        """Starts to bring it back [3]."""
        for parcel in self._of(microbatch):
            # On the device's own stream, so that its memory is not what earlier work still uses.
            assert parcel.host is not None
            parcel.here = torch.empty(parcel.host.shape, dtype=torch.uint8, device=self._device)
            self._copy(parcel, parcel.here, parcel.host)

    def _of(self, microbatch: int) -> list[_Parcel]:
        return list(self._parcels.get(microbatch, {}).values())

    def drop(self, microbatch: int) -> None:
        """Nothing of the micro-batch is needed any more."""
        self._parcels.pop(microbatch, None)

    def clear(self) -> None:
        self._parcels.clear()
        self._new.clear()

    def _pack(self, tensor: Tensor) -> Tensor | _Saved:
        """What autograd keeps instead of a tensor that is saved."""
        assert self._current is not None
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided:
            return tensor
        key = _key(tensor)
        if key in self._staying or key in self._resident or tensor.is_conj() or tensor.is_neg():
            return tensor
        if tensor.device != self._device or not tensor.untyped_storage().nbytes():
            return tensor
        parcel = self._current.get(key)
        if parcel is None:
            here = torch.empty(0, dtype=torch.uint8, device=self._device).set_(tensor.untyped_storage())
            self._current[key] = parcel = _Parcel(here)
            self._new.append(parcel)
        return _Saved(parcel, tensor.dtype, int(tensor.storage_offset()), tensor.size(), tensor.stride())

    def _unpack(self, saved: Tensor | _Saved) -> Tensor:
        """The tensor again [4]."""
        if isinstance(saved, Tensor):
            return saved
        parcel = saved.parcel
        assert parcel.here is not None, "backward comes after its fetch"
        self._await(parcel)
        storage = parcel.here.untyped_storage()
        empty = torch.empty(0, dtype=saved.dtype, device=self._device)
        return empty.set_(storage, saved.offset, saved.size, saved.stride)

    def _copy(self, parcel: _Parcel, target: Tensor, source: Tensor) -> None:
        if self._stream is None:
            with _disable_current_modes():
                target.copy_(source)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        parcel.moved, parcel.is_awaited = self._stream.record_event(), False

    def _await(self, parcel: _Parcel) -> None:
        """Lets the device's work wait for the parcel's copy; the host does not."""
        if parcel.moved is not None and not parcel.is_awaited:
            torch.cuda.current_stream(self._device).wait_event(parcel.moved)
            parcel.is_awaited = True


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
