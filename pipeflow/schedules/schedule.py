"""What a schedule is: a pure order of computes, and how many micro-batches it keeps in flight.

Knows stages, replicas and micro-batches; not layers, costs, tensors or transfers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeflow.program import Compute, Placement

if TYPE_CHECKING:
    from pipeflow.partitioners.problem import Position

ComputeOrder = tuple[tuple[Compute, ...], ...]
"""What each rank computes, in order. A rank without a stage has an empty tuple."""

OrderFunction = Callable[[Placement, int], ComputeOrder]
"""(ranks of each stage's replicas, number of micro-batches) -> the order of every rank."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """One row of the table of schedules.

    Attributes:
        name: as in a plan: a name in the table, or `module:function`.
        order: the order of computes. Every stage computes F and B of all micro-batches; those
            that a graph does not need (a stage nothing is learned in) are dropped by lowering.
            Each replica takes its micro-batches in ascending order, forward and backward, so that
            gradients add up as on one device.
        in_flight: the most micro-batches that one replica of a stage at this position holds at
            once, between their forward and the end of their backward.
    """

    name: str
    order: OrderFunction
    in_flight: Callable[[Position], int]


def all_in_flight(position: Position) -> int:
    """Every micro-batch of a replica at once: true of any schedule."""
    return -(-position.num_microbatches // position.num_replicas)
