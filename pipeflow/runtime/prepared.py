"""A plan made ready to be bound: proved and lowered, for each phase of the training."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from pipeflow.errors import PlanError
from pipeflow.execution_plan import Plan
from pipeflow.flows import Flow, flows
from pipeflow.graphs.layer_graph import LayerGraph
from pipeflow.graphs.numerics import Numerics
from pipeflow.graphs.phase import phase_costs
from pipeflow.graphs.retyping import retyped
from pipeflow.lowering import lower
from pipeflow.program import Mode, Program, Step
from pipeflow.verifier import verify


@dataclass(frozen=True, slots=True)
class Prepared:
    """What one phase runs; a training without phases is one, named None.

    Attributes:
        graph: the layers that run, with gradients where the phase trains.
        programs: for training and for inference.
        flows: of all tensors between the layers that run.
        peak_bytes_by_rank: that training holds at most, as was proved.
    """

    graph: LayerGraph
    programs: Mapping[Mode, Program]
    flows: Mapping[str, Flow]
    peak_bytes_by_rank: tuple[int, ...]


def prepare(graph: LayerGraph, plan: Plan, *, synchronised: bool = False) -> Mapping[str | None, Prepared]:
    """The whole graph, under None, and each of its phases.

    Args:
        synchronised: whether batch-norms divide by what all replicas of their stage see.

    Raises:
        PlanError: the plan is for another graph, or asks for what this version does not run.
        VerificationError: a program would not run to its end.
    """
    graph.check()
    check_match(graph, plan)
    lockstep = lockstep_stages(graph, plan) if synchronised else frozenset()
    whole = _prepare(graph, plan, lockstep)
    _check_steps(graph, plan, whole.programs[Mode.TRAIN])
    phases = {name: _prepare(graph.in_phase(name), plan.in_phase(name), lockstep) for name in graph.phases}
    return {None: whole} | phases


def lockstep_stages(graph: LayerGraph, plan: Plan) -> frozenset[int]:
    """The stages whose replicas wait for each other if their norms are synchronised."""
    normed = {plan.stage_by_layer[name] for name, layer in graph.layers.items() if layer.norm_calls}
    return frozenset(index for index in normed if plan.stages[index].num_replicas > 1)


def in_types(prepared: Mapping[str | None, Prepared], numerics: Numerics) -> Mapping[str | None, Prepared]:
    """The same in other types of computation: the graphs have the specs that tensors then have.

    Raises:
        ShapeError: a layer does not run in those types.
    """
    whole = retyped(prepared[None].graph, numerics)
    return {
        phase: replace(of_phase, graph=whole if phase is None else whole.in_phase(phase))
        for phase, of_phase in prepared.items()
    }


def _prepare(graph: LayerGraph, plan: Plan, lockstep: Collection[int]) -> Prepared:
    proof = verify(plan, lockstep=lockstep)
    programs = {mode: lower(plan, mode=mode) for mode in Mode}
    return Prepared(
        graph, programs, flows(plan.costs, [stage.layers for stage in plan.stages]), proof.peak_bytes_by_rank
    )


def check_match(graph: LayerGraph, plan: Plan) -> None:
    """Whether the plan is for the graph.

    Raises:
        PlanError: it is for another one.
    """
    if plan.graph_digest and plan.graph_digest != graph.digest:
        raise PlanError(
            f"the plan is for the graph {plan.graph_digest[:12]}, this graph {graph.name!r} is {graph.digest[:12]}; "
            "plan again for it"
        )
    if tuple(graph.layers) != tuple(layer.name for layer in plan.costs.layers):
        raise PlanError(f"the plan's layers are not those of graph {graph.name!r} in its order; plan again for it")
    if plan.costs.phases != phase_costs(graph):
        raise PlanError(
            f"graph {graph.name!r} trains in phases {', '.join(graph.phases) or 'none'}, and the plan's costs know of "
            f"{', '.join(phase.name for phase in plan.costs.phases) or 'none'}, or of others of these names; profile "
            "the graph again and plan with those costs"
        )


def _check_steps(graph: LayerGraph, plan: Plan, program: Program) -> None:
    """Every stage with parameters to train takes a step: a plan from costs may not know of them."""
    stepping = {a.stage for actions in program.actions_by_rank for a in actions if isinstance(a, Step)}
    for layer, size in graph.parameter_bytes.items():
        stage = plan.stage_by_layer[layer]
        if size and graph.layers[layer].has_backward and stage not in stepping:
            raise PlanError(
                f"layer {layer!r} has {size} bytes of parameters, but by the plan's costs stage {stage} has none to "
                "train; profile the graph again and plan with those costs"
            )
