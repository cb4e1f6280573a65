"""Clusters from a few numbers: alike devices with a level of links for each count, and bytes in another unit."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from itertools import accumulate

from pipeflow.errors import PlanError
from pipeflow.partitioners.cluster import Cluster, Device, Level


def alike_devices(
    counts: int | Sequence[int],
    *,
    memory_bytes: float | None,
    bandwidth: float | Sequence[float] | None,
    latency: float,
) -> Cluster:
    """Alike devices, with a level of links for each count, innermost first.

    Args:
        counts: of devices, or at each level.
        memory_bytes: of each device; None for no limit.
        bandwidth: of all links, or of those of each level; None for no limit.
        latency: of all links.

    Raises:
        PlanError: a count below 1, an amount that is none, or not one bandwidth for all or for each level.
    """
    counts = tuple(counts) if isinstance(counts, Sequence) else (counts,)
    each = tuple(bandwidth) if isinstance(bandwidth, Sequence) else (bandwidth,) * len(counts)
    whole = all(isinstance(count, int) and count >= 1 for count in counts)
    if len(each) != len(counts) or not counts or not whole:
        raise PlanError(
            f"num_devices={counts} and bandwidth={each}; give a number of at least 1 for each level of "
            "links, and one bandwidth for all or for each"
        )
    for one in each:
        if one is not None and not (math.isfinite(one) and one > 0):
            raise PlanError(f"bandwidth={one}; give bytes per second, a finite number above 0, or None for no limit")
    if memory_bytes is not None and not (math.isfinite(memory_bytes) and memory_bytes >= 0):
        raise PlanError(f"memory_bytes={memory_bytes}; give a finite number of at least 0, or None for no limit")
    if not (math.isfinite(latency) and latency >= 0):
        raise PlanError(f"latency={latency}; give seconds, a finite number of at least 0")
    levels: dict[int, Level] = {}
    for size, one in zip(accumulate(counts, operator.mul), each, strict=True):
        levels.setdefault(size, Level(size=size, bandwidth=one, latency=latency))
    memory = None if memory_bytes is None else math.floor(memory_bytes)
    devices = tuple(Device(name=f"device:{i}", memory_bytes=memory) for i in range(math.prod(counts)))
    return Cluster(devices=devices, levels=tuple(levels.values()))


def in_units(cluster: Cluster, unit_bytes: float) -> Cluster:
    """The cluster with its bytes counted in units of so many bytes."""
    data = cluster.model_dump()
    for device in data["devices"]:
        if device["memory_bytes"] is not None:
            device["memory_bytes"] = math.floor(device["memory_bytes"] / unit_bytes)
    for link in (*data["levels"], *data["links"]):
        if link["bandwidth"] is not None:
            link["bandwidth"] /= unit_bytes
    return Cluster.model_validate(data)


def with_bandwidth(cluster: Cluster, bandwidth: float | None) -> Cluster:
    """The cluster with all its links, of which no bandwidth is said, of one bandwidth."""
    levels = cluster.levels or (Level(size=cluster.num_devices),)
    changed = {"bandwidth": bandwidth}
    return cluster.model_copy(
        update={
            "levels": tuple(level.model_copy(update=changed) for level in levels),
            "links": tuple(link.model_copy(update=changed) for link in cluster.links),
        }
    )
