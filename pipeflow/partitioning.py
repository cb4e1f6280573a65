"""The partitioner by itself: anyone's costs in, stages and a certificate out.

Turns a profile (or costs) and a few limits into a `PartitionProblem`, runs one partitioner, and
says the result in the units of the file. It neither plans a schedule nor runs anything.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, TypeAlias, assert_never

from pipeflow.errors import FormatError, Infeasible, PlanError
from pipeflow.graphs.costs import GraphCosts
from pipeflow.graphs.formats import FORMATS
from pipeflow.graphs.formats.profile import Profile
from pipeflow.graphs.sharing import share
from pipeflow.partitioners import PARTITIONERS
from pipeflow.partitioners.cluster import Cluster
from pipeflow.partitioners.infeasible import explained
from pipeflow.partitioners.levels import alike_devices, in_units, with_bandwidth
from pipeflow.partitioners.partition import Partition
from pipeflow.partitioners.pins import Pins
from pipeflow.partitioners.problem import PartitionProblem, Transfers, holds_nothing, of_an_endless_batch, stashed
from pipeflow.partitioners.virtual_stages import require_room, with_contiguous
from pipeflow.values import Count, Index, Value

Partitioner: TypeAlias = Callable[[PartitionProblem], Partition]


class PartitionReport(Value):
    """A partition in the units of the file that it was made from.

    Attributes:
        objective: of the bottleneck per micro-batch, in the file's unit of time.
        lower_bound: proven, in the same unit.
        gap: 1 - lower_bound / objective.
        seconds: that the search took.
        partitioner: what found it.
        stages: the layers of each stage, in order.
        replicas: of each stage.
        devices: of each stage; those of the innermost level of links are consecutive. With several chunks
            a device stands at several stages.
        degrees: how many devices share each of a stage's replicas (tensor parallelism).
        variants: of each stage, the way in which each of its layers runs; empty where there is only one.
        chunks: how many stages a device may hold (virtual stages).
        contiguous_objective: of the same problem with one stage on a device, as the same partitioner cuts
            it; None where it has no such partition.
        gain_over_contiguous: 1 - objective / contiguous_objective: what several chunks gain; never below 0.
    """

    objective: float
    lower_bound: float
    gap: float
    seconds: float
    partitioner: str
    stages: tuple[tuple[str, ...], ...]
    replicas: tuple[Count, ...]
    devices: tuple[tuple[Index, ...], ...]
    degrees: tuple[Count, ...]
    variants: tuple[tuple[str, ...], ...]
    chunks: Count
    contiguous_objective: float | None
    gain_over_contiguous: float | None


def partition(
    source: GraphCosts | Profile | str | os.PathLike[str],
    *,
    format: str = "pipeflow",
    num_devices: int | Sequence[int] | None = None,
    cluster: Cluster | None = None,
    memory_bytes: int | None = None,
    bandwidth: float | Sequence[float] | None = None,
    latency: float = 0.0,
    partitioner: str | Partitioner = "auto",
    num_stages: int | None = None,
    max_stages: int | None = None,
    replicas: tuple[int, ...] | None = None,
    max_replicas: int | None = None,
    num_microbatches: int | None = None,
    chunks: int = 1,
    pins: Pins | None = None,
    transfers: Transfers | None = None,
    shared: Literal["together", "copies"] = "together",
) -> PartitionReport:
    """Cuts a graph into stages for a pipeline, with a proof of how good the cut is.

    Args:
        source: costs, a profile, or the path of a file.
        format: of the file: a name in `pipeflow.graphs.formats.FORMATS`.
        num_devices: alike devices; by default as many as the file says. Several numbers are of levels
            of links, innermost first: (4, 2) is 2 machines of 4 devices.
        cluster: the devices themselves, instead of `num_devices`, `memory_bytes`, `bandwidth` and
            `latency`.
        memory_bytes: of one device; by default the file's limit.
        bandwidth: of every link in bytes per second, or of the links of each level; by default the
            file's, or else unlimited. Refused for a file that gives times of transfers.
        latency: of every link in seconds.
        partitioner: a name in `PARTITIONERS`, or a function.
        num_stages, max_stages, replicas, max_replicas, num_microbatches: as in
            `PartitionProblem`; formats without gradients to reduce allow one replica.
        chunks: how many stages a device may hold: with more than 1, stages go round the devices so often,
            as interleaved schedules place them. The partitioner finds contiguous stages, and virtual
            ones of one replica each are looked for from there; the report says what they gain.
        pins: layers that must be somewhere, together or apart.
        transfers: how they count beside compute, as in `PartitionProblem`; by default as the format's
            own planner counts them.
        shared: as in `pipeflow.plan`.

    Raises:
        FormatError: the file is not what its format promises, or the format is unknown.
        PlanError: arguments contradict each other.
        Infeasible: no partition satisfies the limits.
    """
    profile = read_profile(source, format)
    profile = profile.model_copy(update={"costs": share(profile.costs, shared)})
    problem = problem_of(
        profile,
        num_devices=num_devices,
        cluster=cluster,
        memory_bytes=memory_bytes,
        bandwidth=bandwidth,
        latency=latency,
        num_microbatches=num_microbatches,
    )
    problem = replace(
        problem,
        num_stages=num_stages,
        max_stages=max_stages,
        replicas=replicas,
        pins=pins or Pins(),
        max_replicas=1 if profile.memory == "sizes" else max_replicas,
        transfers=problem.transfers if transfers is None else transfers,
    )
    begin = time.perf_counter()
    contiguous, found = _solve(replace(problem, chunks=chunks), _function(partitioner))
    seconds = time.perf_counter() - begin
    unit, certificate = profile.seconds_per_unit, found.certificate
    before = None if contiguous is None else contiguous.certificate.objective
    return PartitionReport(
        objective=certificate.objective / unit,
        lower_bound=certificate.lower_bound / unit,
        gap=certificate.gap,
        seconds=seconds,
        partitioner=certificate.partitioner,
        stages=tuple(stage.layers for stage in found.stages),
        replicas=tuple(stage.num_replicas for stage in found.stages),
        devices=tuple(stage.devices for stage in found.stages),
        degrees=tuple(stage.degree for stage in found.stages),
        variants=tuple(stage.variants for stage in found.stages),
        chunks=chunks,
        contiguous_objective=None if before is None else before / unit,
        gain_over_contiguous=None if before is None else 1 - certificate.objective / before if before else 0.0,
    )


def _function(partitioner: str | Partitioner) -> Partitioner:
    if not isinstance(partitioner, str):
        return partitioner
    if partitioner not in PARTITIONERS:
        raise PlanError(f"{partitioner!r} is no partitioner; known are {', '.join(PARTITIONERS)}")
    return PARTITIONERS[partitioner]


def _solve(problem: PartitionProblem, partitioner: Partitioner) -> tuple[Partition | None, Partition]:
    """The contiguous partition, where there is one, and the partition with the problem's chunks."""
    from pipeflow.partitioners.auto import has_solver

    def contiguous(one: PartitionProblem) -> Partition:
        found = partitioner(one)
        if not isinstance(found, Partition):
            raise PlanError(
                f"the partitioner gave a {type(found).__name__}; it must return a Partition, or raise Infeasible "
                "where there is none"
            )
        return found

    require_room(problem)
    try:
        return with_contiguous(problem, contiguous, use_solver=has_solver())
    except Infeasible as error:
        raise explained(problem, error) from None


