"""The plan: everything that a run needs except the weights.

A `Plan` is a value. It says what is where and in which order of work; it does not search
(that is the planner), prove (the verifier) or run (the engine).
"""

from __future__ import annotations

import os
from functools import cached_property
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from pipeflow.errors import PlanError
from pipeflow.graphs.costs import GraphCosts
from pipeflow.partitioners.cluster import Cluster
from pipeflow.partitioners.offload import check_offload
from pipeflow.partitioners.partition import Certificate, Stage
from pipeflow.partitioners.pins import Pins
from pipeflow.schedules import check_schedule_of_file
from pipeflow.values import Count, Value, read_value, write_text

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pipeflow.partitioners.partition import Partition
    from pipeflow.partitioners.problem import PartitionProblem
    from pipeflow.plan_explanation import PlanExplanation


class Plan(Value):
    """What is where, and in which order of work.

    Attributes:
        costs: the graph with its costs for one micro-batch.
        graph_digest: of the layer graph it was made for; "" where it was made from costs alone.
        cluster: the devices; device i is rank i.
        stages: in an order in which data only flows forward. A rank may hold several.
        certificate: of the partition.
        schedule: a name in `pipeflow.schedules.SCHEDULES`, or `module:function`.
        num_microbatches: into how many a batch is cut, as evenly as can be, larger ones first.
        batch_size: samples of a whole batch that the plan was made for; a run may use others.
        optimizer_ratio: bytes of optimizer state for each byte of parameters (Adam: 2).
        pins: what a person fixed, which the stages keep.
        offload: layers whose saved activations are on the host between forward and backward, in the
            graph's order.

    Raises:
        PlanError: a layer is on no stage or on two, data flows backward between stages, a
            device does not exist, a colocated group is split, a pin is not kept, or a layer is
            offloaded that does not exist or is recomputed.
    """

    format: Literal["pipeflow-plan-1"] = "pipeflow-plan-1"
    costs: GraphCosts
    graph_digest: str = ""
    cluster: Cluster
    stages: tuple[Stage, ...] = Field(min_length=1)
    certificate: Certificate
    schedule: str
    num_microbatches: Count
    batch_size: Count
    optimizer_ratio: float = Field(default=2.0, ge=0, allow_inf_nan=False)
    pins: Pins = Field(default_factory=Pins)
    offload: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_offload(self.offload, self.costs, [name for stage in self.stages for name in stage.recompute])
        stage_by_layer: dict[str, int] = {}
        for index, stage in enumerate(self.stages):
            for layer in stage.layers:
                if layer not in self.costs.layer_by_name:
                    raise PlanError(f"stage {index} holds {layer!r}, which is not a layer of {self.costs.name!r}")
                if layer in stage_by_layer:
                    raise PlanError(f"layer {layer!r} is on stages {stage_by_layer[layer]} and {index}; one must do")
                stage_by_layer[layer] = index
            if outside := [d for d in stage.devices if d >= self.cluster.num_devices]:
                raise PlanError(
                    f"stage {index} is on device {outside[0]}, but the cluster has {self.cluster.num_devices} devices"
                )
            order = [self.costs.position_by_layer[layer] for layer in stage.layers]
            if order != sorted(order):
                raise PlanError(f"stage {index} lists its layers out of the graph's order; sort them")
        if missing := [c.name for c in self.costs.layers if c.name not in stage_by_layer]:
            raise PlanError(f"layer {missing[0]!r} is on no stage ({len(missing)} such); every layer needs one")
        for a, b in self.costs.graph.edges:
            if stage_by_layer[a] > stage_by_layer[b]:
                raise PlanError(
                    f"{a!r} on stage {stage_by_layer[a]} feeds {b!r} on the earlier stage {stage_by_layer[b]}; "
                    "data must flow forward through the stages"
                )
        for group in self.costs.colocated:
            if len({stage_by_layer[layer] for layer in group}) > 1:
                raise PlanError(
                    f"layers {', '.join(group)} share parameters and must share a stage; plan with shared='copies' "
                    "to keep them apart"
                )
        self.pins.check(self.costs, self.cluster.num_devices)
        if broken := self.pins.broken(self.stages):
            raise PlanError(f"{broken[0]}; keep the plan's pins or leave them out")
        return self

    @cached_property
    def stage_by_layer(self) -> dict[str, int]:
        return {layer: index for index, stage in enumerate(self.stages) for layer in stage.layers}

    @cached_property
    def offload_set(self) -> frozenset[str]:
        return frozenset(self.offload)

    @property
    def shared(self) -> Literal["together", "copies"]:
        """Whether layers that share parameters share a stage, or stages may keep copies; part of `costs`."""
        return self.costs.sharing

    @property
    def placement(self) -> tuple[tuple[int, ...], ...]:
        """Ranks of each stage's replicas."""
        return tuple(stage.devices for stage in self.stages)

    @property
    def num_ranks(self) -> int:
        """Ranks the plan needs: one more than the largest device in use."""
        return 1 + max(d for stage in self.stages for d in stage.devices)

    def in_phase(self, name: str) -> Plan:
        """The plan of one kind of training step, where the graph has several: the same stages, what runs alone.

        Raises:
            CostError: there is no such phase.
        """
        return self.model_copy(update={"costs": self.costs.in_phase(name)})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan as JSON.

        Raises:
            PlanError: the file cannot be written.
        """
        write_text(path, self.model_dump_json(indent=1) + "\n", error=PlanError)

    @classmethod
    def load(cls, path: str | os.PathLike[str], allow: Sequence[str] = ()) -> Plan:
        """Reads a plan that `save` wrote.

        Args:
            path: the file.
            allow: import prefixes of schedules to trust besides those of `SCHEDULES`, for example
                "mypackage" or "mypackage.orders". What a file names is imported and called.

        Raises:
            PlanError: the file is not a plan, the message names the key; or it names a schedule that
                is not allowed.
        """
        plan = read_value(cls, path, what="a plan", error=PlanError)
        try:
            check_schedule_of_file(plan.schedule, allow)
        except PlanError as error:
            raise PlanError(f"{os.fspath(path)}: {error}") from error
        return plan

    def explain(self, *, partitioner: str | Callable[[PartitionProblem], Partition] | None = "auto") -> PlanExplanation:
        """Why the plan costs what it costs, and what would change it; print it or take its `document()`.

        Args:
            partitioner: solves the same graph with one more device, faster links, more memory: a
                name in `PARTITIONERS` or a function. None bounds those instead, at once.

        Raises:
            PlanError: an unknown name.
        """
        from pipeflow.plan_explanation import explain_plan

        return explain_plan(self, partitioner)

    def __str__(self) -> str:
        from pipeflow.plan_table import plan_table

        return plan_table(self)
