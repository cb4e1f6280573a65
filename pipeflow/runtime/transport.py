"""What the executor asks of a transport, and nothing of how it is done.

A transport moves payloads between ranks in posted, first-in-first-out channels, one per
directed pair of ranks; sums gradients over the replicas of a stage; and lets every rank know
the losses. There are two: threads of one process, and `torch.distributed`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NoReturn, Protocol

from torch import Tensor

from pipeflow.program import Receive, Route
from pipeflow.runtime.call import Call

Payload = Sequence[Tensor | None] | None
"""The tensors of a route, in its order: None for one that backward did not give. None for an empty micro-batch."""


class Aborted(Exception):
    """Another rank failed; this rank stops waiting. Its cause is in the transport's failure record."""


class Transport(Protocol):
    """One rank's end of the communication."""

    def begin(self, receives: Sequence[Receive], call: Call, arrived: Sequence[int], *, may_lack: bool = False) -> None:
        """A step starts.

        Args:
            receives: what this rank will receive, in order.
            call: what is run; its cut says how large the micro-batches are.
            arrived: for each receive, how many of the messages to its peer have then arrived
                (`pipeflow.arrivals`); empty where that is not known before the end.
            may_lack: whether gradients may be None. Where they may not, one that is may arrive as zeros.
        """

    def sender(self, route: Route, peer: int) -> Callable[[int, Payload], None]:
        """A function that posts (micro-batch, payload) to `peer`. It never waits for the peer."""

    def receiver(self, route: Route, peer: int) -> Callable[[int], Payload]:
        """A function that waits for the payload of a micro-batch from `peer`."""

    def start_reduce(self, stage: int, tensor: Tensor) -> Callable[[], Tensor]:
        """Starts to sum `tensor` over the stage's replicas; the result waits and gives the sum, maybe in its memory."""

    def start_shared(self, stages: tuple[int, ...], ranks: tuple[int, ...], tensor: Tensor) -> Callable[[], Tensor]:
        """Starts to sum `tensor` over `ranks`, all that hold a replica of one of the stages."""

    def start_share(self, values: Tensor) -> Callable[[], Tensor]:
        """Starts to sum a small float64 CPU tensor over all ranks; the result waits and gives the sum."""

    def exchange(self, peers: Sequence[int], values: Tensor) -> list[Tensor]:
        """Gives each peer a small float64 CPU tensor and takes theirs of the same shape, in the order of `peers`.

        Between two ranks the k-th exchange of the one is with the k-th of the other; it waits for them.
        """

    def disagree(self) -> NoReturn:
        """The losses show that ranks were asked for different things: finds out what, and raises `Aborted`."""

    def end(self) -> None:
        """A step ends: everything posted has left."""
