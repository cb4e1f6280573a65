"""1F1B: after a warm-up, one backward for every forward.

Narayanan et al., "PipeDream: Generalized Pipeline Parallelism for DNN Training" (SOSP 2019),
section 3.2, without weight versions (the flush between batches of section 2.2 of "Memory-Efficient
Pipeline-Parallel DNN Training", ICML 2021). A replica warms up with as many forwards as keep the
stages from here on busy, NOAM = ceil(replicas of this and all later stages / replicas of this
stage), and never holds more micro-batches than that.

No cyclic wait, whatever the replica counts: let N_s be the replicas from stage s on, w_s >= N_s /
R_s the warm-up. The forward of micro-batch m on stage u waits, in its replica's sequence, for the
backward of m - w_u R_u there; a backward of m on stage s waits for the forward of m + (w_s - 1) R_s
there. A cycle would go up through s and down through some u <= s and return to the same m; but
(w_s - 1) R_s - w_u R_u < N_s - N_u <= 0: each round goes strictly back to earlier micro-batches.

Three stages, four micro-batches, forward and backward of one tick each:

    stage 0 | F0 F1 F2 .. .. B0 F3 B1 .. B2 .. B3
    stage 1 | .. F0 F1 .. B0 F2 B1 F3 B2 .. B3 ..
    stage 2 | .. .. F0 B0 F1 B1 F2 B2 F3 B3 .. ..
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeflow.program import Compute, Kind, Placement
from pipeflow.schedules.merging import merge
from pipeflow.schedules.schedule import ComputeOrder, Schedule

if TYPE_CHECKING:
    from pipeflow.partitioners.problem import Position


def order(placement: Placement, num_microbatches: int) -> ComputeOrder:
    """The compute order of every rank."""
    from_here = [0] * (len(placement) + 1)
    for stage in reversed(range(len(placement))):
        from_here[stage] = from_here[stage + 1] + len(placement[stage])

    def local(stage: int, microbatches: range) -> list[Compute]:
        warm_up = min(len(microbatches), -(-from_here[stage] // len(placement[stage])))
        sequence = [Compute(Kind.FORWARD, stage, m) for m in microbatches[:warm_up]]
        for done, later in zip(microbatches, microbatches[warm_up:], strict=False):
            sequence += (Compute(Kind.BACKWARD, stage, done), Compute(Kind.FORWARD, stage, later))
        cool_down = microbatches[len(microbatches) - warm_up :]
        return sequence + [Compute(Kind.BACKWARD, stage, m) for m in cool_down]

    return merge(placement, num_microbatches, local)


def in_flight(position: Position) -> int:
    """The warm-up: see the head of this module."""
    own = -(-position.num_microbatches // position.num_replicas)
    return min(own, -(-position.num_replicas_from_here // position.num_replicas))


ONE_FORWARD_ONE_BACKWARD = Schedule(name="1f1b", order=order, in_flight=in_flight)
