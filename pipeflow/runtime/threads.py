"""The transport inside one process: a thread per rank, queues between them.

Nothing is copied on the way, except from one device to another. All state is in `Exchange`,
which the ranks share.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import NoReturn

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from pipeflow.program import Placement, Receive, Route
from pipeflow.runtime.call import Call
from pipeflow.runtime.transport import Aborted, Payload

_STOP = object()


class _Sum:
    """A sum over several ranks, added in rank order by whoever comes last, into what each of them gave."""

    def __init__(self, num_ranks: int) -> None:
        self._parts: list[Tensor | None] = [None] * num_ranks
        self._missing = num_ranks
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._is_complete = False

    def give(self, position: int, part: Tensor) -> None:
        with self._lock:
            self._parts[position] = part
            self._missing -= 1
            last = self._missing == 0
        if last:
            total, *others = (p for p in self._parts if p is not None)
            with _disable_current_modes():  # a meter would count what is the others'
                for p in others:
                    total += p.to(total.device)
                for p in others:
                    p.copy_(total)
            self._is_complete = True
            self._done.set()

    def abort(self) -> None:
        self._done.set()

    def wait(self, position: int) -> Tensor:
        """The sum, in the memory of what the rank at this position gave."""
        self._done.wait()
        part = self._parts[position]
        if not self._is_complete or part is None:
            raise Aborted
        self._parts[position] = None
        return part


class Exchange:
    """What the ranks of one process share: channels, running sums, and whether to stop."""

    def __init__(self, num_ranks: int, placement: Placement) -> None:
        self.num_ranks = num_ranks
        self.placement = placement
        self._lock = threading.Lock()
        self._channels: dict[tuple[str, int, int], SimpleQueue[object]] = {}
        self._sums: dict[tuple[str, object], list[tuple[_Sum, set[int]]]] = {}
        self.aborted = False

    def channel(self, source: int, target: int, kind: str = "data") -> SimpleQueue[object]:
        with self._lock:
            channel = self._channels.setdefault((kind, source, target), SimpleQueue())
            if self.aborted:
                channel.put(_STOP)
            return channel

    def join_sum(self, kind: str, index: object, rank: int, num_ranks: int) -> _Sum:
        """The first running sum that this rank has not joined yet; the last to join closes it."""
        key: tuple[str, object] = (kind, index)
        with self._lock:
            queue = self._sums.setdefault(key, [])
            pair = next((pair for pair in queue if rank not in pair[1]), None)
            if pair is None:
                queue.append(pair := (_Sum(num_ranks), set()))
            running, joined = pair
            joined.add(rank)
            if len(joined) == num_ranks:
                queue.remove(pair)
            if self.aborted:
                running.abort()
            return running

    def abort(self) -> None:
        """Wakes every rank that waits; each raises `Aborted`."""
        with self._lock:
            self.aborted = True
            for channel in self._channels.values():
                channel.put(_STOP)
            for queue in self._sums.values():
                for running, _ in queue:
                    running.abort()

    def clear(self) -> None:
        """Forgets everything on its way, after an abort; no rank may be running."""
        with self._lock:
            self._channels_drained()
            self._sums.clear()
            self.aborted = False

    def _channels_drained(self) -> None:
        for channel in self._channels.values():
            while not channel.empty():
                channel.get()


class ThreadTransport:
    """One rank's end of an `Exchange`.

    Args:
        copies: whether ranks hold what they would as processes of their own: a copy of what they
            receive, and what they send until they know that it has arrived. Otherwise those on one
            device share what is sent.
    """

    def __init__(self, exchange: Exchange, rank: int, device: torch.device, *, copies: bool = False) -> None:
        self._copies = copies
        self._sent: dict[int, deque[Payload]] = {}
        self._arrived: dict[int, deque[int]] = {}
        self._num_released: dict[int, int] = {}
        self._exchange = exchange
        self._rank = rank
        self._device = device

    def begin(self, receives: Sequence[Receive], call: Call, arrived: Sequence[int], *, may_lack: bool = False) -> None:
        if self._copies:
            self._arrived = {}
            for receive, count in zip(receives, arrived, strict=True):
                self._arrived.setdefault(receive.peer, deque()).append(count)
            self._num_released = dict.fromkeys(self._arrived, 0)

    def sender(self, route: Route, peer: int) -> Callable[[int, Payload], None]:
        put = self._exchange.channel(self._rank, peer).put

        def send(microbatch: int, payload: Payload) -> None:
            put(payload)

        if not self._copies:
            return send
        sent = self._sent.setdefault(peer, deque())

        def send_and_keep(microbatch: int, payload: Payload) -> None:
            sent.append(payload)
            put(payload)

        return send_and_keep

    def receiver(self, route: Route, peer: int) -> Callable[[int], Payload]:
        channel = self._exchange.channel(peer, self._rank)
        get = channel.get
        device = self._device

        def receive(microbatch: int) -> Payload:
            payload = get()
            if payload is _STOP:
                raise Aborted
            assert payload is None or isinstance(payload, list)
            if payload and any(t is not None and t.device != device for t in payload):
                return [None if t is None else t.to(device, non_blocking=True) for t in payload]
            return payload

        if not self._copies:
            return receive
        sent = self._sent.setdefault(peer, deque())

        def receive_a_copy(microbatch: int) -> Payload:
            payload = receive(microbatch)
            copies = None if payload is None else [None if t is None else t.clone() for t in payload]
            arrived = self._arrived[peer].popleft()
            while self._num_released[peer] < arrived:
                sent.popleft()
                self._num_released[peer] += 1
            return copies

        return receive_a_copy

    def start_reduce(self, stage: int, tensor: Tensor) -> Callable[[], Tensor]:
        replicas = self._exchange.placement[stage]
        running = self._exchange.join_sum("reduce", stage, self._rank, len(replicas))
        position = replicas.index(self._rank)
        running.give(position, tensor)
        return lambda: running.wait(position)

    def start_shared(self, stages: tuple[int, ...], ranks: tuple[int, ...], tensor: Tensor) -> Callable[[], Tensor]:
        running = self._exchange.join_sum("shared", stages, self._rank, len(ranks))
        position = ranks.index(self._rank)
        running.give(position, tensor)
        return lambda: running.wait(position)

    def start_share(self, values: Tensor) -> Callable[[], Tensor]:
        running = self._exchange.join_sum("share", 0, self._rank, self._exchange.num_ranks)
        running.give(self._rank, values)
        return lambda: running.wait(self._rank)

    def exchange(self, peers: Sequence[int], values: Tensor) -> list[Tensor]:
        for peer in peers:
            self._exchange.channel(self._rank, peer, "exchange").put(values)
        received = [self._exchange.channel(peer, self._rank, "exchange").get() for peer in peers]
        if any(values is _STOP for values in received):
            raise Aborted
        return received  # type: ignore[return-value]  # what peers put

    def disagree(self) -> NoReturn:
        raise Aborted  # which cannot be: one call is made of all ranks

    def end(self) -> None:
        for sent in self._sent.values():
            sent.clear()
