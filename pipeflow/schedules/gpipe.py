"""GPipe: all forwards, then all backwards.

Huang et al., "GPipe: Efficient Training of Giant Neural Networks using Pipeline Parallelism"
(NeurIPS 2019), section 2.3. Departs from its figure 2 in one point: backward takes the
micro-batches in the order of forward, not reversed, so that gradients add up as on one device.

Three stages, four micro-batches, forward and backward of one tick each:

    stage 0 | F0 F1 F2 F3 .. .. .. .. B0 B1 B2 B3
    stage 1 | .. F0 F1 F2 F3 .. .. B0 B1 B2 B3 ..
    stage 2 | .. .. F0 F1 F2 F3 B0 B1 B2 B3 .. ..
"""

from __future__ import annotations

from pipeflow.program import Compute, Kind, Placement
from pipeflow.schedules.merging import merge
from pipeflow.schedules.schedule import ComputeOrder, Schedule, all_in_flight


def order(placement: Placement, num_microbatches: int) -> ComputeOrder:
    """The compute order of every rank.

    Where one rank holds everything, nobody waits for it, and it goes stage by stage: a stage's
    weights and gradients then stay in the cache.
    """
    if len({rank for ranks in placement for rank in ranks}) == 1:
        microbatches = range(num_microbatches)
        forward = [Compute(Kind.FORWARD, s, m) for s in range(len(placement)) for m in microbatches]
        backward = [Compute(Kind.BACKWARD, s, m) for s in reversed(range(len(placement))) for m in microbatches]
        rank = placement[0][0]
        return (*((),) * rank, (*forward, *backward))

    def local(stage: int, microbatches: range) -> list[Compute]:
        return [Compute(kind, stage, m) for kind in (Kind.FORWARD, Kind.BACKWARD) for m in microbatches]

    return merge(placement, num_microbatches, local)


GPIPE = Schedule(name="gpipe", order=order, in_flight=all_in_flight)
