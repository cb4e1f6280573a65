"""Which layers keep what their backward needs on the host, and what a cut then needs.

A micro-batch's share is on the device while the forward of its stage and the next compute of the
rank run, which the copy to the host runs beside; and again from before the compute that stands
before its backward, which the copy back runs beside:

    computes     F0    F1    F2    B0 ...  F5    B3
    on device    0 . . . .                   . . . .       of micro-batch 0, and of 3
                             ^ offload 0   ^ fetch 3

Where the two would meet (fewer than three computes between) it stays. At any time the shares of at
most three micro-batches are on the device (`MOST_ON_DEVICE`): what runs, what ran before, what is next.
After Rhu et al., "vDNN: Virtualized Deep Neural Networks for Scalable, Memory-Efficient Neural
Network Design" (MICRO 2016), section 3, by micro-batch instead of by layer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Literal

from pipeflow.errors import Infeasible, PlanError
from pipeflow.graphs.costs import GraphCosts
from pipeflow.partitioners.feasibility import shortfall
from pipeflow.partitioners.layer_choice import resolve_layers, saving_nothing
from pipeflow.partitioners.partition import Partition
from pipeflow.partitioners.problem import PartitionProblem

OffloadChoice = Literal["never", "always"] | Collection[str]
"""What a caller asks for: a rule, or names of layers with `*` and `?`."""


def check_offload(offload: Collection[str], costs: GraphCosts, recompute: Collection[str]) -> None:
    """Refuses a list of layers that a plan cannot have.

    Raises:
        PlanError: a layer that does not exist, stands out of order, or is recomputed.
    """
    names = [layer.name for layer in costs.layers]
    chosen = frozenset(offload)
    if foreign := sorted(chosen.difference(names)):
        raise PlanError(f"offload names {foreign[0]!r}, which is not a layer of {costs.name!r}; name its layers")
    if tuple(offload) != tuple(name for name in names if name in chosen):
        raise PlanError(f"offload={tuple(offload)}; name each layer once, in the graph's order")
    if both := sorted(chosen.intersection(recompute)):
        raise PlanError(
            f"layer {both[0]!r} is offloaded and recomputed; what is computed again is not kept: choose one of the two"
        )


def resolve_offload(choice: OffloadChoice, costs: GraphCosts) -> frozenset[str]:
    """The layers that are meant, those without a backward left out.

    Raises:
        PlanError: a word that is no rule, or a pattern that fits no layer.
    """
    return frozenset(
        name for name in resolve_layers("offload", choice, costs) if costs.layer_by_name[name].has_backward
    )


def cut_with_offload(cut: Callable[[PartitionProblem], Partition], problem: PartitionProblem) -> Partition:
    """A cut of the problem without what its offloaded layers save; their share on the device is checked after.

    Args:
        cut: knows nothing of offloading.

    Raises:
        Infeasible: a device lacks memory for what is on it at once.
    """
    if not problem.offload:
        return cut(problem)
    partition = cut(replace(problem, offload=frozenset(), costs=saving_nothing(problem.costs, problem.offload)))
    if reasons := shortfall(problem, partition.stages):
        raise Infeasible(list(reasons))
    return partition
