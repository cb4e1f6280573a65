"""The least objective of a small problem, by whichever search over all partitions takes it.

`pipeflow.partitioners.exhaustive` where layers run in one way and devices hold one stage, and else every
partition one by one.
"""

from __future__ import annotations

from pipeflow.errors import Infeasible, PlanError
from pipeflow.partitioners.exhaustive import MOST_ATOMS, exhaustive
from pipeflow.partitioners.problem import PartitionProblem
from pipeflow.testing.enumeration import least_objective


def optimum(problem: PartitionProblem) -> float | None:
    """The objective of the best partition; None where there is none.

    Raises:
        PlanError: the problem is too large to look at every partition.
    """
    if problem.costs.has_variants or problem.nested or problem.chunks > 1:
        return least_objective(problem)
    if problem.atoms.count > MOST_ATOMS:
        raise PlanError(
            f"{problem.atoms.count} layers that can be apart; the oracle looks at every cut of at most {MOST_ATOMS}, "
            "draw smaller problems"
        )
    try:
        return exhaustive(problem).certificate.objective
    except Infeasible:
        return None
