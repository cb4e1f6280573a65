"""Which devices the stages of a cut get, where devices or links differ: heavy edges on fast links.

The cut stays, and how many replicas each stage has; devices are exchanged between stages and with those
that are not used. Few assignments are all tried; of many, those next to the best, beginning with
whatever touches the busiest stage. The result is never worse than what came in.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations

from pipeflow.graphs.costs import GraphCosts, LayerCosts
from pipeflow.partitioners.explain import bottleneck_of
from pipeflow.partitioners.feasibility import memory_limits, shortfall
from pipeflow.partitioners.objective import device_seconds, objective, stage_terms
from pipeflow.partitioners.partition import Stage
from pipeflow.partitioners.pins import Pins
from pipeflow.partitioners.problem import PartitionProblem

MOST_TRIED = 800
"""As many assignments are all tried."""

_MOST_PRICED = 2500
"""Assignments that are priced in one descent: seconds for 64 stages."""

_BETTER = 1 - 1e-12

Assignment = tuple[tuple[int, ...], ...]
"""The devices of each stage."""


def place(problem: PartitionProblem, stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """The stages on devices that suit them best, as far as is found; exact up to 800 assignments.

    Args:
        stages: a valid partition of the problem.

    Returns:
        The stages themselves where devices and links are all alike, where devices hold several
        stages, where levels are nested, and where nothing better is found.
    """
    stages = tuple(stages)
    if problem.cluster.is_uniform or problem.chunks > 1 or problem.nested:
        return stages
    search = _Placement(problem, stages)
    start: Assignment = tuple(tuple(sorted(stage.devices)) for stage in stages)
    found = search.best_of_all() if search.num_assignments <= MOST_TRIED else search.descend(start)
    placed = search.stages_on(found) if found is not None else stages
    is_better = objective(problem, placed) < objective(problem, stages) * _BETTER
    return placed if is_better and not shortfall(problem, placed) else stages


class _Placement:
    """The stages as one layer for each kind that they hold, which the objective prices in no time.

    Where layers share parameters or are bound by no order, they stay as they are.
    """

    def __init__(self, problem: PartitionProblem, stages: tuple[Stage, ...]) -> None:
        self._stages, self._problem = stages, problem
        self._groups = [[problem.costs.layer_by_name[name] for name in stage.layers] for stage in stages]
        self._is_contracted = not problem.unordered and problem.costs.sharing != "copies"
        if self._is_contracted:
            self._groups = _contracted(problem, stages)
            layers = tuple(layer for group in self._groups for layer in group)
            graph = GraphCosts(inputs=problem.costs.inputs, layers=layers)
            self._problem = replace(problem, costs=graph, together=(), pins=Pins())
        terms, limits = stage_terms(problem, stages), memory_limits(problem)
        devices = range(problem.cluster.num_devices)
        self._allowed = [[d for d in devices if term.total_bytes <= limits[d]] for term in terms]
        self._wanted = [{p.device for p in problem.pins.on if p.layer in s.layers} - {None} for s in stages]

    @property
    def num_assignments(self) -> int:
        left, count = self._problem.cluster.num_devices, 1
        for stage in self._stages:
            count *= math.comb(left, stage.num_replicas)
            left -= stage.num_replicas
        return count

    def stages_on(self, devices: Assignment) -> tuple[Stage, ...]:
        """The stages of the whole graph on these devices."""
        return tuple(
            Stage.replicated(stage.layers, on).with_recompute(stage.recompute)
            for stage, on in zip(self._stages, devices, strict=True)
        )

    def best_of_all(self) -> Assignment | None:
        """The best of every assignment that memory and pins allow; the first of several."""
        best, least = None, math.inf
        for devices in self._every(0, frozenset()):
            seconds = objective(self._problem, self._contract(devices))
            if seconds < least * _BETTER:
                best, least = devices, seconds
        return best

    def _every(self, index: int, taken: frozenset[int]) -> Iterator[Assignment]:
        if index == len(self._stages):
            yield ()
            return
        free = [d for d in self._allowed[index] if d not in taken]
        for devices in combinations(free, self._stages[index].num_replicas):
            if self._wanted[index] <= set(devices):
                for rest in self._every(index + 1, taken | set(devices)):
                    yield (devices, *rest)

    def descend(self, start: Assignment) -> Assignment:
        """Exchanges two devices at a time, whenever that lowers the busiest device, until nothing does."""
        devices, least, priced = start, self._seconds(start), 0
        found = True
        while found:
            found = False
            for candidate in self._exchanges(devices):
                if priced == _MOST_PRICED:
                    return devices
                priced += 1
                seconds = self._seconds(candidate)
                if seconds < least:
                    devices, least, found = candidate, seconds, True
                    break
        return devices

    def _seconds(self, devices: Assignment) -> tuple[float, float]:
        """The objective, and then all devices' seconds: ties of the busiest leave something to gain."""
        stages = self._contract(devices)
        by_device = device_seconds(stages, stage_terms(self._problem, stages))
        return float(f"{max(by_device.values()):.12g}"), float(f"{math.fsum(by_device.values()):.12g}")

    def _exchanges(self, devices: Assignment) -> Iterator[Assignment]:
        """Assignments in which a device of the busiest stage, or of one that it talks to, is another."""
        stages = self._contract(devices)
        busiest = bottleneck_of(stages, stage_terms(self._problem, stages))
        place_of = {d: index for index, group in enumerate(devices) for d in group}
        for index in sorted({busiest, *self._talks_to(busiest)}):
            for mine in devices[index]:
                for other in range(self._problem.cluster.num_devices):
                    if place_of.get(other) != index:
                        swap = {mine: other, other: mine}
                        candidate = tuple(tuple(sorted(swap.get(d, d) for d in group)) for group in devices)
                        if self._is_allowed(candidate):
                            yield candidate

    def _is_allowed(self, devices: Assignment) -> bool:
        return all(
            wanted <= set(group) <= set(allowed)
            for group, wanted, allowed in zip(devices, self._wanted, self._allowed, strict=True)
        )

    def _talks_to(self, index: int) -> set[int]:
        place_of = {layer.name: i for i, group in enumerate(self._groups) for layer in group}
        ends = [(place_of[a], place_of[b]) for a, b in self._problem.costs.graph.edges]
        return {b if a == index else a for a, b in ends if index in (a, b)}

    def _contract(self, devices: Assignment) -> tuple[Stage, ...]:
        if not self._is_contracted:
            return self.stages_on(devices)
        return tuple(
            Stage.replicated([layer.name for layer in group], on)
            for group, on in zip(self._groups, devices, strict=True)
        )


