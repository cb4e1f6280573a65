"""The smallest set of rules behind an `Infeasible`, proved by arithmetic or, if small, by search.

Partitioners say what they ran into; this is asked once, at the end, by who called them.
"""

from __future__ import annotations

from pipeflow.errors import Infeasible
from pipeflow.partitioners.contradiction import pins_contradict
from pipeflow.partitioners.exhaustive import is_feasible
from pipeflow.partitioners.feasibility import quick_reason
from pipeflow.partitioners.problem import PartitionProblem
from pipeflow.partitioners.rules import smallest_contradiction

_MOST_LAYERS = 8
_MOST_DEVICES = 4
"""Within these, that there is no partition is proved by looking at all of them."""


def explained(problem: PartitionProblem, error: Infeasible) -> Infeasible:
    """The error with a smallest set of rules that leaves no partition, where that can be proved.

    Its reasons stay as they are where they say how many bytes are lacking; what only a search
    could tell is told by the rules themselves.
    """
    if not is_impossible(problem) or (error.rules and not _is_small(problem)):
        return error
    rules = smallest_contradiction(problem, is_impossible)
    told = not error.rules and quick_reason(problem) is not None
    return Infeasible(error.reasons if told else [rule.text for rule in rules], rules)


def is_impossible(problem: PartitionProblem) -> bool:
    """Whether it is proved that the problem has no partition; of problems with variants nothing is."""
    if problem.costs.has_variants:
        return False
    if pins_contradict(problem) or quick_reason(problem) is not None:
        return True
    return _is_small(problem) and not is_feasible(problem)


def _is_small(problem: PartitionProblem) -> bool:
    few = len(problem.costs.layers) <= _MOST_LAYERS and problem.cluster.num_devices <= _MOST_DEVICES
    return few and problem.chunks == 1 and not problem.nested
