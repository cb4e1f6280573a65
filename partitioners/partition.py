"""Where each layer goes: stages, their devices, and the certificate of how good that is."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import Self

from pydantic import Field, model_validator

from pipeflow.errors import PlanError
from pipeflow.values import Count, Index, Seconds, Value


class Mesh(Value):
    """The devices of one stage, as an array with named axes.

    Attributes:
        devices: ranks, in row-major order over the axes, each once.
        axes: (name, size) of each axis; ("replica", R) cuts the batch by sample.
    """

    devices: tuple[Index, ...]
    axes: tuple[tuple[str, Count], ...]

    @model_validator(mode="after")
    def _check(self) -> Self:
        size = math.prod(n for _, n in self.axes)
        if not self.devices or size != len(self.devices):
            raise PlanError(f"a mesh of axes {dict(self.axes)} has {size} places, not {len(self.devices)} devices")
        if len(set(self.devices)) != len(self.devices):
            raise PlanError(f"mesh devices {self.devices} repeat; replicas of one stage need devices of their own")
        return self


class Stage(Value):
    """A set of layers that run together, and where.

    Attributes:
        layers: names, in the graph's order.
        mesh: its devices.
        recompute: those of the layers that keep nothing for backward and are computed again for it,
            in the order of `layers`. What that saves and costs is in `pipeflow.partitioners.activations`.
        variants: the way in which each of the layers runs, in their order, "" for those that have
            only one; empty if all have. They are of the degree of the mesh's axis "tensor".

    Raises:
        PlanError: a recomputed layer is not among the layers, stands twice or out of their order; or
            there are not as many variants as layers, or variants and recomputed layers.
    """

    layers: tuple[str, ...] = Field(min_length=1)
    mesh: Mesh
    recompute: tuple[str, ...] = ()
    variants: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.variants and (len(self.variants) != len(self.layers) or self.recompute):
            raise PlanError(
                f"{len(self.variants)} variants for {len(self.layers)} layers, recompute={self.recompute}; name one "
                "for each layer, those that recompute among them"
            )
        if not self.recompute:
            return self
        chosen = set(self.recompute)
        if foreign := sorted(chosen.difference(self.layers)):
            raise PlanError(
                f"recompute names {foreign[0]!r}, which is not a layer of the stage ({', '.join(self.layers)}); "
                "name layers of the stage"
            )
        if self.recompute != tuple(name for name in self.layers if name in chosen):
            raise PlanError(f"recompute={self.recompute}; name each layer once, in the order of the stage's layers")
        return self

    @classmethod
    def replicated(
        cls,
        layers: tuple[str, ...] | list[str],
        devices: tuple[int, ...] | list[int],
        *,
        recompute: Collection[str] = (),
    ) -> Stage:
        """A stage with one data-parallel replica on each of `devices`.

        Args:
            recompute: which of the layers to compute again for backward, in any order.
        """
        mesh = Mesh(devices=tuple(devices), axes=(("replica", len(devices)),))
        return cls(layers=tuple(layers), mesh=mesh).with_recompute(recompute)

    @classmethod
    def sharded(cls, layers: Sequence[str], devices: Sequence[int], *, degree: int, variants: Sequence[str]) -> Stage:
        """A stage whose replicas are each on `degree` consecutive ones of `devices`, its layers run in these ways."""
        axes = (("replica", len(devices) // degree), ("tensor", degree))
        return cls(
            layers=tuple(layers),
            mesh=Mesh(devices=tuple(devices), axes=axes if degree > 1 else axes[:1]),
            variants=tuple(variants),
        )

    def with_recompute(self, layers: Collection[str]) -> Stage:
        """The same stage with these of its layers recomputed, in any order, and no others."""
        chosen = set(layers)
        known = tuple(name for name in self.layers if name in chosen)
        return Stage(layers=self.layers, mesh=self.mesh, recompute=(*known, *sorted(chosen.difference(known))))

    @property
    def devices(self) -> tuple[int, ...]:
        """The device of each replica."""
        return self.mesh.devices

    @property
    def num_replicas(self) -> int:
        return dict(self.mesh.axes).get("replica", 1)

    @property
    def degree(self) -> int:
        """How many devices share a replica's layers."""
        return dict(self.mesh.axes).get("tensor", 1)


def num_turns(places: Sequence[Sequence[int]]) -> int:
    """How often stages on these devices, one after the other, go round all devices in order."""
    return 1 + sum(min(devices) <= max(before) for before, devices in pairwise(places))


class Certificate(Value):
    """How good a partition is, and what no partition of the problem can beat.

    Attributes:
        partitioner: its name.
        objective: of the partition, in seconds, as `pipeflow.partitioners.objective` computes it.
        lower_bound: proven: no feasible partition of the problem has a smaller objective.
    """

    partitioner: str
    objective: Seconds
    lower_bound: Seconds

    @property
    def gap(self) -> float:
        """How far above the bound the objective is at most, relative to the objective."""
        return 0.0 if self.objective == 0 else max(0.0, 1.0 - self.lower_bound / self.objective)


class Partition(Value):
    """Stages in an order in which data only flows forward, with their certificate."""

    stages: tuple[Stage, ...] = Field(min_length=1)
    certificate: Certificate

    @property
    def num_devices(self) -> int:
        """Devices in use."""
        return len({d for stage in self.stages for d in stage.devices})
