"""Hypothesis strategies for plans, and the check that any plan becomes a program that runs.

Nothing here imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import networkx as nx
from hypothesis import strategies as st

from pipeflow.errors import VerificationError
from pipeflow.execution_plan import Plan
from pipeflow.graphs.costs import GraphCosts, LayerCosts, SharedTensor, TensorCosts
from pipeflow.graphs.sharing import with_copies
from pipeflow.lowering import lower
from pipeflow.partitioners.objective import objective
from pipeflow.partitioners.partition import Certificate, Stage
from pipeflow.partitioners.problem import PartitionProblem
from pipeflow.program import Compute, Kind, Mode, Program
from pipeflow.schedules import SCHEDULES
from pipeflow.simulator import simulate
from pipeflow.testing.drawn_problems import clusters
from pipeflow.testing.drawn_problems import costs as any_costs
from pipeflow.timeline import Timeline
from pipeflow.verifier import verify


@st.composite
def plans(
    draw: st.DrawFn,
    graphs: GraphCosts | st.SearchStrategy[GraphCosts] | None = None,
    *,
    max_ranks: int = 6,
    max_stages: int = 5,
    max_replicas: int = 3,
    max_microbatches: int = 9,
    equal_replicas: bool | None = None,
    shared_ranks: bool = True,
    copies: bool = True,
    schedules: Collection[str] = tuple(SCHEDULES),
    recompute: bool = True,
    offload: bool = True,
    graph_digest: str = "",
) -> Plan:
    """Draws a valid plan of a graph.

    Stages are any ordered partition in which data flows forward, not only cuts of the listed
    order; ranks may be left without a stage, and hold several.

    Args:
        graphs: costs, or a strategy of them; by default small graphs in which something is learned.
        max_ranks, max_stages, max_replicas, max_microbatches: limits. Layers that are not
            replicable are never replicated.
        equal_replicas: True for one replica count for all stages (those that can), False for a
            count of its own for each, None for either.
        shared_ranks: whether a rank may hold several stages.
        copies: whether layers that share parameters may be on several stages.
        schedules: names to choose from.
        recompute: whether layers may be recomputed; in most plans none is.
        offload: whether what layers save may be on the host; in most plans all of it stays.
        graph_digest: of the layer graph that the costs are of.
    """
    costs = graphs if isinstance(graphs, GraphCosts) else draw(learnable_costs() if graphs is None else graphs)
    if copies and costs.shared:
        costs = with_copies(costs) if draw(st.booleans(), label="copies") else costs
    layers = _draw_stages(draw, costs, min(max_stages, len(costs.layers)))
    replicas = _draw_replicas(draw, costs, layers, min(max_replicas, max_ranks), equal_replicas)
    while not shared_ranks and sum(replicas) > max_ranks:
        widest = max(range(len(replicas)), key=lambda s: replicas[s])
        if replicas[widest] == 1:
            layers = [[n for stage in layers[:2] for n in stage], *layers[2:]]
            replicas = [1, *replicas[2:]]
        else:
            replicas[widest] -= 1
    ranks = _draw_ranks(draw, replicas, max_ranks, shared_ranks)
    position = costs.position_by_layer
    stages = tuple(
        Stage.replicated(sorted(names, key=position.__getitem__), on) for names, on in zip(layers, ranks, strict=True)
    )
    if recompute and draw(st.integers(0, 3)) == 3:
        stages = tuple(stage.with_recompute(draw(_recomputed(stage))) for stage in stages)
    moved: Collection[str] = ()
    if offload and draw(st.integers(0, 3)) == 3:
        moved = set(draw(st.just(tuple(position)) | st.sets(st.sampled_from(tuple(position)))))
        moved.difference_update(name for stage in stages for name in stage.recompute)
    num_ranks = 1 + max(r for on in ranks for r in on)
    num_microbatches = draw(st.integers(1, max_microbatches))
    cluster = draw(clusters(min_devices=num_ranks, max_devices=num_ranks, limited=False))
    seconds = objective(PartitionProblem(costs=costs, cluster=cluster, num_microbatches=num_microbatches), stages)
    return Plan(
        costs=costs,
        graph_digest=graph_digest,
        cluster=cluster,
        stages=stages,
        certificate=Certificate(partitioner="drawn", objective=seconds, lower_bound=0),
        schedule=draw(st.sampled_from(sorted(schedules))),
        num_microbatches=num_microbatches,
        batch_size=costs.samples * num_microbatches,
        optimizer_ratio=draw(st.sampled_from([0.0, 2.0])),
        offload=tuple(name for name in position if name in moved),
    )


def _recomputed(stage: Stage) -> st.SearchStrategy[Collection[str]]:
    return st.just(stage.layers) | st.sets(st.sampled_from(stage.layers))


@st.composite
def learnable_costs(draw: st.DrawFn, *, max_layers: int = 7) -> GraphCosts:
    """Draws costs as a training graph gives them: gradients only where a loss can reach.

    Layers that nobody reads are the losses. What is drawn as having a backward has one if it has
    parameters or reads something that needs a gradient.
    """
    drawn = draw(any_costs(max_layers=max_layers))
    learns: dict[str, bool] = {}
    for layer in drawn.layers:
        reads = any(learns.get(drawn.producer_by_tensor.get(t, ""), False) for t in layer.inputs)
        learns[layer.name] = layer.has_backward and (reads or layer.parameter_bytes > 0)
    reached: dict[str, bool] = {}
    for layer in reversed(drawn.layers):
        readers = [r for t in layer.outputs for r in drawn.consumers_by_tensor[t.name]]
        reached[layer.name] = learns[layer.name] and (not readers or any(reached[r] for r in readers))

    shared = _draw_shared(draw, drawn.layers, learns)

    def tensor(t: TensorCosts, layer: LayerCosts) -> TensorCosts:
        needed = learns[layer.name] and any(reached[r] for r in drawn.consumers_by_tensor[t.name])
        return t.model_copy(update={"gradient_bytes": max(1, t.bytes) if needed else 0})

    return GraphCosts(
        name=drawn.name,
        inputs=drawn.inputs,
        layers=tuple(
            layer.model_copy(
                update={
                    "has_backward": learns[layer.name],
                    "outputs": tuple(tensor(t, layer) for t in layer.outputs),
                }
            )
            for layer in drawn.layers
        ),
        colocated=(*drawn.colocated, *_joined(shared)),
        shared=shared,
    )


def _draw_shared(draw: st.DrawFn, layers: Sequence[LayerCosts], learns: Mapping[str, bool]) -> tuple[SharedTensor, ...]:
    """Up to two tensors that two or three layers use; the first that learns is charged for it, if it can be."""
    result = []
    for index in range(draw(st.sampled_from([0, 0, 1, 2])) if len(layers) > 1 else 0):
        users = draw(st.sets(st.sampled_from([layer.name for layer in layers]), min_size=2, max_size=3))
        named = tuple(layer for layer in layers if layer.name in users)
        counted = next((layer for layer in named if learns[layer.name]), named[0])
        size = draw(st.integers(0, counted.parameter_bytes // 2))
        result.append(
            SharedTensor(
                name=f"{named[0].name}.shared{index}",
                layers=tuple(layer.name for layer in named),
                bytes=size,
                is_trained=size > 0 and any(learns[layer.name] for layer in named) and draw(st.booleans()),
                is_copyable=draw(st.integers(0, 4)) < 4,
            )
        )
    return tuple(result)


def _joined(shared: Sequence[SharedTensor]) -> list[tuple[str, ...]]:
    """The layers that are joined by what they share."""
    graph: nx.Graph[str] = nx.Graph()
    for tensor in shared:
        nx.add_path(graph, tensor.layers)
    return [tuple(sorted(group)) for group in nx.connected_components(graph)]


def _draw_stages(draw: st.DrawFn, costs: GraphCosts, limit: int) -> list[list[str]]:
    """An ordered partition: each layer in the stage of its predecessors or a later one."""
    graph = nx.DiGraph(costs.graph)
    for group in costs.colocated:
        nx.add_cycle(graph, group)
    # Colocated layers, and whatever lies between them, stand or fall together.
    condensed = nx.condensation(graph)
    stage_by_node: dict[int, int] = {}
    for node in nx.lexicographical_topological_sort(condensed):
        first = max((stage_by_node[p] for p in condensed.predecessors(node)), default=0)
        stage_by_node[node] = draw(st.integers(first, limit - 1))
    stages: dict[int, list[str]] = {}
    for node, stage in stage_by_node.items():
        stages.setdefault(stage, []).extend(condensed.nodes[node]["members"])
    return [stages[stage] for stage in sorted(stages)]


def _draw_replicas(
    draw: st.DrawFn, costs: GraphCosts, stages: list[list[str]], limit: int, equal: bool | None
) -> list[int]:
    if equal is None:
        equal = draw(st.booleans())
    common = draw(st.integers(1, limit))
    return [
        (common if equal else draw(st.integers(1, limit)))
        if all(costs.layer_by_name[name].replicable for name in names)
        else 1
        for names in stages
    ]


def _draw_ranks(draw: st.DrawFn, replicas: list[int], max_ranks: int, shared: bool) -> list[list[int]]:
    """Distinct ranks for the replicas of each stage; for all of them unless ranks are shared."""
    total = sum(replicas)
    if total <= max_ranks and not (shared and draw(st.booleans())):
        pool = draw(st.permutations(range(max_ranks))) if draw(st.booleans()) else list(range(total))
        ends = [sum(replicas[: s + 1]) for s in range(len(replicas))]
        return [pool[end - count : end] for end, count in zip(ends, replicas, strict=True)]
    return [draw(st.permutations(range(max_ranks)))[:count] for count in replicas]


def check_program(plan: Plan) -> None:
    """Checks that a plan lowers, in both modes, to programs that are proved and simulate sanely.

    Raises:
        AssertionError: says what is wrong, and shows the program.
    """
    for mode in Mode:
        program = lower(plan, mode=mode)
        try:
            proof = verify(program, plan=plan)
        except VerificationError as error:
            raise AssertionError(f"{_story(plan, program)}\nis refused: {error}") from error
        timeline = simulate(program, plan=plan)
        problem = _timeline_problem(plan, program, timeline)
        if timeline.peak_bytes_by_rank != proof.peak_bytes_by_rank:
            problem = f"the simulator's peaks are {timeline.peak_bytes_by_rank}, the proof's {proof.peak_bytes_by_rank}"
        if problem:
            raise AssertionError(f"{_story(plan, program)}\n{problem}\n{timeline.text()}")


def _timeline_problem(plan: Plan, program: Program, timeline: Timeline) -> str:
    """What cannot be true of any timeline of the program, or nothing."""
    if len(timeline.events) != program.num_actions:
        return f"{len(timeline.events)} events for {program.num_actions} actions"
    slack = 1 + 1e-9
    if max(timeline.busy_seconds_by_rank) > timeline.makespan * slack:
        return f"a rank is busy for longer than the makespan of {timeline.makespan} s"
    if not -1e-9 <= timeline.bubble <= 1:
        return f"a bubble of {timeline.bubble}"
    if (path := _path_seconds(plan, program, timeline)) > timeline.makespan * slack:
        return f"one micro-batch alone takes {path} s, the makespan is {timeline.makespan} s"
    end_by_rank: dict[int, float] = {}
    for event in timeline.events:
        if isinstance(event.action, Compute):
            if event.start < end_by_rank.get(event.rank, 0.0):
                return f"'{event.action}' starts while rank {event.rank} still computes"
            end_by_rank[event.rank] = event.end
    return ""


def _path_seconds(plan: Plan, program: Program, timeline: Timeline) -> float:
    """The longest way of micro-batch 0 through the stages' forwards, by the edges of the graph."""
    seconds = {
        event.action.stage: event.seconds
        for event in timeline.events
        if isinstance(event.action, Compute) and event.action.kind is Kind.FORWARD and event.action.microbatch == 0
    }
    longest = dict.fromkeys(range(len(plan.stages)), 0.0)
    edges = {(plan.stage_by_layer[a], plan.stage_by_layer[b]) for a, b in plan.costs.graph.edges}
    for stage in longest:
        before = (longest[a] for a, b in edges if b == stage and a != stage)
        longest[stage] = math.fsum([max(before, default=0.0), seconds[stage]])
    return max(longest.values())


def _story(plan: Plan, program: Program) -> str:
    stages = "\n".join(
        f"stage {i} on ranks {list(s.devices)}: {', '.join(s.layers)}" for i, s in enumerate(plan.stages)
    )
    return f"schedule {plan.schedule!r}, {plan.num_microbatches} micro-batches\n{stages}\n{program}"
