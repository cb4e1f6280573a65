"""From the local sequences of stage replicas to one order per rank.

A schedule says in which sequence one replica of one stage works, as if it had a rank to
itself. Where a rank holds several, this module interleaves them. Knows nothing of graphs: it
assumes that every stage needs the one before it, which holds for any graph whose data flows
forward through the stages, so the order is right with skips and without.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

from pipeflow.program import Compute, Kind, Placement
from pipeflow.schedules.schedule import ComputeOrder

LocalSequence = Callable[[int, range], list[Compute]]
"""(stage, micro-batches of one replica) -> its computes (F and B) in sequence."""


def merge(placement: Placement, num_microbatches: int, local: LocalSequence) -> ComputeOrder:
    """The order of every rank, given the sequence of each stage replica.

    A rank that holds one replica follows its sequence. As soon as one rank holds several, the
    whole pipeline is played in unit time: at each tick every rank takes the first action of one
    of its sequences whose needs are met, a backward before a forward, then the deepest stage.
    The play cannot get stuck unless the local sequences themselves would on ranks of their own,
    and an order that was played once can be played again: it has no cyclic wait.

    Args:
        placement: ranks of each stage's replicas.
        num_microbatches: M.
        local: the sequence of one replica.
    """
    num_ranks = 1 + max(rank for ranks in placement for rank in ranks)
    sequences = [
        [local(stage, range(replica, num_microbatches, len(ranks))) for replica in range(len(ranks))]
        for stage, ranks in enumerate(placement)
    ]
    held = [rank for ranks in placement for rank in ranks]
    if len(set(held)) == len(held):
        order: list[tuple[Compute, ...]] = [()] * num_ranks
        for ranks, of_stage in zip(placement, sequences, strict=True):
            for rank, sequence in zip(ranks, of_stage, strict=True):
                order[rank] = tuple(sequence)
        return tuple(order)
    return _play(placement, num_ranks, num_microbatches, sequences)


def _play(
    placement: Placement, num_ranks: int, num_microbatches: int, sequences: list[list[list[Compute]]]
) -> ComputeOrder:
    """Unit-time list scheduling of all sequences together."""
    last = len(placement) - 1
    forward = [bytearray(num_microbatches) for _ in placement]
    backward = [bytearray(num_microbatches) for _ in placement]
    position = [[0] * len(ranks) for ranks in placement]
    offered = [[-1] * len(ranks) for ranks in placement]
    order: list[list[Compute]] = [[] for _ in range(num_ranks)]
    # Heads of sequences whose needs are met: (is forward, -stage, compute), smallest first.
    ready: list[list[tuple[bool, int, Compute]]] = [[] for _ in range(num_ranks)]
    awake: set[int] = set()

    def offer(stage: int, replica: int) -> None:
        """Makes the head of a sequence ready if its needs are met and it is not already."""
        head = position[stage][replica]
        sequence = sequences[stage][replica]
        if head == len(sequence) or offered[stage][replica] == head:
            return
        compute = sequence[head]
        is_forward = compute.kind is Kind.FORWARD
        if is_forward:
            met = stage == 0 or forward[stage - 1][compute.microbatch]
        else:
            met = forward[last][compute.microbatch] if stage == last else backward[stage + 1][compute.microbatch]
        if met:
            offered[stage][replica] = head
            rank = placement[stage][replica]
            heapq.heappush(ready[rank], (is_forward, -stage, compute))
            awake.add(rank)

    for stage, ranks in enumerate(placement):
        for replica in range(len(ranks)):
            offer(stage, replica)
    while awake:
        tick = [heapq.heappop(ready[rank]) for rank in sorted(awake)]
        for rank, (_, _, compute) in zip(sorted(awake), tick, strict=True):
            order[rank].append(compute)
        awake = {rank for rank in awake if ready[rank]}
        for is_forward, _, (_, stage, microbatch) in tick:
            (forward if is_forward else backward)[stage][microbatch] = 1
            position[stage][microbatch % len(placement[stage])] += 1
        for is_forward, _, (_, stage, microbatch) in tick:
            offer(stage, microbatch % len(placement[stage]))
            neighbour = stage + 1 if is_forward else stage - 1
            if 0 <= neighbour <= last:
                offer(neighbour, microbatch % len(placement[neighbour]))
    return tuple(tuple(computes) for computes in order)
