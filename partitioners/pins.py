"""What a person fixes about a cut, whatever it costs: pins.

A value that says which layers go where, together or apart; no search and no cost. Every
partitioner honours all of it or refuses by name, and `broken` is the one place that says whether
a partition keeps it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Self

from pydantic import model_validator

from pipeflow.errors import PlanError
from pipeflow.graphs.costs import GraphCosts
from pipeflow.partitioners.partition import Stage
from pipeflow.values import Count, Index, Value


class Pin(Value):
    """One layer, and where it must be.

    Attributes:
        layer: its name.
        stage: index of its stage, from 0; below 0 it counts from the end, -1 is the last.
        device: a device that its stage must be on; a replicated stage may be on others as well.
    """

    layer: str
    stage: int | None = None
    device: Index | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.stage is None) == (self.device is None):
            raise PlanError(f"pin of {self.layer!r}: give a stage or a device; for both, give two pins")
        return self

    def __str__(self) -> str:
        where = f"device {self.device}" if self.stage is None else f"stage {self.stage}"
        return f"layer {self.layer!r} is pinned to {where}"


class Pins(Value):
    """Which layers must be where, and which with which.

    Attributes:
        on: layers on a stage or on a device.
        together: groups of layers that share a stage.
        apart: groups of layers no two of which share a stage.
        no_cut: edges (producer, reader) of the graph that may not lead from one stage to another.
        max_layers: at most so many layers on any stage.

    Raises:
        PlanError: a group of less than two layers, or with one of them twice.
    """

    on: tuple[Pin, ...] = ()
    together: tuple[tuple[str, ...], ...] = ()
    apart: tuple[tuple[str, ...], ...] = ()
    no_cut: tuple[tuple[str, str], ...] = ()
    max_layers: Count | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        for what, groups in (("together", self.together), ("apart", self.apart)):
            for group in groups:
                if len(set(group)) != len(group) or len(group) < 2:
                    raise PlanError(f"{what}={group}; a group needs at least two layers, each once")
        return self

    def __bool__(self) -> bool:
        return self != _NOTHING

    def names(self) -> Iterator[str]:
        """Every layer that is named, perhaps more than once."""
        yield from (pin.layer for pin in self.on)
        yield from (name for group in (*self.together, *self.apart, *self.no_cut) for name in group)

    def groups(self) -> tuple[tuple[str, ...], ...]:
        """The groups that share a stage: as said, by edges that are not cut, and by like pins.

        A device holds one stage where there are device pins, so layers on one device are together.
        """
        by_place: dict[tuple[str, int], dict[str, None]] = {}
        for pin in self.on:
            key = ("device", pin.device) if pin.device is not None else ("stage", pin.stage or 0)
            by_place.setdefault(key, {})[pin.layer] = None
        return (*self.together, *self.no_cut, *(tuple(names) for names in by_place.values() if len(names) > 1))

    def check(self, costs: GraphCosts, num_devices: int) -> None:
        """Raises `PlanError` where a layer, an edge or a device that is named does not exist."""
        if unknown := [name for name in self.names() if name not in costs.layer_by_name]:
            raise PlanError(f"pins name {unknown[0]!r}, which is not a layer of {costs.name!r}; give a layer's name")
        for a, b in self.no_cut:
            if not costs.graph.has_edge(a, b):
                raise PlanError(f"no_cut names {a!r} and {b!r}, but {b!r} reads nothing of {a!r}; give an edge")
        for pin in self.on:
            if pin.device is not None and pin.device >= num_devices:
                raise PlanError(f"{pin}, but the cluster has {num_devices} devices; they count from 0")

    def broken(self, stages: Sequence[Stage]) -> tuple[str, ...]:
        """Each pin that the stages do not keep, in words."""
        stage_of = {name: index for index, stage in enumerate(stages) for name in stage.layers}
        return (
            *(story for pin in self.on if (story := _broken_pin(pin, stages, stage_of[pin.layer]))),
            *(
                f"layers {group} are to be together, but are on stages {tuple(stage_of[n] for n in group)}"
                for group in self.together
                if len({stage_of[name] for name in group}) > 1
            ),
            *(
                f"layers {a!r} and {b!r} are to be apart, but are both on stage {stage_of[a]}"
                for group in self.apart
                for a, b in combinations(group, 2)
                if stage_of[a] == stage_of[b]
            ),
            *(
                f"the edge from {a!r} to {b!r} is not to be cut, but leads from stage {stage_of[a]} to {stage_of[b]}"
                for a, b in self.no_cut
                if stage_of[a] != stage_of[b]
            ),
            *(
                f"stage {index} has {len(stage.layers)} layers, more than max_layers={self.max_layers}"
                for index, stage in enumerate(stages)
                if self.max_layers is not None and len(stage.layers) > self.max_layers
            ),
        )


_NOTHING = Pins()


def _broken_pin(pin: Pin, stages: Sequence[Stage], index: int) -> str | None:
    if pin.stage is not None:
        return None if pin.stage in (index, index - len(stages)) else f"{pin}, but is on stage {index} of {len(stages)}"
    devices = stages[index].devices
    return None if pin.device in devices else f"{pin}, but its stage is on devices {devices}"
