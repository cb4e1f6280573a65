"""Forward alone, for evaluation and prediction. Not a row of the table: it trains nothing.

Three stages, four micro-batches, a forward of one tick:

    stage 0 | F0 F1 F2 F3 .. ..
    stage 1 | .. F0 F1 F2 F3 ..
    stage 2 | .. .. F0 F1 F2 F3
"""

from __future__ import annotations

from pipeflow.program import Compute, Kind, Placement
from pipeflow.schedules.merging import merge
from pipeflow.schedules.schedule import ComputeOrder


def forward_order(placement: Placement, num_microbatches: int) -> ComputeOrder:
    """The forwards of every rank."""

    def local(stage: int, microbatches: range) -> list[Compute]:
        return [Compute(Kind.FORWARD, stage, m) for m in microbatches]

    return merge(placement, num_microbatches, local)
