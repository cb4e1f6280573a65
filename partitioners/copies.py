"""What a partition pays for keeping copies of shared parameters: one more sum over the stages that do.

Where a cut puts the second user of a parameter decides between whom its gradients travel, so no
search sees this term beforehand; the objective adds it, and lower bounds hold without it.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeflow.graphs.costs import GraphCosts
from pipeflow.graphs.sharing import shared_groups
from pipeflow.partitioners.partition import Stage


def copy_sums(costs: GraphCosts, stages: Sequence[Stage]) -> list[list[tuple[int, tuple[int, ...]]]]:
    """For every stage, (bytes, devices) of the sums over several stages that it takes part in."""
    result: list[list[tuple[int, tuple[int, ...]]]] = [[] for _ in stages]
    for group in shared_groups(costs, [stage.layers for stage in stages]):
        devices = tuple(sorted({device for index in group.stages for device in stages[index].devices}))
        for index in group.stages:
            result[index].append((group.bytes, devices))
    return result
