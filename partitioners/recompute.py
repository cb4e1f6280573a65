"""Which layers of a cut keep nothing for backward and are computed again for it.

Decides after the partitioner, stage by stage: what the caller names, or the cheapest set that makes
a stage fit its devices. Bytes and seconds are those of `pipeflow.partitioners.objective`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Literal

from pipeflow.errors import Infeasible
from pipeflow.graphs.costs import GraphCosts
from pipeflow.partitioners.feasibility import shortfall
from pipeflow.partitioners.layer_choice import resolve_layers, saving_nothing
from pipeflow.partitioners.objective import device_bytes, objective, stage_terms
from pipeflow.partitioners.partition import Partition, Stage
from pipeflow.partitioners.problem import PartitionProblem

RecomputeChoice = Literal["never", "always", "fit"] | Collection[str]
"""What a caller asks for: a rule, or names of layers with `*` and `?`."""

Recompute = Literal["fit"] | frozenset[str]
"""The choice for one graph: layers by name, or whatever it takes to fit."""

_EXACT = 10
"""All sets of so many layers are tried; of more, those that save most for their seconds come first."""


def resolve_recompute(choice: RecomputeChoice, costs: GraphCosts) -> Recompute:
    """The layers that are meant.

    Raises:
        PlanError: a word that is no rule, or a pattern that fits no layer.
    """
    if choice == "fit":
        return "fit"
    return resolve_layers("recompute", choice, costs, rules=", 'fit'")


def cut_with_recompute(
    partitioner: Callable[[PartitionProblem], Partition], problem: PartitionProblem, recompute: Recompute
) -> Partition:
    """The partitioner's cut with the layers to recompute chosen, and the certificate brought in line.

    The partitioner knows nothing of it: it cuts the problem in which recomputed layers save nothing, so
    that no cut with recompute needs less memory or time.
    A chosen layer adds time, so the lower bound holds for the cut with recompute too.

    Raises:
        Infeasible: even with everything recomputed that may be, a device lacks memory.
    """
    if recompute == "fit":
        try:
            return partitioner(problem)
        except Infeasible:
            everything = frozenset(layer.name for layer in problem.costs.layers)
            partition = partitioner(replace(problem, costs=saving_nothing(problem.costs, everything)))
        stages = _fit(problem, partition.stages)
    elif recompute:
        partition = partitioner(replace(problem, costs=saving_nothing(problem.costs, recompute)))
        stages = tuple(stage.with_recompute(recompute.intersection(stage.layers)) for stage in partition.stages)
    else:
        return partitioner(problem)
    if reasons := shortfall(problem, stages):
        raise Infeasible(list(reasons))
    certificate = partition.certificate.model_copy(update={"objective": objective(problem, stages)})
    return Partition(stages=stages, certificate=certificate)


def _fit(problem: PartitionProblem, stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """Stage by stage, the cheapest set that brings its devices within their memory, all if none does."""
    chosen = list(stages)
    for index in range(len(chosen)):
        if _lacking(problem, chosen, index) > 0:
            chosen[index] = _cheapest(problem, chosen, index)
    return tuple(chosen)


def _cheapest(problem: PartitionProblem, stages: list[Stage], index: int) -> Stage:
    layers = problem.costs.layer_by_name
    useful = [n for n in stages[index].layers if layers[n].has_backward and layers[n].saved_bytes]

    def seconds(names: Collection[str]) -> float:
        return sum(layers[n].forward_seconds for n in names)

    def lacking(names: Collection[str]) -> int:
        tried = list(stages)
        tried[index] = stages[index].with_recompute(names)
        return _lacking(problem, tried, index)

    if len(useful) <= _EXACT:
        sets = [names for size in range(1, len(useful) + 1) for names in combinations(useful, size)]
        fitting = (names for names in sorted(sets, key=seconds) if lacking(names) <= 0)
        return stages[index].with_recompute(next(fitting, tuple(useful)))
    best = sorted(useful, key=lambda n: layers[n].forward_seconds / layers[n].saved_bytes)
    count = next((k for k in range(1, len(best) + 1) if lacking(best[:k]) <= 0), len(best))
    kept = best[:count]
    for name in sorted(kept, key=lambda n: -layers[n].forward_seconds):
        fewer = [n for n in kept if n != name]
        if fewer and lacking(fewer) <= 0:
            kept = fewer
    return stages[index].with_recompute(kept)


def _lacking(problem: PartitionProblem, stages: Sequence[Stage], index: int) -> int:
    """Bytes that the worst device of the stage lacks; negative where there is room."""
    held = device_bytes(stages, stage_terms(problem, stages))
    limits = {d: problem.cluster.devices[d].memory_bytes for d in stages[index].devices}
    return max((held[d] - limit for d, limit in limits.items() if limit is not None), default=0)
