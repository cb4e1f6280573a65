"""From a plan to plans nearby with a shorter iteration, as the simulator counts it.

The partitioner minimises the busiest device's seconds per micro-batch, which is what an iteration
takes when there are many of them. With few, the time to fill and drain the pipeline counts as
much, and only the schedule's own program tells it. So partitions next to a good one are lowered and
simulated, and the search goes on from the best, until no neighbour is better.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from pipeflow.errors import PlanError
from pipeflow.execution_plan import Plan
from pipeflow.partitioners.neighbours import neighbours
from pipeflow.partitioners.objective import objective
from pipeflow.partitioners.problem import PartitionProblem

PlanObjective = Literal["bottleneck", "iteration"]
"""What plans are chosen by: the partitioner's bottleneck first, or the simulated iteration throughout."""

Rank = tuple[float, int, int, int]
"""How a plan compares: seconds of an iteration, then devices, micro-batches and bytes."""

_ACTIONS = 400_000
"""Actions (stages times micro-batches) that are simulated in one search: seconds, not minutes."""


def shorten(
    plan: Plan, rank: Rank, problem: PartitionProblem, price: Callable[[Plan], Rank | None]
) -> tuple[Plan, Rank]:
    """The best plan that descending from this one reaches, with the same schedule and micro-batches.

    Args:
        plan: to begin with.
        rank: of it.
        problem: that its stages answer.
        price: the rank of a plan, or None where it does not fit. A plan for which it raises a `PlanError`,
            since it cannot be lowered, is passed over.
    """
    left = _ACTIONS
    while True:
        best, best_rank = plan, rank
        for stages in neighbours(problem, plan.stages):
            left -= 4 * len(stages) * plan.num_microbatches
            if left < 0:
                return best, best_rank
            certificate = plan.certificate.model_copy(
                update={
                    "partitioner": f"{plan.certificate.partitioner.removesuffix(_MARK)}{_MARK}",
                    "objective": objective(problem, stages),
                }
            )
            candidate = plan.model_copy(update={"stages": stages, "certificate": certificate})
            try:
                found = price(candidate)
            except PlanError:  # the schedule cannot order its stages; others it can
                continue
            if found is not None and found < best_rank:
                best, best_rank = candidate, found
        if best is plan:
            return plan, rank
        plan, rank = best, best_rank


_MARK = ", shortened"
