"""The check of a partition against its problem: the rules once more, written to be read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from pipeflow.partitioners.objective import device_bytes, objective, stage_terms
from pipeflow.partitioners.partition import Partition, Stage, num_turns
from pipeflow.partitioners.problem import PartitionProblem


def check_partition(partition: Partition, problem: PartitionProblem) -> None:
    """Checks that the partition is valid for the problem and its certificate consistent.

    Its stages keep all rules (see `check_stages`); the objective recomputed is equal, and no smaller than
    the lower bound, which is no less than 0.

    Raises:
        AssertionError: says which layer, stage or device breaks which rule.
    """
    check_stages(partition.stages, problem)
    _check_certificate(partition, problem)


def check_stages(stages: Sequence[Stage], problem: PartitionProblem) -> None:
    """Checks that the stages are a partition of the problem that keeps its rules, whatever it costs.

    Complete and disjoint; convex and acyclic between stages (every edge between ordered layers
    leads to the same stage or a later one); colocated layers together; pins kept; on devices of the cluster,
    each with one stage; as many stages and replicas as asked for; each layer in one of its ways; within memory.

    Raises:
        AssertionError: says which layer, stage or device breaks which rule.
    """
    check_cut([stage.layers for stage in stages], problem)
    _check_devices(stages, problem)
    _check_variants(stages, problem)
    _check_pins(stages, problem)
    _check_memory(stages, problem)


def check_cut(cut: Sequence[Sequence[str]], problem: PartitionProblem) -> None:
    """The part of `check_stages` for which the layers of each stage suffice: complete, disjoint, acyclic, together.

    Raises:
        AssertionError: says which layer breaks which rule.
    """
    seen = Counter(name for names in cut for name in names)
    names = [layer.name for layer in problem.costs.layers]
    missing = [name for name in names if not seen[name]]
    _require(not missing, f"not complete: layers {missing} are on no stage")
    extra = sorted(seen.keys() - set(names))
    _require(not extra, f"not of this graph: layers {extra} do not exist")
    twice = [name for name in names if seen[name] > 1]
    _require(not twice, f"not disjoint: layers {twice} are on more than one stage")
    position = problem.costs.position_by_layer
    for index, layers in enumerate(cut):
        places = [position[name] for name in layers]
        _require(places == sorted(places), f"stage {index} lists its layers out of the graph's order: {layers}")
    stage_of = {name: index for index, layers in enumerate(cut) for name in layers}
    for a, b in problem.costs.graph.edges:
        if a in problem.unordered or b in problem.unordered:
            continue
        _require(
            stage_of[a] <= stage_of[b],
            f"not acyclic in order: {a!r} on stage {stage_of[a]} feeds {b!r} on the earlier stage {stage_of[b]}",
        )
    for what, groups in (("colocated layers", problem.costs.colocated), ("layers to be together", problem.together)):
        for group in groups:
            stages = {name: stage_of[name] for name in group}
            _require(len(set(stages.values())) <= 1, f"not together: {what} are on stages {stages}")


def _check_devices(stages: Sequence[Stage], problem: PartitionProblem) -> None:
    used = Counter(device for stage in stages for device in stage.devices)
    outside = [d for d in used if d >= problem.cluster.num_devices]
    _require(not outside, f"devices {outside} do not exist; the cluster has {problem.cluster.num_devices}")
    shared = sorted(d for d, times in used.items() if times > problem.chunks)
    _require(not shared, f"devices {shared} hold more than {problem.chunks} stages")
    if problem.chunks > 1:
        _check_turns(stages, problem)
    counts = tuple(stage.num_replicas for stage in stages)
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
    for index, stage in enumerate(stages):
        stuck = [name for name in stage.layers if not problem.costs.layer_by_name[name].replicable]
        _require(
            stage.num_replicas == 1 or not stuck,
            f"stage {index} has {stage.num_replicas} replicas, but layers {stuck} cannot be replicated",
        )


def _check_variants(stages: Sequence[Stage], problem: PartitionProblem) -> None:
    """Every layer runs in one of its ways, on as many devices as share it there."""
    for index, stage in enumerate(stages):
        each = stage.num_replicas * stage.degree
        _require(
            each == len(stage.devices),
            f"stage {index} is on {len(stage.devices)} devices, but has {stage.num_replicas} replicas of "
            f"{stage.degree} each",
        )
        for place, layer in enumerate(problem.costs.layer_by_name[name] for name in stage.layers):
            chosen = stage.variants[place] if stage.variants else ""
            known = [(v.name, v.degree) for v in layer.variants] or [("", 1)]
            _require(
                (chosen, stage.degree) in known,
                f"layer {layer.name!r} on stage {index} runs as {chosen!r} on {stage.degree} devices; "
                f"its (variant, degree) may be {known}",
            )


def _check_pins(stages: Sequence[Stage], problem: PartitionProblem) -> None:
    broken = problem.pins.broken(stages)
    _require(not broken, f"a pin is not kept: {'; '.join(broken)}")


def _check_turns(stages: Sequence[Stage], problem: PartitionProblem) -> None:
    """Stages go round the devices in order, at most `chunks` times; replicated stages take a turn each."""
    turns = num_turns([stage.devices for stage in stages])
    _require(turns <= problem.chunks, f"stages go round the devices {turns} times; there are {problem.chunks} chunks")


def _check_memory(stages: Sequence[Stage], problem: PartitionProblem) -> None:
    for device, amount in device_bytes(stages, stage_terms(problem, stages)).items():
        limit = problem.cluster.devices[device].memory_bytes
        _require(limit is None or amount <= limit, f"device {device} has to hold {amount} bytes, of {limit}")


def _check_certificate(partition: Partition, problem: PartitionProblem) -> None:
    certificate, seconds = partition.certificate, objective(problem, partition.stages)
    _require(
        abs(certificate.objective - seconds) <= 1e-12 * seconds,
        f"the certificate says {certificate.objective} s, but the objective is {seconds} s",
    )
    _require(certificate.lower_bound >= 0, f"the lower bound is {certificate.lower_bound} s; it must be 0 s or more")
    _require(
        certificate.lower_bound <= certificate.objective,
        f"the lower bound {certificate.lower_bound} s is above the objective {certificate.objective} s",
    )


def _require(holds: bool, story: str) -> None:
    if not holds:
        raise AssertionError(story)