def _contracted(problem: PartitionProblem, stages: Sequence[Stage]) -> list[list[LayerCosts]]:
    """For each stage a layer for each kind of its layers, with their seconds and what leaves the stage."""
    costs = problem.costs
    stage_of = {name: index for index, stage in enumerate(stages) for name in stage.layers}

    def leaves(tensor: str, index: int) -> bool:
        return any(stage_of[reader] != index for reader in costs.consumers_by_tensor[tensor])

    result = []
    for index, stage in enumerate(stages):
        kinds: dict[tuple[str, bool], list[LayerCosts]] = {}
        for name in stage.layers:
            layer = costs.layer_by_name[name]
            # Readers that backward passes through send gradients, and others do not.
            kinds.setdefault((layer.kind, layer.has_backward), []).append(layer)
        group = []
        for (kind, has_backward), layers in kinds.items():
            again = [layer.forward_seconds for layer in layers if layer.name in stage.recompute]
            incoming = [
                t
                for layer in layers
                for t in layer.inputs
                if t in costs.producer_by_tensor and stage_of[costs.producer_by_tensor[t]] != index
            ]
            outgoing = [t for layer in layers for t in layer.outputs if leaves(t.name, index)]
            group.append(
                LayerCosts(
                    name=f"{index}/{kind}/{has_backward}",
                    kind=kind,
                    inputs=tuple(dict.fromkeys(incoming)),
                    outputs=tuple(outgoing),
                    forward_seconds=math.fsum([layer.seconds for layer in layers] + again),
                    parameter_bytes=sum(layer.parameter_bytes for layer in layers),
                    has_backward=has_backward,
                )
            )
        result.append(group)
    return result
