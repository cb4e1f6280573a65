"""What a rank does, one action after another: the language between planning and running.

Actions are values with a short text form that parses back. Nothing here decides an order;
schedules and lowering do, the verifier proves it, the simulator and the runtime follow it.

    2F0, 2B0, 2I0, 2W0       forward, backward, its input half, its weight half: stage 2, micro-batch 0
    send 2>4F0 h,skip        stage 2 sends the tensors h and skip of micro-batch 0 to stage 4
    recv 2>4F0 h,skip        stage 4 receives them
    send 4>2B0 h,skip        stage 4 sends their gradients back
    free 2,0                 stage 2 lets go of all it holds for micro-batch 0
    offload 2,0, fetch 2,0   what its layers saved for backward is on the host now; it is on its way back
    reduce 2, step 2         sum the gradients of stage 2 over its replicas; its optimizer's step
    reduce 0+2               sum those of the parameters that stages 0 and 2 share over all their replicas
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import NamedTuple

from pipeflow.errors import FormatError


class Kind(Enum):
    """What is computed."""

    FORWARD = "F"
    BACKWARD = "B"
    BACKWARD_INPUT = "I"
    BACKWARD_WEIGHT = "W"


class Direction(Enum):
    """What a transfer carries: activations downstream, or gradients upstream."""

    FORWARD = "F"
    BACKWARD = "B"


class Mode(Enum):
    """What a program is for."""

    TRAIN = "train"
    INFER = "infer"


class Compute(NamedTuple):
    kind: Kind
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind.value}{self.microbatch}"


class Route(NamedTuple):
    """All that one stage sends another for a micro-batch, in one direction.

    `payload` names the tensors. A gradient that comes in several parts, each from some of the
    readers of its tensor, has part i of `skip` named `skip#i` (see `pipeflow.flows`).
    """

    direction: Direction
    source: int
    target: int
    payload: tuple[str, ...]

    def text(self, microbatch: int) -> str:
        names = ",".join(self.payload)
        return f"{self.source}>{self.target}{self.direction.value}{microbatch} {names}"


class Send(NamedTuple):
    """Post the payload to rank `peer`; never waits."""

    route: Route
    microbatch: int
    peer: int

    def __str__(self) -> str:
        return f"send {self.route.text(self.microbatch)}"


class Receive(NamedTuple):
    """Wait for the payload from rank `peer`."""

    route: Route
    microbatch: int
    peer: int

    def __str__(self) -> str:
        return f"recv {self.route.text(self.microbatch)}"


class Free(NamedTuple):
    """Let go of all that the stage holds for the micro-batch: received, saved, gradients."""

    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"free {self.stage},{self.microbatch}"


class Offload(NamedTuple):
    """Wait until what the stage's offloaded layers saved is on the host, and let go of it on the device.

    The copies start while the forward runs.
    """

    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"offload {self.stage},{self.microbatch}"


class Fetch(NamedTuple):
    """Start to copy it back, which the backward waits for."""

    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"fetch {self.stage},{self.microbatch}"


class Reduce(NamedTuple):
    """Start to sum the stage's gradients over its replicas, which `Step` waits for, and to tell their statistics."""

    stage: int

    def __str__(self) -> str:
        return f"reduce {self.stage}"


class ReduceShared(NamedTuple):
    """Start to sum the gradients of what the stages hold copies of; the `Step` of each waits for it."""

    stages: tuple[int, ...]

    def __str__(self) -> str:
        return f"reduce {'+'.join(map(str, self.stages))}"


class Step(NamedTuple):
    """The optimizer's step on the stage's parameters."""

    stage: int

    def __str__(self) -> str:
        return f"step {self.stage}"


Reduction = Reduce | ReduceShared

Action = Compute | Send | Receive | Free | Offload | Fetch | Reduction | Step

Placement = tuple[tuple[int, ...], ...]
"""Ranks of each stage's replicas. Micro-batch m of stage s runs on `placement[s][m % R_s]`."""


def rank_of(placement: Placement, stage: int, microbatch: int) -> int:
    """The rank that runs the micro-batch on the stage: round robin over the replicas."""
    ranks = placement[stage]
    return ranks[microbatch % len(ranks)]


def ranks_of(placement: Placement, reduction: Reduction) -> tuple[int, ...]:
    """The ranks that a sum of gradients is over: the stage's own order, ascending over several stages."""
    if isinstance(reduction, Reduce):
        return placement[reduction.stage]
    return tuple(sorted({rank for stage in reduction.stages for rank in placement[stage]}))


def stages_of(reduction: Reduction) -> tuple[int, ...]:
    """The stages whose gradients a sum is of."""
    return (reduction.stage,) if isinstance(reduction, Reduce) else reduction.stages


@dataclass(frozen=True)
class Program:
    """The actions of every rank.

    Attributes:
        mode: for training, or forward alone.
        num_microbatches: M; every stage computes all of 0..M-1 between its replicas.
        placement: ranks of each stage's replicas.
        actions_by_rank: what each rank does, in order.
    """

    mode: Mode
    num_microbatches: int
    placement: Placement
    actions_by_rank: tuple[tuple[Action, ...], ...]

    @property
    def num_ranks(self) -> int:
        return len(self.actions_by_rank)

    @cached_property
    def num_actions(self) -> int:
        return sum(len(actions) for actions in self.actions_by_rank)

    def __str__(self) -> str:
        """One line per rank, actions separated by `; `."""
        return "\n".join(
            f"rank {rank}: {'; '.join(str(a) for a in actions)}" for rank, actions in enumerate(self.actions_by_rank)
        )


_COMPUTE = re.compile(r"(\d+)([FBIW])(\d+)")
_TRANSFER = re.compile(r"(send|recv) (\d+)>(\d+)([FB])(\d+) (.+)")
_STAGE = re.compile(r"(reduce|step) (\d+)")
_SHARED = re.compile(r"reduce (\d+(?:\+\d+)+)")
_OF_MICROBATCH = re.compile(r"(free|offload|fetch) (\d+),(\d+)")


def parse_action(text: str, placement: Placement) -> Action:
    """The action that `text` writes; the inverse of `str`.

    Args:
        text: as in the table at the head of this module.
        placement: tells the peer rank of a transfer.

    Raises:
        FormatError: the text is no action.
    """
    if match := _COMPUTE.fullmatch(text):
        return Compute(Kind(match[2]), int(match[1]), int(match[3]))
    if match := _TRANSFER.fullmatch(text):
        source, target, microbatch = int(match[2]), int(match[3]), int(match[5])
        route = Route(Direction(match[4]), source, target, tuple(match[6].split(",")))
        if match[1] == "send":
            return Send(route, microbatch, rank_of(placement, target, microbatch))
        return Receive(route, microbatch, rank_of(placement, source, microbatch))
    if match := _STAGE.fullmatch(text):
        return Reduce(int(match[2])) if match[1] == "reduce" else Step(int(match[2]))
    if match := _SHARED.fullmatch(text):
        return ReduceShared(tuple(map(int, match[1].split("+"))))
    if match := _OF_MICROBATCH.fullmatch(text):
        stage, microbatch = int(match[2]), int(match[3])
        match match[1]:
            case "free":
                return Free(stage, microbatch)
            case "offload":
                return Offload(stage, microbatch)
            case _:
                return Fetch(stage, microbatch)
    raise FormatError(f"{text!r} is no action; write for example 2F0, 'send 2>4F0 h' or 'reduce 2'")
