"""The partition problem that a plan's stages answer, as far as the plan remembers it.

For tables and explanations, which price stages as the partitioner did.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

from pipeflow.partitioners.objective import objective
from pipeflow.partitioners.problem import PartitionProblem
from pipeflow.schedules import resolve_schedule

if TYPE_CHECKING:
    from pipeflow.execution_plan import Plan


def problem_of_plan(plan: Plan) -> PartitionProblem:
    """The problem; transfers counted as the plan's certificate does.

    A plan does not say whether its partitioner overlapped transfers with computes: added is the
    rule, unless only the other agrees with the objective that is certified. Where it replicates no
    stage, neither may others; where devices hold several stages, layers are pinned to none.
    """
    held = Counter(device for stage in plan.stages for device in stage.devices)
    chunks = max(held.values())
    added = PartitionProblem(
        costs=plan.costs,
        cluster=plan.cluster,
        num_microbatches=plan.num_microbatches,
        in_flight=resolve_schedule(plan.schedule).in_flight,
        optimizer_ratio=plan.optimizer_ratio,
        offload=plan.offload_set,
        max_replicas=None if any(stage.num_replicas > 1 for stage in plan.stages) else 1,
        chunks=chunks,
        pins=plan.pins if chunks == 1 else plan.pins.model_copy(update={"on": ()}),
    )
    overlapped = replace(added, transfers="overlapped")
    agrees = [
        math.isclose(objective(problem, plan.stages), plan.certificate.objective, rel_tol=1e-9)
        for problem in (added, overlapped)
    ]
    return overlapped if agrees == [False, True] else added
