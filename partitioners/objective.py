"""What a partition costs: the one objective, in seconds and bytes.

Every partitioner, the planner and the tests call this; nothing here searches. For a stage
with R replicas and M micro-batches, a replica spends per micro-batch of the batch

    ceil(M / R) / M * (compute + transfers) + reduce / M

compute    forward and backward of its layers on its device;
transfers  every tensor that crosses its border, in either direction: an activation it sends to
           each stage that reads it, an activation it receives, and the gradients of both, each
           over the slowest link between the devices of the two stages. Tensors are separate
           messages, so each pays the latency. Inputs of the graph cost nothing;
reduce     the ring all-reduce of its gradients (2 (R - 1) / R of the bytes and 2 (R - 1)
           latencies over the slowest link among its devices), once for all micro-batches or, with
           `reduce_every` "microbatch", after each that the replica runs.

With transfers "overlapped" the longer of compute and transfers counts instead of the sum. With
"relayed" a stage but the first costs the longest of three: compute and reduction, the transfers that
enter it, and those that leave it, of all that passes the cut before or after it for any later stage;
the first costs compute and reduction, for its sends are counted where they arrive (Narayanan et al.,
SOSP 2019, as its optimizer does). A reduction over a "server" moves 4 (R - 1) / R of the bytes and
pays 2 latencies.

The objective is the largest sum over the stages of any one device. A replica holds

    versions * parameters + gradients + optimizer state + in flight * (kept + received) + transient

kept       what its layers save for backward, recomputed ones left out, and transient what a run of
           those saves while its backward runs (`pipeflow.partitioners.activations`). Their forward
           is counted twice in compute. Of what offloaded layers save, a few micro-batches' share
           counts (`PartitionProblem.offload`).

A layer that runs in one of its variants (`pipeflow.graphs.costs.Variant`) has that one's seconds and
bytes; what it holds whatever is in flight stands under its parameters, and what its devices exchange
at the border of the stage is among the transfers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import assert_never

from pipeflow.graphs.costs import GraphCosts, LayerCosts
from pipeflow.partitioners.activations import MOST_ON_DEVICE, stage_activations
from pipeflow.partitioners.cluster import Cluster, Device
from pipeflow.partitioners.copies import copy_sums
from pipeflow.partitioners.nesting import children, nested_levels
from pipeflow.partitioners.partition import Stage
from pipeflow.partitioners.problem import PartitionProblem, Position, Reduction
from pipeflow.partitioners.transfers import StageTransfers, cut_messages, stage_transfers


@dataclass(frozen=True, slots=True)
class StageTerms:
    """What one stage costs, term by term.

    Attributes:
        compute_seconds: forward and backward of one micro-batch on its slowest device, what is
            recomputed for backward included.
        transfer_seconds: of one micro-batch, both directions.
        reduce_seconds: of one iteration.
        seconds: of its slowest replica per micro-batch of the batch (see the head of the module).
        seconds_by_device: the same of each of its devices, in the stage's order.
        in_flight: micro-batches whose activations a replica holds at once.
        parameter_bytes, gradient_bytes, optimizer_bytes, activation_bytes: of one replica.
    """

    compute_seconds: float
    transfer_seconds: float
    reduce_seconds: float
    seconds: float
    seconds_by_device: tuple[float, ...]
    in_flight: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.parameter_bytes + self.gradient_bytes + self.optimizer_bytes + self.activation_bytes


def compute_seconds(layers: Iterable[LayerCosts], device: Device, again: Iterable[LayerCosts] = ()) -> float:
    """Forward and backward of one micro-batch of the layers on the device.

    Args:
        again: those of the layers whose forward runs a second time, for backward.
    """
    by_kind, speed = device.speed_by_kind, device.speed
    seconds = [layer.seconds / by_kind.get(layer.kind, speed) for layer in layers]
    return math.fsum(seconds + [layer.forward_seconds / by_kind.get(layer.kind, speed) for layer in again])


def reduce_seconds(cluster: Cluster, amount: int, devices: Sequence[int], reduction: Reduction = "ring") -> float:
    """Seconds of an all-reduce of `amount` bytes among the devices."""
    count = len(devices)
    if count < 2 or not amount:
        return 0.0
    pairs = [(devices[0], devices[1])] if cluster.has_equal_links else list(_pairs(devices))
    volume, latencies = reduction_volume(count, reduction)
    return max(volume * amount / bandwidth + latencies * s for bandwidth, s in (cluster.link(a, b) for a, b in pairs))


def reduction_volume(count: int, reduction: Reduction) -> tuple[float, int]:
    """What an all-reduce among `count` replicas moves over a link, for each byte, and its latencies."""
    if reduction == "server":
        return 4 * (count - 1) / count, 2 if count > 1 else 0
    return 2 * (count - 1) / count, 2 * (count - 1)


def _pairs(devices: Sequence[int]) -> Iterable[tuple[int, int]]:
    return ((a, b) for k, a in enumerate(devices) for b in devices[k + 1 :])


def stage_terms(problem: PartitionProblem, stages: Sequence[Stage]) -> tuple[StageTerms, ...]:
    """The terms of every stage of a partition.

    Args:
        stages: all stages, in order; together they hold every layer once.
    """
    costs, cluster = chosen_costs(problem.costs, stages), problem.cluster
    moved = stage_transfers(problem, stages)
    nested = nested_seconds(problem, stages) if problem.nested else None
    copies = copy_sums(costs, stages)
    following = 0
    result: list[StageTerms] = []
    for index in reversed(range(len(stages))):
        stage, count = stages[index], stages[index].num_replicas
        following += count
        layers = [costs.layer_by_name[name] for name in stage.layers]
        again = [costs.layer_by_name[name] for name in stage.recompute]
        parameters = sum(layer.parameter_bytes for layer in layers)
        reduction = reduce_seconds(cluster, parameters, stage.devices[:: stage.degree], problem.reduction)
        reduction += math.fsum(
            reduce_seconds(cluster, amount, devices, problem.reduction) for amount, devices in copies[index]
        )
        computes = [compute_seconds(layers, cluster.devices[d], again) for d in stage.devices]
        by_device = tuple(_replica_seconds(problem, count, c, moved[index], reduction) for c in computes)
        if nested is not None:
            by_device = (nested[index],) * count
        position = Position(count, following, problem.num_microbatches)
        in_flight, versions = problem.in_flight(position), problem.weight_versions(position)
        kept, transient = stage_activations(costs, stage)
        away = sum(costs.layer_by_name[name].saved_bytes for name in problem.offload.intersection(stage.layers))
        activations = in_flight * (kept - away) + min(in_flight, MOST_ON_DEVICE) * away
        resident = resident_bytes(problem.costs, stage)
        stateful = sum(
            c.parameter_bytes for c, way in zip(layers, stage.variants or [""] * len(layers), strict=True) if not way
        )
        received = sum(moved[index].received_bytes) if problem.holds_received else 0
        result.append(
            StageTerms(
                compute_seconds=max(computes),
                transfer_seconds=_beside_compute(problem, moved[index]),
                reduce_seconds=reduction,
                seconds=max(by_device),
                seconds_by_device=by_device,
                in_flight=in_flight,
                parameter_bytes=versions * stateful + resident,
                gradient_bytes=math.ceil(problem.gradient_ratio * stateful),
                optimizer_bytes=math.ceil(problem.optimizer_ratio * stateful),
                activation_bytes=activations + in_flight * received + (transient if in_flight else 0),
            )
        )
    return tuple(reversed(result))


def nested_seconds(problem: PartitionProblem, stages: Sequence[Stage]) -> list[float]:
    """Seconds of every stage per micro-batch of the batch, where levels are nested."""
    costs, levels = problem.costs, nested_levels(problem.cluster)
    layers = [[costs.layer_by_name[name] for name in stage.layers] for stage in stages]
    seconds = [compute_seconds(group, problem.cluster.devices[0]) for group in layers]
    parameters = [sum(layer.parameter_bytes for layer in group) for group in layers]
    passing = cut_messages(problem, stages)

    def walk(depth: int, among: Sequence[int], first_device: int) -> None:
        level = levels[depth]
        for place, child in enumerate(children(level, stages, among, first_device)):
            if depth:
                walk(depth - 1, child.stages, child.groups[0] * level.group_size)
            r, amount = len(child.groups), sum(parameters[i] for i in child.stages)
            volume, latencies = reduction_volume(r, problem.reduction)
            reduction = volume * amount / level.bandwidth + latencies * level.latency * (amount > 0)
            reduction /= 1 if place else level.num_inside
            cuts = (child.stages[0], child.stages[-1] + 1) if place and problem.transfers == "relayed" else ()
            moved = max(
                (count * level.latency + n / level.bandwidth for count, n in map(passing.__getitem__, cuts)), default=0
            )
            for i in child.stages:
                seconds[i] = problem.share(r) * max(seconds[i] + reduction, moved)

    walk(len(levels) - 1, range(len(stages)), 0)
    return seconds


def chosen_costs(costs: GraphCosts, stages: Sequence[Stage]) -> GraphCosts:
    """The costs with every layer as its stage runs it."""
    if not any(stage.variants for stage in stages):
        return costs
    way = {n: (v, s.degree) for s in stages for n, v in zip(s.layers, s.variants, strict=False) if v}
    layers = tuple(c.in_variant(*way[c.name]) if c.name in way else c for c in costs.layers)
    return costs.model_copy(update={"layers": layers})


def resident_bytes(costs: GraphCosts, stage: Stage) -> int:
    """What the variants of a stage's layers hold whatever is in flight."""
    ways = zip(stage.layers, stage.variants, strict=False)
    return sum(costs.layer_by_name[n].variant(v, stage.degree).resident_bytes for n, v in ways if v)