def read_profile(source: GraphCosts | Profile | str | os.PathLike[str], format: str = "pipeflow") -> Profile:
    """The profile in a file, or made of costs.

    Raises:
        FormatError: the file is missing or not what its format promises, or the format is unknown.
    """
    if isinstance(source, Profile):
        return source
    if isinstance(source, GraphCosts):
        return Profile(format="pipeflow", costs=source)
    if format not in FORMATS:
        raise FormatError(f"{format!r} is no format; known are {', '.join(FORMATS)}")
    path = Path(source)
    if not path.is_file():
        raise FormatError(f"{path} is not a file; give the path of a {format} file")
    return FORMATS[format](path)


def problem_of(
    profile: Profile,
    *,
    num_devices: int | Sequence[int] | None = None,
    cluster: Cluster | None = None,
    memory_bytes: int | None = None,
    bandwidth: float | Sequence[float] | None = None,
    latency: float = 0.0,
    num_microbatches: int | None = None,
) -> PartitionProblem:
    """The partition problem that a profile poses, with what the caller fixes instead.

    Raises:
        PlanError: neither the caller nor the file says how many devices there are.
        Infeasible: a layer runs on none of them.
    """
    if profile.unsupported:
        names = ", ".join(profile.unsupported[:4])
        raise Infeasible([f"layers {names} run on no accelerator; the file says so, and there are no other devices"])
    cluster = _cluster_of(profile, num_devices, cluster, memory_bytes, bandwidth, latency)
    count = profile.num_microbatches if num_microbatches is None else num_microbatches
    if count is None and profile.reduce_every == "microbatch":
        # A stream without end: any number of replicas gets equal shares.
        count = math.lcm(*range(1, cluster.num_devices + 1))
    problem = PartitionProblem(
        costs=profile.costs,
        cluster=cluster,
        num_microbatches=1 if count is None else count,
        unordered=frozenset(profile.unordered),
        fan_out="tensor" if profile.sends_once else "stage",
        transfers=profile.transfers,
        reduction=profile.reduction,
        reduce_every=profile.reduce_every,
        even_replicas=profile.even_replicas,
        nested=profile.nested and len(cluster.levels) > 1,
        gradient_ratio=min(1.0, profile.state_ratio),
        optimizer_ratio=max(0.0, profile.state_ratio - 1),
        unit_bytes=profile.unit_bytes,
    )
    match profile.memory:
        case "training":
            return problem
        case "sizes":
            return replace(
                problem,
                in_flight=holds_nothing,
                gradient_ratio=0.0,
                optimizer_ratio=0.0,
                holds_received=False,
                max_replicas=1,
            )
        case "stashes":
            return replace(
                problem,
                in_flight=stashed,
                weight_versions=stashed,
                gradient_ratio=0.0,
                optimizer_ratio=0.0,
                holds_received=False,
            )
        case "variants":
            return replace(problem, in_flight=of_an_endless_batch, holds_received=False)
        case _:
            assert_never(profile.memory)


