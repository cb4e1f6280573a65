"""Why a partition costs what it costs, and what would change it.

Decides nothing: it prices the partition, its neighbours and problems a little richer with the one
objective, and says the differences. Text and drawings of it are made elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from pipeflow.errors import Infeasible, PlanError
from pipeflow.partitioners.cluster import Cluster
from pipeflow.partitioners.feasibility import shortfall
from pipeflow.partitioners.objective import StageTerms, objective, stage_terms
from pipeflow.partitioners.partition import Partition, Stage
from pipeflow.partitioners.problem import PartitionProblem


@dataclass(frozen=True, slots=True)
class Shift:
    """A cut moved by the least that can move.

    Attributes:
        layers: that change stage.
        seconds: the objective then; inf where memory or replicas do not allow it.
    """

    layers: tuple[str, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class CutStory:
    """One cut between two stages that follow each other.

    Attributes:
        before, after: indices of the stages.
        tensors: what moves from the stages up to `before` to those from `after` on.
        bytes: of these activations and of the gradients that come back, for one micro-batch.
        earlier: the cut one layer earlier: layers of `before` go to `after`. None where none can.
        later: the cut one layer later.
    """

    before: int
    after: int
    tensors: tuple[str, ...]
    bytes: int
    earlier: Shift | None
    later: Shift | None


@dataclass(frozen=True, slots=True)
class Explanation:
    """The story of a partition.

    Attributes:
        seconds: its objective.
        bottleneck: index of the stage that takes longest.
        terms: of every stage.
        cuts: between neighbouring stages.
        richer: the objective that the partitioner reaches with more of something, by what it is:
            "one more device", "links twice as fast", "twice the memory"; without those that do not
            apply (unlike devices, no limit).
    """

    seconds: float
    bottleneck: int
    terms: tuple[StageTerms, ...]
    cuts: tuple[CutStory, ...]
    richer: tuple[tuple[str, float], ...]


def explain(
    problem: PartitionProblem,
    partition: Partition,
    *,
    partitioner: Callable[[PartitionProblem], Partition] | None = None,
) -> Explanation:
    """Explains a partition of the problem.

    Args:
        problem: that the partition is of.
        partition: with one stage on a device.
        partitioner: to try richer problems with; None leaves those out.
    """
    stages = partition.stages
    terms = stage_terms(problem, stages)
    longest = max(range(len(stages)), key=lambda index: (terms[index].seconds, -index))
    cuts = tuple(_cut_story(problem, stages, index) for index in range(len(stages) - 1))
    richer = tuple(_richer(problem, partitioner)) if partitioner else ()
    return Explanation(objective(problem, stages), longest, terms, cuts, richer)


def _cut_story(problem: PartitionProblem, stages: Sequence[Stage], index: int) -> CutStory:
    costs = problem.costs
    stage_of = {name: s for s, stage in enumerate(stages) for name in stage.layers}
    moved = tuple(
        tensor
        for tensor, producer in costs.producer_by_tensor.items()
        if stage_of[producer] <= index and any(stage_of[r] > index for r in costs.consumers_by_tensor[tensor])
    )
    amount = sum(costs.tensor_by_name[t].bytes + costs.tensor_by_name[t].gradient_bytes for t in moved)
    earlier = _best_shift(problem, stages, index, index + 1)
    later = _best_shift(problem, stages, index + 1, index)
    return CutStory(index, index + 1, moved, amount, earlier, later)


def _best_shift(problem: PartitionProblem, stages: Sequence[Stage], giver: int, taker: int) -> Shift | None:
    """The cheapest move of one atom from a stage to its neighbour that keeps the order of the stages."""
    atoms = problem.atoms
    stage_of = {name: s for s, stage in enumerate(stages) for name in stage.layers}
    places = [stage_of[names[0]] for names in atoms.members]
    following = atoms.successors if taker > giver else atoms.predecessors
    movable = [a for a, s in enumerate(places) if s == giver and all(places[b] != giver for b in following[a])]
    if len(stages[giver].layers) == 0 or sum(s == giver for s in places) < 2:
        return None
    shifts = [Shift(atoms.members[a], _moved_seconds(problem, stages, a, giver, taker)) for a in movable]
    return min(shifts, key=lambda shift: shift.seconds, default=None)


def _moved_seconds(problem: PartitionProblem, stages: Sequence[Stage], atom: int, giver: int, taker: int) -> float:
    names, position = set(problem.atoms.members[atom]), problem.costs.position_by_layer
    layers = [list(stage.layers) for stage in stages]
    layers[giver] = [name for name in layers[giver] if name not in names]
    layers[taker] = sorted({*layers[taker], *names}, key=position.__getitem__)
    again = {name for stage in stages for name in stage.recompute}
    moved = tuple(
        Stage(layers=tuple(part), mesh=s.mesh, recompute=tuple(name for name in part if name in again))
        for part, s in zip(layers, stages, strict=True)
    )
    if stages[taker].num_replicas > 1 and not problem.atoms.replicable[atom]:
        return math.inf
    return math.inf if shortfall(problem, moved) else objective(problem, moved)


def _richer(problem: PartitionProblem, partitioner: Callable[[PartitionProblem], Partition]) -> list[tuple[str, float]]:
    cluster = problem.cluster
    options: list[tuple[str, Cluster]] = []
    if cluster.is_uniform and problem.replicas is None:
        level = cluster.levels[0] if cluster.levels else None
        more = Cluster.uniform(
            cluster.num_devices + 1,
            cluster.devices[0],
            bandwidth=level.bandwidth if level else None,
            latency=level.latency if level else 0.0,
        )
        options.append(("one more device", more))
    if any(level.bandwidth for level in cluster.levels) or any(link.bandwidth for link in cluster.links):
        options.append(("links twice as fast", _with_faster_links(cluster)))
    if any(device.memory_bytes for device in cluster.devices):
        options.append(("twice the memory", _with_more_memory(cluster)))
    result = []
    for name, other in options:
        try:
            result.append((name, partitioner(replace(problem, cluster=other)).certificate.objective))
        except (Infeasible, PlanError):
            continue
    return result


def _with_faster_links(cluster: Cluster) -> Cluster:
    data = cluster.model_dump()
    for link in (*data["levels"], *data["links"]):
        if link["bandwidth"] is not None:
            link["bandwidth"] *= 2
    return Cluster.model_validate(data)


def _with_more_memory(cluster: Cluster) -> Cluster:
    data = cluster.model_dump()
    for device in data["devices"]:
        if device["memory_bytes"] is not None:
            device["memory_bytes"] *= 2
    return Cluster.model_validate(data)
