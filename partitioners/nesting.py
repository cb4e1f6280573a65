"""Levels of links planned one inside the other, as PipeDream's optimizer plans them.

A level of n groups runs a chain of stages; a stage is on r of the groups, all alike, and inside each
of them it is a chain of stages of the next level, down to single devices. So a stage of the innermost
level is on q devices of each of r groups: a stage with q * r replicas to whoever runs it. Of a stage
of any level on r of its groups, per micro-batch of the batch (Narayanan et al., SOSP 2019, section 3.1,
with the constants of its optimizer):

    seconds = (the longest stage inside + reduction of all its parameters among r over this level's links) / r

and with transfers "relayed", but for the first stage of its chain, at least what passes the cut
before it, or after it, over this level's links, / r. The first stage's reduction is divided by the
number of groups inside, which share it.

Nothing here searches: `pipeflow.partitioners.nested` does.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipeflow.errors import PlanError
from pipeflow.partitioners.cluster import Cluster
from pipeflow.partitioners.partition import Stage


@dataclass(frozen=True, slots=True)
class NestedLevel:
    """A level of a cluster whose groups are alike.

    Attributes:
        group_size: devices of one of its groups.
        num_groups: groups of this level in one group of the next; of the outermost, in all.
        num_inside: groups of the level inside in one of its groups; 1 for single devices.
        bandwidth: bytes per second of its links.
        latency: seconds.
    """

    group_size: int
    num_groups: int
    num_inside: int
    bandwidth: float
    latency: float


def nested_levels(cluster: Cluster) -> tuple[NestedLevel, ...]:
    """The levels, innermost first.

    Raises:
        PlanError: devices differ, pairs have links of their own, or groups are not all full.
    """
    first = cluster.devices[0]
    if any(d.model_copy(update={"name": first.name}) != first for d in cluster.devices) or cluster.links:
        raise PlanError("levels are nested, but devices differ or pairs have links of their own; describe alike ones")
    if not cluster.levels or cluster.levels[-1].size != cluster.num_devices:
        raise PlanError(f"levels are nested, but do not hold {cluster.num_devices} devices in full groups; fill them")
    if any(device.memory_bytes is not None for device in cluster.devices):
        raise PlanError("levels are nested, where memory is not counted; leave the memory of devices open")
    sizes = [1, *(level.size for level in cluster.levels)]
    counts = [outer // inner for inner, outer in itertools.pairwise(sizes)]
    return tuple(
        NestedLevel(size, count, inside, level.bandwidth or math.inf, level.latency)
        for size, count, inside, level in zip(sizes, counts, [1, *counts], cluster.levels, strict=False)
    )


@dataclass(frozen=True, slots=True)
class Child:
    """A stage of some level within one group of the next: on which of the groups, and what is inside."""

    groups: tuple[int, ...]
    stages: tuple[int, ...]


def children(level: NestedLevel, stages: Sequence[Stage], among: Sequence[int], first_device: int) -> list[Child]:
    """The stages of a level in the group that begins with a device.

    Args:
        among: indices of the stages that are in the group, in order.

    Raises:
        PlanError: stages are not nested.
    """
    last = first_device + level.group_size * level.num_groups

    def groups(index: int) -> tuple[int, ...]:
        return tuple(sorted({d // level.group_size for d in stages[index].devices if first_device <= d < last}))

    result = [Child(on, tuple(members)) for on, members in itertools.groupby(among, key=groups)]
    used = [group for child in result for group in child.groups]
    if len(used) != len(set(used)):
        raise PlanError(f"stages {list(among)} are not nested: a group of devices is in two stages of one level")
    for index in among:
        offsets = {
            tuple(d - group * level.group_size for d in sorted(stages[index].devices) if d // level.group_size == group)
            for group in groups(index)
        }
        if len(offsets) != 1:
            raise PlanError(f"stage {index} on devices {stages[index].devices} is not nested: its groups are not alike")
    return result