def _cluster_of(
    profile: Profile,
    num_devices: int | Sequence[int] | None,
    cluster: Cluster | None,
    memory_bytes: int | None,
    bandwidth: float | Sequence[float] | None,
    latency: float,
) -> Cluster:
    """The devices, with bytes counted as the costs count them."""
    if cluster is not None:
        if num_devices is not None or memory_bytes is not None or bandwidth is not None:
            raise PlanError("a cluster and num_devices, memory_bytes or bandwidth; give the one or the others")
        given = [b for b in (*(v.bandwidth for v in cluster.levels), *(k.bandwidth for k in cluster.links)) if b]
        cluster = in_units(cluster, profile.unit_bytes)
        if not profile.times_transfers:
            return cluster
        _refuse_bandwidths(given)
        return with_bandwidth(cluster, profile.bandwidth)
    count = profile.num_devices if num_devices is None else num_devices
    if count is None:
        raise PlanError("the number of devices is not known; give num_devices or a cluster")
    if profile.times_transfers:
        _refuse_bandwidths([] if bandwidth is None else [bandwidth])
    alike = in_units(
        alike_devices(count, memory_bytes=memory_bytes, bandwidth=bandwidth, latency=latency), profile.unit_bytes
    )
    if memory_bytes is None:
        changed = {"memory_bytes": profile.memory_bytes}
        alike = alike.model_copy(update={"devices": tuple(d.model_copy(update=changed) for d in alike.devices)})
    return alike if bandwidth is not None else with_bandwidth(alike, profile.bandwidth)


def _refuse_bandwidths(given: Sequence[object]) -> None:
    if given:
        raise PlanError(
            f"bandwidth={given[0]}, but the file says how long its transfers take, whatever the links are; leave it out"
        )
