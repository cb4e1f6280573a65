"""What each stage of a partition sends and receives: seconds of its messages, bytes that it then holds.

Which tensors move and over which links; what they cost beside compute is the objective's to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from pipeflow.graphs.costs import LayerCosts, TensorCosts
from pipeflow.partitioners.cluster import Cluster
from pipeflow.partitioners.partition import Stage
from pipeflow.partitioners.problem import PartitionProblem


@dataclass(frozen=True, slots=True)
class StageTransfers:
    """The messages of one stage, for one micro-batch.

    Attributes:
        inward: seconds of each message between the stage and those before it, which send it
            activations and get gradients for them.
        outward: the same of those after it.
        received_bytes: of the activations that the stage's layers read from others.
    """

    inward: list[float] = field(default_factory=list)
    outward: list[float] = field(default_factory=list)
    received_bytes: list[int] = field(default_factory=list)


def link_seconds(cluster: Cluster, amount: int, sources: Sequence[int], targets: Sequence[int]) -> float:
    """Seconds of a message over the slowest link from one set of devices to another."""
    if len(sources) * len(targets) > 1 and cluster.has_equal_links and not set(sources) & set(targets):
        return cluster.transfer_seconds(amount, sources[0], targets[0])
    return max(cluster.transfer_seconds(amount, a, b) for a in sources for b in targets)


def stage_transfers(problem: PartitionProblem, stages: Sequence[Stage]) -> tuple[StageTransfers, ...]:
    """The messages of every stage; sent and received as `problem.transfers` says."""
    costs = problem.costs
    stage_of = {layer: index for index, stage in enumerate(stages) for layer in stage.layers}
    result = tuple(StageTransfers() for _ in stages)
    for name, producer in costs.producer_by_tensor.items():
        source, tensor = stage_of[producer], costs.tensor_by_name[name]
        readers = [costs.layer_by_name[r] for r in costs.consumers_by_tensor[name]]
        targets = sorted({stage_of[r.name] for r in readers} - {source})
        if problem.fan_out == "tensor":
            targets = list({stages[t].devices: t for t in reversed(targets)}.values())[::-1]
        for target in targets:
            result[target].received_bytes.append(tensor.bytes)
        for amount, ends in _messages(tensor, readers, stage_of, targets):
            if problem.transfers == "relayed":
                _relay(problem, stages, result, amount, source, ends)
            elif problem.transfers != "free":
                _send(problem, stages, result, amount, source, ends)
    for index, stage in enumerate(stages):
        if stage.variants and problem.transfers != "free":
            _add_borders(problem, stage, result[index])
    return result


def _add_borders(problem: PartitionProblem, stage: Stage, moved: StageTransfers) -> None:
    """What the devices of a stage's replicas exchange at its border, on top of the messages; adds to `moved`."""
    costs, here = problem.costs, set(stage.layers)
    bandwidth, _ = problem.transfer_link
    for name, way in zip(stage.layers, stage.variants, strict=True):
        layer = costs.layer_by_name[name]
        for tensor, amount in layer.variant(way, stage.degree).border_bytes if way else ():
            producer = costs.producer_by_tensor.get(tensor)
            if tensor in layer.inputs and producer is not None and producer not in here:
                moved.inward.append(amount / bandwidth)
            if producer == name and not here.issuperset(costs.consumers_by_tensor[tensor]):
                moved.outward.append(amount / bandwidth)


def _messages(
    tensor: TensorCosts, readers: Sequence[LayerCosts], stage_of: dict[str, int], targets: Sequence[int]
) -> list[tuple[int, list[int]]]:
    """(bytes, stages at the other end) of the activation, and of its gradient where there is one."""
    learners = {stage_of[reader.name] for reader in readers if reader.has_backward}
    return [
        (tensor.bytes, list(targets)),
        (tensor.gradient_bytes, [t for t in targets if tensor.gradient_bytes and t in learners]),
    ]


def _send(
    problem: PartitionProblem,
    stages: Sequence[Stage],
    result: Sequence[StageTransfers],
    amount: int,
    source: int,
    ends: Sequence[int],
) -> None:
    """Straight from stage to stage; adds to `result`."""
    devices = stages[source].devices
    seconds = [link_seconds(problem.cluster, amount, devices, stages[t].devices) for t in ends]
    for target, s in zip(ends, seconds, strict=True):
        result[target].inward.append(s)
    if seconds:
        result[source].outward.extend(seconds if problem.fan_out == "stage" else [max(seconds)])


def _relay(
    problem: PartitionProblem,
    stages: Sequence[Stage],
    result: Sequence[StageTransfers],
    amount: int,
    source: int,
    ends: Sequence[int],
) -> None:
    """Through every stage up to the last that reads it; adds to `result`.

    What the first stage sends is counted where it arrives alone.
    """
    for index in range(source, max(ends, default=source)):
        seconds = link_seconds(problem.cluster, amount, stages[index].devices, stages[index + 1].devices)
        result[index + 1].inward.append(seconds)
        if index:
            result[index].outward.append(seconds)


def cut_messages(problem: PartitionProblem, stages: Sequence[Stage]) -> list[tuple[int, int]]:
    """How many messages pass the cut before each stage, and after the last, and their bytes."""
    costs = problem.costs
    stage_of = {layer: index for index, stage in enumerate(stages) for layer in stage.layers}
    counts, amounts = [0] * (len(stages) + 1), [0] * (len(stages) + 1)
    for name, producer in costs.producer_by_tensor.items():
        source, tensor = stage_of[producer], costs.tensor_by_name[name]
        readers = [costs.layer_by_name[r] for r in costs.consumers_by_tensor[name]]
        targets = sorted({stage_of[r.name] for r in readers} - {source})
        for amount, ends in _messages(tensor, readers, stage_of, targets):
            for cut in range(source + 1, max(ends, default=source) + 1):
                counts[cut] += 1
                amounts[cut] += amount
    return list(zip(counts, amounts, strict=True))
