"""What a rank has posted towards its peers over `torch.distributed`, and what it knows to have arrived."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from pipeflow.program import Receive, Route
from pipeflow.runtime.transport import Payload


@dataclass(slots=True)
class Posted:
    """A posted receive.

    Attributes:
        tensors: where they will be; None for an empty micro-batch.
        present: a byte for each, 0 for a gradient that backward did not give; None where all are.
    """

    works: list[Any]
    tensors: list[Tensor] | None
    present: Tensor | None = None

    def payload(self) -> Payload:
        """What has arrived."""
        if self.present is None or self.tensors is None:
            return self.tensors
        return [t if is_there else None for t, is_there in zip(self.tensors, self.present.tolist(), strict=True)]


@dataclass
class Channel:
    """What this rank will receive from one peer, and what it knows to have arrived there.

    Attributes:
        posted, waiting: receives that are posted, and those that are not yet.
        arrived: for each receive to come, how many messages to the peer have then arrived.
        num_released: of these, how many are let go of.
    """

    posted: deque[Posted] = field(default_factory=deque)
    waiting: deque[Receive] = field(default_factory=deque)
    arrived: deque[int] = field(default_factory=deque)
    num_released: int = 0


@dataclass(slots=True)
class Sent:
    """A posted send; the tensors live until it has left."""

    route: Route
    microbatch: int
    works: list[Any]
    tensors: list[Tensor]


def wait_for(sent: Sent) -> None:
    """Until it has left."""
    for work in sent.works:
        work.wait()