def _beside_compute(problem: PartitionProblem, moved: StageTransfers) -> float:
    """Seconds of a stage's transfers: both directions, or the longer where each has its own."""
    if problem.transfers == "relayed":
        return max(math.fsum(moved.inward), math.fsum(moved.outward))
    return math.fsum(moved.inward + moved.outward)


def _replica_seconds(
    problem: PartitionProblem, count: int, compute: float, moved: StageTransfers, reduction: float
) -> float:
    share, reduced = problem.share(count), reduction * problem.reductions(count)
    transfers = _beside_compute(problem, moved)
    match problem.transfers:
        case "added" | "free":
            return share * (compute + transfers) + reduced
        case "overlapped":
            return share * max(compute, transfers) + reduced
        case "relayed":
            return max(share * compute + reduced, share * transfers)
        case _:
            assert_never(problem.transfers)


def device_seconds(stages: Sequence[Stage], terms: Sequence[StageTerms]) -> dict[int, float]:
    """Seconds per micro-batch of every device in use: the sum over the stages that it holds."""
    parts: dict[int, list[float]] = {}
    for stage, term in zip(stages, terms, strict=True):
        for device, seconds in zip(stage.devices, term.seconds_by_device, strict=True):
            parts.setdefault(device, []).append(seconds)
    return {device: math.fsum(seconds) for device, seconds in parts.items()}


def device_bytes(stages: Sequence[Stage], terms: Sequence[StageTerms]) -> dict[int, int]:
    """Bytes that every device in use has to hold."""
    result: dict[int, int] = {}
    for stage, term in zip(stages, terms, strict=True):
        for device in stage.devices:
            result[device] = result.get(device, 0) + term.total_bytes
    return result


def objective(problem: PartitionProblem, stages: Sequence[Stage]) -> float:
    """Seconds per micro-batch of the busiest device."""
    return max(device_seconds(stages, stage_terms(problem, stages)).values())
