"""The check of a partition against its problem: the rules once more, written to be read."""

from __future__ import annotations

from collections import Counter

from pipeflow.partitioners.objective import device_bytes, objective, stage_terms
from pipeflow.partitioners.partition import Partition
from pipeflow.partitioners.problem import PartitionProblem


def check_partition(partition: Partition, problem: PartitionProblem) -> None:
    """Checks that the partition is valid for the problem and its certificate consistent.

    Complete and disjoint; convex and acyclic between stages (every edge between ordered layers
    leads to the same stage or a later one); colocated layers together; pins kept; on devices of the cluster,
    each with one stage; as many stages and replicas as asked for; within memory; the objective
    recomputed equal, and no smaller than the lower bound.

    Raises:
        AssertionError: says which layer, stage or device breaks which rule.
    """
    _check_layers(partition, problem)
    _check_order(partition, problem)
    _check_devices(partition, problem)
    _check_pins(partition, problem)
    _check_memory(partition, problem)
    _check_certificate(partition, problem)


def _check_layers(partition: Partition, problem: PartitionProblem) -> None:
    seen = Counter(name for stage in partition.stages for name in stage.layers)
    names = [layer.name for layer in problem.costs.layers]
    missing = [name for name in names if not seen[name]]
    _require(not missing, f"not complete: layers {missing} are on no stage")
    extra = sorted(seen.keys() - set(names))
    _require(not extra, f"not of this graph: layers {extra} do not exist")
    twice = [name for name in names if seen[name] > 1]
    _require(not twice, f"not disjoint: layers {twice} are on more than one stage")
    position = problem.costs.position_by_layer
    for index, stage in enumerate(partition.stages):
        places = [position[name] for name in stage.layers]
        _require(places == sorted(places), f"stage {index} lists its layers out of the graph's order: {stage.layers}")


def _check_order(partition: Partition, problem: PartitionProblem) -> None:
    stage_of = {name: index for index, stage in enumerate(partition.stages) for name in stage.layers}
    for a, b in problem.costs.graph.edges:
        if a in problem.unordered or b in problem.unordered:
            continue
        _require(
            stage_of[a] <= stage_of[b],
            f"not acyclic in order: {a!r} on stage {stage_of[a]} feeds {b!r} on the earlier stage {stage_of[b]}",
        )
    for group in problem.costs.colocated:
        stages = {name: stage_of[name] for name in group}
        _require(len(set(stages.values())) <= 1, f"not together: colocated layers are on stages {stages}")


def _check_devices(partition: Partition, problem: PartitionProblem) -> None:
    used = Counter(device for stage in partition.stages for device in stage.devices)
    outside = [d for d in used if d >= problem.cluster.num_devices]
    _require(not outside, f"devices {outside} do not exist; the cluster has {problem.cluster.num_devices}")
    shared = sorted(d for d, times in used.items() if times > problem.chunks)
    _require(not shared, f"devices {shared} hold more than {problem.chunks} stages")
    if problem.chunks > 1:
        _check_turns(partition, problem)
    counts = tuple(stage.num_replicas for stage in partition.stages)
    if problem.stage_count is not None:
        _require(len(counts) == problem.stage_count, f"{len(counts)} stages, not the {problem.stage_count} asked for")
    if problem.max_stages is not None:
        _require(len(counts) <= problem.max_stages, f"{len(counts)} stages, more than max_stages={problem.max_stages}")
    if problem.replicas is not None:
        _require(counts == problem.replicas, f"replicas {counts}, not {problem.replicas} as asked for")
    if problem.max_replicas is not None:
        _require(max(counts) <= problem.max_replicas, f"replicas {counts}, more than {problem.max_replicas}")
    uneven = [count for count in counts if not problem.allows(count)]
    _require(not uneven, f"{uneven} replicas do not divide {problem.num_microbatches} micro-batches evenly")
    for index, stage in enumerate(partition.stages):
        stuck = [name for name in stage.layers if not problem.costs.layer_by_name[name].replicable]
        _require(
            stage.num_replicas == 1 or not stuck,
            f"stage {index} has {stage.num_replicas} replicas, but layers {stuck} cannot be replicated",
        )


def _check_pins(partition: Partition, problem: PartitionProblem) -> None:
    broken = problem.pins.broken(partition.stages)
    _require(not broken, f"a pin is not kept: {'; '.join(broken)}")


def _check_turns(partition: Partition, problem: PartitionProblem) -> None:
    """Stages go round the devices in order, at most `chunks` times; replicated stages take a turn each."""
    turn, last = 0, -1
    for index, stage in enumerate(partition.stages):
        if min(stage.devices) <= last:
            turn += 1
        last = max(stage.devices)
        _require(turn < problem.chunks, f"stage {index} would begin round {turn + 1} of {problem.chunks}")


def _check_memory(partition: Partition, problem: PartitionProblem) -> None:
    for device, amount in device_bytes(partition.stages, stage_terms(problem, partition.stages)).items():
        limit = problem.cluster.devices[device].memory_bytes
        _require(limit is None or amount <= limit, f"device {device} has to hold {amount} bytes, of {limit}")


def _check_certificate(partition: Partition, problem: PartitionProblem) -> None:
    certificate, seconds = partition.certificate, objective(problem, partition.stages)
    _require(
        abs(certificate.objective - seconds) <= 1e-12 * seconds,
        f"the certificate says {certificate.objective} s, but the objective is {seconds} s",
    )
    _require(
        certificate.lower_bound <= certificate.objective,
        f"the lower bound {certificate.lower_bound} s is above the objective {certificate.objective} s",
    )


def _require(holds: bool, story: str) -> None:
    if not holds:
        raise AssertionError(story)
