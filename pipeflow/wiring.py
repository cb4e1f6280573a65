"""What each stage of a plan needs, gives and learns: the tables behind lowering and its checks.

Read off a plan once and shared by lowering, the memory model, the verifier and the simulator, so
that they cannot disagree about it. Knows routes and stages; decides no order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from pipeflow.errors import PlanError
from pipeflow.execution_plan import Plan
from pipeflow.flows import flows, routes
from pipeflow.graphs.sharing import held_bytes, shared_groups
from pipeflow.program import Direction, Mode, Placement, Reduce, ReduceShared, Reduction, Route, stages_of


@dataclass(frozen=True)
class Wiring:
    """Per stage (by index), in one mode.

    Attributes:
        mode: for training; or forward alone, which has no gradients and learns nothing.
        placement: ranks of each stage's replicas.
        num_microbatches: M.
        routes: all that crosses between stages in this mode.
        forward_in, forward_out: routes of activations that end, or start, at the stage; outgoing
            ones to the nearest stage first.
        gradient_in, gradient_out: the same for gradients.
        has_backward: whether the stage computes a backward.
        has_parameters: whether it has parameters to train, copies included, and so a `Step`.
        has_reduction: whether it has several replicas, which sum gradients or tell each other statistics.
        has_offload: whether layers of it keep what backward needs on the host.
        shared: the sums over several stages, in the order in which all ranks start them.
        reduced_bytes: of each sum that a step has.
        payload_bytes: of each route, for one micro-batch.
    """

    mode: Mode
    placement: Placement
    num_microbatches: int
    routes: tuple[Route, ...]
    forward_in: tuple[tuple[Route, ...], ...]
    forward_out: tuple[tuple[Route, ...], ...]
    gradient_in: tuple[tuple[Route, ...], ...]
    gradient_out: tuple[tuple[Route, ...], ...]
    has_backward: tuple[bool, ...]
    has_parameters: tuple[bool, ...]
    has_reduction: tuple[bool, ...]
    has_offload: tuple[bool, ...]
    shared: tuple[ReduceShared, ...]
    reduced_bytes: Mapping[Reduction, int]
    payload_bytes: Mapping[Route, int]

    @property
    def num_stages(self) -> int:
        return len(self.placement)

    @property
    def num_ranks(self) -> int:
        return 1 + max(rank for ranks in self.placement for rank in ranks)

    @cached_property
    def reductions_by_stage(self) -> tuple[tuple[Reduction, ...], ...]:
        """The sums that the step of each stage waits for."""
        return tuple(
            tuple(reduction for reduction in self.reduced_bytes if stage in stages_of(reduction))
            for stage in range(self.num_stages)
        )


def routes_of(plan: Plan) -> tuple[Route, ...]:
    """Everything that crosses between the plan's stages while training (see `pipeflow.flows`)."""
    return routes(flows(plan.costs, [stage.layers for stage in plan.stages]))


def wire(plan: Plan, mode: Mode) -> Wiring:
    """The tables of a plan.

    Raises:
        PlanError: the plan asks for what cannot be executed: a mesh with other axes than
            "replica", replicas of a layer that would train otherwise than on one device, or costs
            that give a gradient to a layer without backward.
    """
    training = mode is Mode.TRAIN
    layers = plan.costs.layer_by_name
    has_backward = tuple(training and any(layers[n].has_backward for n in s.layers) for s in plan.stages)
    held = held_bytes(plan.costs, [stage.layers for stage in plan.stages])
    reduced = _reduced_bytes(plan) if training else {}
    _check_meshes(plan, training=training)
    every = tuple(r for r in routes_of(plan) if training or r.direction is Direction.FORWARD)
    for route in every:
        if route.direction is Direction.BACKWARD and not has_backward[route.target]:
            raise PlanError(
                f"the costs of {plan.costs.name!r} give tensors {', '.join(route.payload)} a gradient "
                f"(gradient_bytes > 0), but no layer of stage {route.target}, where they come from, has_backward"
            )

    def group(direction: Direction, *, by_source: bool) -> tuple[tuple[Route, ...], ...]:
        chosen: list[list[Route]] = [[] for _ in plan.stages]
        for route in every:
            if route.direction is direction:
                chosen[route.source if by_source else route.target].append(route)
        return tuple(tuple(sorted(c, key=lambda r: abs(r.target - r.source))) for c in chosen)

    return Wiring(
        mode=mode,
        placement=plan.placement,
        num_microbatches=plan.num_microbatches,
        routes=every,
        forward_in=group(Direction.FORWARD, by_source=False),
        forward_out=group(Direction.FORWARD, by_source=True),
        gradient_in=group(Direction.BACKWARD, by_source=False),
        gradient_out=group(Direction.BACKWARD, by_source=True),
        has_backward=has_backward,
        has_parameters=tuple(training and bytes_of.trained > 0 for bytes_of in held),
        has_reduction=tuple(Reduce(index) in reduced for index in range(len(plan.stages))),
        has_offload=tuple(
            back and not plan.offload_set.isdisjoint(stage.layers)
            for back, stage in zip(has_backward, plan.stages, strict=True)
        ),
        shared=tuple(reduction for reduction in reduced if isinstance(reduction, ReduceShared)),
        reduced_bytes=reduced,
        payload_bytes={route: _payload_bytes(plan, route) for route in every},
    )


def _reduced_bytes(plan: Plan) -> dict[Reduction, int]:
    """Bytes of every sum over replicas, statistics that travel with it included; then of those over stages."""
    stages = [stage.layers for stage in plan.stages]
    result: dict[Reduction, int] = {}
    for index, held in enumerate(held_bytes(plan.costs, stages)):
        told = sum(plan.costs.layer_by_name[name].statistics_bytes for name in stages[index])
        if plan.stages[index].num_replicas > 1 and (held.own or told):
            result[Reduce(index)] = held.own + plan.num_microbatches * told
    for group in shared_groups(plan.costs, stages):
        result[ReduceShared(group.stages)] = group.bytes
    return result


def _payload_bytes(plan: Plan, route: Route) -> int:
    tensors = [plan.costs.tensor_by_name[name.partition("#")[0]] for name in route.payload]
    return sum(t.bytes if route.direction is Direction.FORWARD else t.gradient_bytes for t in tensors)


def _check_meshes(plan: Plan, *, training: bool) -> None:
    for index, stage in enumerate(plan.stages):
        if len(stage.devices) != stage.num_replicas:
            raise PlanError(
                f"stage {index} has a mesh with axes {dict(stage.mesh.axes)}; only the axis 'replica' is executed: "
                "give the stage one replica per device"
            )
        if training and stage.num_replicas > 1:
            for name in stage.layers:
                if not plan.costs.layer_by_name[name].replicable:
                    raise PlanError(
                        f"stage {index} has {stage.num_replicas} replicas, but its layer {name!r} would not train as "
                        "on one device with several (it is not replicable: its forward changes buffers); give the "
                        "stage one"
                    )
