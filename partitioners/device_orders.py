"""Cuts with the devices in other orders than the cluster's, where devices or links differ.

Linear cuts give the first stage the first devices, so the order of the devices decides which stage
gets which. Here some orders are tried: by speed, both ways, turned round, and drawn; each cut is
placed (`pipeflow.partitioners.placement`) and cut once more in the order in which it was placed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from random import Random

from pipeflow.partitioners.cluster import Cluster, Link
from pipeflow.partitioners.objective import objective
from pipeflow.partitioners.partition import Stage
from pipeflow.partitioners.pins import Pins
from pipeflow.partitioners.placement import place
from pipeflow.partitioners.problem import PartitionProblem

_WORK = 4000
"""Atoms times devices, summed over the orders that are tried: seconds."""

_MOST_ORDERS = 6
_BETTER = 1 - 1e-12

CutInOrder = Callable[[PartitionProblem], Sequence[Stage] | None]
"""Cuts a problem with its devices in order; None if nothing fits."""


def best_of_device_orders(
    problem: PartitionProblem, stages: Sequence[Stage] | None, cut: CutInOrder
) -> tuple[Stage, ...] | None:
    """The best cut over some orders of the devices, no worse than `stages`; None if none is feasible.

    Args:
        stages: a valid partition to begin with, if one is known. It is placed too.
        cut: tried with each order; the same problem has to give the same cut.
    """
    if problem.cluster.is_uniform or problem.chunks > 1 or problem.nested:
        return None if stages is None else tuple(stages)
    best = None if stages is None else _cut_again(problem, place(problem, stages), cut)
    for order in _orders(problem):
        found = _cut_in(problem, order, cut)
        if found is not None:
            found = _cut_again(problem, found, cut)
            if best is None or objective(problem, found) < objective(problem, best) * _BETTER:
                best = found
    return best


def _orders(problem: PartitionProblem) -> Iterator[list[int]]:
    """Orders of the devices, as many as are worth their time."""
    count, devices, draw = problem.cluster.num_devices, problem.cluster.devices, Random(0)
    most = min(_MOST_ORDERS, _WORK // (problem.atoms.count * count))
    for number in range(most):
        match number:
            case 0:
                yield sorted(range(count), key=lambda d: -devices[d].speed)
            case 1:
                yield sorted(range(count), key=lambda d: devices[d].speed)
            case 2:
                yield list(reversed(range(count)))
            case _:
                yield draw.sample(range(count), count)


def _cut_again(problem: PartitionProblem, stages: tuple[Stage, ...], cut: CutInOrder) -> tuple[Stage, ...]:
    """Cut with the devices in the order that the stages have them in, if that helps and takes seconds."""
    if problem.atoms.count * problem.cluster.num_devices > _WORK:
        return stages
    used = [device for stage in stages for device in stage.devices]
    found = _cut_in(problem, [*used, *sorted(set(range(problem.cluster.num_devices)) - set(used))], cut)
    is_better = found is not None and objective(problem, found) < objective(problem, stages) * _BETTER
    return found if found is not None and is_better else stages


def _cut_in(problem: PartitionProblem, order: Sequence[int], cut: CutInOrder) -> tuple[Stage, ...] | None:
    found = cut(reordered(problem, order))
    if found is None:
        return None
    stages = [
        Stage.replicated(s.layers, tuple(sorted(order[d] for d in s.devices))).with_recompute(s.recompute)
        for s in found
    ]
    return place(problem, stages)


def reordered(problem: PartitionProblem, devices: Sequence[int]) -> PartitionProblem:
    """The same problem with the devices numbered in another order.

    Args:
        devices: all of them, each once; device k of the result is `devices[k]`.
    """
    cluster, place_of = problem.cluster, {device: place for place, device in enumerate(devices)}
    links: list[Link] = []
    if not cluster.has_equal_links:
        for a, b in combinations(range(len(devices)), 2):
            bandwidth, latency = cluster.link(devices[a], devices[b])
            links.append(Link(a=a, b=b, bandwidth=None if bandwidth == math.inf else bandwidth, latency=latency))
    pins = problem.pins.model_dump()
    for pin in pins["on"]:
        pin["device"] = None if pin["device"] is None else place_of[pin["device"]]
    return replace(
        problem,
        cluster=Cluster(
            devices=tuple(cluster.devices[d] for d in devices), levels=cluster.levels[-1:], links=tuple(links)
        ),
        pins=Pins.model_validate(pins),
    )
