"""What each stage of a plan needs, gives and learns: the tables behind lowering and its checks.

Read off a plan once and shared by lowering, the memory model, the verifier and the simulator, so
that they cannot disagree about it. Knows routes and stages; decides no order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipeflow.errors import PlanError
from pipeflow.execution_plan import Plan
from pipeflow.flows import flows, routes
from pipeflow.program import Direction, Mode, Placement, Route


@dataclass(frozen=True, slots=True)
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
        has_parameters: whether it has parameters to train, and so a `Step`.
        has_reduction: whether it has several replicas, which sum gradients or tell each other statistics.
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
    payload_bytes: Mapping[Route, int]

    @property
    def num_stages(self) -> int:
        return len(self.placement)

    @property
    def num_ranks(self) -> int:
        return 1 + max(rank for ranks in self.placement for rank in ranks)


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
    has_parameters = tuple(
        training and any(layers[n].has_backward and layers[n].parameter_bytes for n in s.layers) for s in plan.stages
    )
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
        has_parameters=has_parameters,
        has_reduction=tuple(
            len(s.devices) > 1 and (p or (training and any(layers[n].statistics_bytes for n in s.layers)))
            for p, s in zip(has_parameters, plan.stages, strict=True)
        ),
        payload_bytes={route: _payload_bytes(plan, route) for route in every},
    )


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
