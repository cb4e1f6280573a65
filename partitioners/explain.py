"""Why a partition costs what it costs, and what would change it.

Decides nothing: it prices the partition, its neighbours and problems a little richer with the one
objective, and says the differences. Text and drawings of it are made elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from pipeflow.errors import Infeasible, PlanError
from pipeflow.partitioners.bounds import lower_bound
from pipeflow.partitioners.cluster import Cluster
from pipeflow.partitioners.feasibility import shortfall
from pipeflow.partitioners.objective import StageTerms, device_seconds, objective, stage_terms
from pipeflow.partitioners.partition import Partition, Stage
from pipeflow.partitioners.problem import PartitionProblem
from pipeflow.partitioners.transfers import link_seconds


@dataclass(frozen=True, slots=True)
class Shift:
    """A cut moved by the least that can move.

    Attributes:
        layers: that change stage.
        seconds: the objective then; inf where it is not allowed.
        obstacle: why it is not allowed; "" where it is.
    """

    layers: tuple[str, ...]
    seconds: float
    obstacle: str = ""


@dataclass(frozen=True, slots=True)
class Move:
    """One tensor that moves over a cut.

    Attributes:
        tensor: its name.
        bytes: of the activation, for one micro-batch.
        gradient_bytes: of the gradient that comes back; 0 for none.
        seconds: of all its messages between stages on the two sides of the cut.
    """

    tensor: str
    bytes: int
    gradient_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class CutStory:
    """One cut between two stages that follow each other.

    Attributes:
        before, after: indices of the stages.
        moves: what moves from the stages up to `before` to those from `after` on.
        earlier: the cut one layer earlier: layers of `before` go to `after`. None where none can.
        later: the cut one layer later.
    """

    before: int
    after: int
    moves: tuple[Move, ...]
    earlier: Shift | None
    later: Shift | None

    @property
    def tensors(self) -> tuple[str, ...]:
        return tuple(move.tensor for move in self.moves)

    @property
    def bytes(self) -> int:
        """Of activations and gradients, for one micro-batch."""
        return sum(move.bytes + move.gradient_bytes for move in self.moves)

    @property
    def seconds(self) -> float:
        return math.fsum(move.seconds for move in self.moves)


@dataclass(frozen=True, slots=True)
class Richer:
    """The same graph with more of something.

    Attributes:
        what: "the same devices", "one more device", "links twice as fast" or "twice the memory".
        seconds: the objective.
        is_bound: whether no partition takes less than `seconds`; otherwise a partitioner found one
            that takes so long.
    """

    what: str
    seconds: float
    is_bound: bool


@dataclass(frozen=True, slots=True)
class Explanation:
    """The story of a partition.

    Attributes:
        seconds: its objective.
        bottleneck: index of the stage that takes longest, on the busiest device.
        terms: of every stage.
        cuts: between neighbouring stages.
        richer: what more of something would buy, the same devices first; without what does not
            apply (no limit on memory, transfers that are free).
    """

    seconds: float
    bottleneck: int
    terms: tuple[StageTerms, ...]
    cuts: tuple[CutStory, ...]
    richer: tuple[Richer, ...]


def explain(
    problem: PartitionProblem,
    stages: Partition | Sequence[Stage],
    *,
    partitioner: Callable[[PartitionProblem], Partition] | None = None,
) -> Explanation:
    """Explains a partition of the problem.

    Args:
        problem: that the partition is of.
        stages: the partition.
        partitioner: to solve richer problems with; None bounds them instead.
    """
    stages = stages.stages if isinstance(stages, Partition) else tuple(stages)
    terms = stage_terms(problem, stages)
    cuts = tuple(_cut_story(problem, stages, index) for index in range(len(stages) - 1))
    richer = tuple(_richer(problem, partitioner))
    return Explanation(objective(problem, stages), bottleneck_of(stages, terms), terms, cuts, richer)


def bottleneck_of(stages: Sequence[Stage], terms: Sequence[StageTerms]) -> int:
    """The longest stage on the busiest device; the first of several."""
    by_device = device_seconds(stages, terms)
    busiest = max(by_device, key=lambda device: (by_device[device], -device))
    on_it = [i for i, stage in enumerate(stages) if busiest in stage.devices]
    return max(on_it, key=lambda i: (terms[i].seconds, -i))


def _cut_story(problem: PartitionProblem, stages: Sequence[Stage], index: int) -> CutStory:
    earlier = _best_shift(problem, stages, index, index + 1)
    later = _best_shift(problem, stages, index + 1, index)
    return CutStory(index, index + 1, tuple(_moves(problem, stages, index)), earlier, later)


def _moves(problem: PartitionProblem, stages: Sequence[Stage], index: int) -> Iterator[Move]:
    costs = problem.costs
    stage_of = {name: s for s, stage in enumerate(stages) for name in stage.layers}
    for name, producer in costs.producer_by_tensor.items():
        readers = [r for r in costs.consumers_by_tensor[name] if stage_of[r] > index]
        if stage_of[producer] > index or not readers:
            continue
        tensor = costs.tensor_by_name[name]
        learners = {stage_of[r] for r in readers if costs.layer_by_name[r].has_backward}
        targets = {stage_of[r] for r in readers}
        seconds = _message_seconds(problem, stages, index, stage_of[producer], targets, tensor.bytes)
        gradient = tensor.gradient_bytes if learners else 0
        if gradient:
            seconds += _message_seconds(problem, stages, index, stage_of[producer], learners, gradient)
        yield Move(name, tensor.bytes, gradient, seconds)


def _message_seconds(
    problem: PartitionProblem, stages: Sequence[Stage], index: int, source: int, targets: set[int], amount: int
) -> float:
    """Of one tensor to the stages behind the cut, sent as the problem says."""
    if problem.transfers == "free":
        return 0.0
    if problem.transfers == "relayed":
        return link_seconds(problem.cluster, amount, stages[index].devices, stages[index + 1].devices)
    each = [link_seconds(problem.cluster, amount, stages[source].devices, stages[t].devices) for t in sorted(targets)]
    return max(each) if problem.fan_out == "tensor" else math.fsum(each)


def _best_shift(problem: PartitionProblem, stages: Sequence[Stage], giver: int, taker: int) -> Shift | None:
    """The cheapest move of one atom from a stage to its neighbour that keeps the order of the stages."""
    atoms = problem.atoms
    stage_of = {name: s for s, stage in enumerate(stages) for name in stage.layers}
    places = [stage_of[names[0]] for names in atoms.members]
    following = atoms.successors if taker > giver else atoms.predecessors
    movable = [a for a, s in enumerate(places) if s == giver and all(places[b] != giver for b in following[a])]
    if sum(s == giver for s in places) < 2:
        return None
    shifts = [_shift(problem, stages, a, giver, taker) for a in movable]
    return min(shifts, key=lambda shift: shift.seconds, default=None)


def _shift(problem: PartitionProblem, stages: Sequence[Stage], atom: int, giver: int, taker: int) -> Shift:
    names = problem.atoms.members[atom]
    if any(stage.variants for stage in stages):
        return Shift(names, math.inf, "its stages chose the ways in which their layers run together")
    moved = moved_layers(problem, stages, names, giver, taker)
    if stages[taker].num_replicas > 1 and not problem.atoms.replicable[atom]:
        return Shift(names, math.inf, f"stage {taker} has {stages[taker].num_replicas} replicas, which it cannot have")
    if reasons := shortfall(problem, moved):
        return Shift(names, math.inf, reasons[0])
    return Shift(names, objective(problem, moved))


def moved_layers(
    problem: PartitionProblem, stages: Sequence[Stage], names: Sequence[str], giver: int, taker: int
) -> tuple[Stage, ...]:
    """The stages with some layers moved from one to another; what is recomputed stays so."""
    position, leaving = problem.costs.position_by_layer, set(names)
    layers = [list(stage.layers) for stage in stages]
    layers[giver] = [name for name in layers[giver] if name not in leaving]
    layers[taker] = sorted({*layers[taker], *names}, key=position.__getitem__)
    again = {name for stage in stages for name in stage.recompute}
    return tuple(
        Stage(layers=tuple(part), mesh=s.mesh, recompute=tuple(name for name in part if name in again))
        for part, s in zip(layers, stages, strict=True)
    )


def _richer(problem: PartitionProblem, partitioner: Callable[[PartitionProblem], Partition] | None) -> Iterator[Richer]:
    cluster = problem.cluster
    options = [("the same devices", cluster)]
    if problem.replicas is None:
        options.append(("one more device", _with_one_more(cluster)))
    has_bandwidth = any(level.bandwidth for level in cluster.levels) or any(link.bandwidth for link in cluster.links)
    if cluster.num_devices > 1 and has_bandwidth and problem.transfers != "free":
        options.append(("links twice as fast", _with_faster_links(cluster)))
    if any(device.memory_bytes for device in cluster.devices):
        options.append(("twice the memory", _with_more_memory(cluster)))
    for what, other in options:
        changed = replace(problem, cluster=other)
        if partitioner is None:
            yield Richer(what, lower_bound(changed), is_bound=True)
            continue
        try:
            yield Richer(what, partitioner(changed).certificate.objective, is_bound=False)
        except (Infeasible, PlanError):
            continue


def _with_one_more(cluster: Cluster) -> Cluster:
    """One more device like the fastest, joined as the last ones are to the rest."""
    fastest = max(cluster.devices, key=lambda device: device.speed)
    devices = (*cluster.devices, fastest.model_copy(update={"name": f"{fastest.name} again"}))
    levels = cluster.levels
    if levels and levels[-1].size < len(devices):
        inner = levels[-2].size if len(levels) > 1 else 1
        levels = (*levels[:-1], levels[-1].model_copy(update={"size": -(-len(devices) // inner) * inner}))
    return Cluster(devices=devices, levels=levels, links=cluster.links)


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
