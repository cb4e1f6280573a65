"""Hypothesis strategies for costs, clusters and partition problems.

Amounts are small whole numbers of a coarse unit, so that ties are common and sums are exact in
most drawn cases. Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from pipeflow.graphs.costs import GraphCosts, LayerCosts, TensorCosts
from pipeflow.partitioners.cluster import Cluster, Device, Level, Link
from pipeflow.partitioners.pins import Pin, Pins
from pipeflow.partitioners.problem import PartitionProblem, Position, one_forward_one_backward, one_version, stashed
from pipeflow.testing import drawn_rules as rules

_TICK = 2.0**-10
_UNIT = 1024


@st.composite
def costs(
    draw: st.DrawFn,
    *,
    min_layers: int = 1,
    max_layers: int = 7,
    is_chain: bool = False,
    colocated: bool = True,
    stuck: bool = True,
) -> GraphCosts:
    """Draws a layer graph with costs.

    Args:
        min_layers, max_layers: how many layers.
        is_chain: every layer reads the one before it and nothing else; otherwise layers branch,
            skip, read several tensors, and have one or two outputs.
        colocated: whether groups of layers may have to share a stage.
        stuck: whether layers may refuse replication.
    """
    count = draw(st.integers(min_layers, max_layers))
    tensors = ["x"]
    layers: list[LayerCosts] = []
    for index in range(count):
        if is_chain:
            inputs = [tensors[-1]]
        else:
            recent = st.sampled_from(tensors[-3:]) if draw(st.booleans()) else st.sampled_from(tensors)
            inputs = draw(st.lists(recent, min_size=1, max_size=3, unique=True))
        num_outputs = 1 if is_chain else draw(st.sampled_from([1, 1, 1, 2]))
        names = [f"l{index}"] if num_outputs == 1 else [f"l{index}:{k}" for k in range(num_outputs)]
        layers.append(
            LayerCosts(
                name=f"l{index}",
                kind=draw(st.sampled_from(["dense", "norm"])),
                inputs=tuple(inputs),
                outputs=tuple(_tensor(draw, name) for name in names),
                forward_seconds=draw(st.integers(0, 8)) * _TICK,
                backward_input_seconds=draw(st.integers(0, 8)) * _TICK,
                backward_weight_seconds=draw(st.integers(0, 4)) * _TICK,
                parameter_bytes=draw(st.integers(0, 6)) * _UNIT,
                saved_bytes=draw(st.integers(0, 6)) * _UNIT,
                has_backward=draw(st.sampled_from([True, True, True, False])),
                replicable=not (stuck and draw(st.integers(0, 9)) == 9),
            )
        )
        tensors += names
    groups: list[tuple[str, ...]] = []
    if colocated and count >= 3 and draw(st.integers(0, 3)) == 3:
        members = draw(st.lists(st.sampled_from(layers), min_size=2, max_size=2, unique_by=lambda c: c.name))
        groups.append(tuple(c.name for c in members))
    return GraphCosts(
        name="drawn", inputs=(TensorCosts(name="x", bytes=_UNIT),), layers=tuple(layers), colocated=tuple(groups)
    )


def _tensor(draw: st.DrawFn, name: str) -> TensorCosts:
    amount = draw(st.integers(0, 5)) * _UNIT
    return TensorCosts(name=name, bytes=amount, gradient_bytes=amount if draw(st.booleans()) else 0)


@st.composite
def clusters(
    draw: st.DrawFn,
    *,
    min_devices: int = 1,
    max_devices: int = 4,
    is_uniform: bool | None = None,
    limited: bool | None = None,
) -> Cluster:
    """Draws a cluster: alike devices, unlike ones, two levels, or a pair with a link of its own.

    Args:
        min_devices, max_devices: how many devices.
        is_uniform: True for devices and links all alike, False for none such, None for either.
        limited: whether devices have memory limits; None for either.
    """
    count = draw(st.integers(min_devices, max_devices))
    if is_uniform is None:
        is_uniform = draw(st.booleans())
    if limited is None:
        limited = draw(st.booleans())
    bandwidth = draw(st.sampled_from([None, 2.0**20, 2.0**24]))
    latency = draw(st.sampled_from([0.0, _TICK / 8]))
    memory = draw(st.integers(8, 160)) * _UNIT if limited else None
    if is_uniform:
        return Cluster.uniform(count, memory_bytes=memory, bandwidth=bandwidth, latency=latency)
    devices = [
        Device(
            name=f"d{i}",
            memory_bytes=draw(st.integers(8, 160)) * _UNIT if limited else None,
            speed=draw(st.sampled_from([0.5, 1.0, 2.0])),
            speed_by_kind=draw(st.sampled_from([{}, {}, {"norm": 0.25}])),
        )
        for i in range(count)
    ]
    outer = Level(size=count + count % 2, bandwidth=bandwidth, latency=latency)
    levels = (outer,) if count <= 2 else (Level(size=2, bandwidth=2.0**26), outer)
    links = (Link(a=0, b=1, bandwidth=2.0**19, latency=_TICK),) if count > 1 and draw(st.integers(0, 3)) == 3 else ()
    return Cluster(devices=tuple(devices), levels=levels, links=links)


def in_flight_all(position: Position) -> int:
    """GPipe's memory: a replica holds its share of all micro-batches."""
    return -(-position.num_microbatches // position.num_replicas)


@st.composite
def pins(draw: st.DrawFn, graph: GraphCosts, num_devices: int) -> Pins:
    """Draws one or two kinds of pins for a graph on so many devices; they may contradict each other."""
    names, edges = [c.name for c in graph.layers], sorted(graph.graph.edges)
    kinds = draw(st.sets(st.sampled_from(["stage", "device", "together", "apart", "no_cut", "few"]), max_size=2))
    on = [Pin(layer=draw(st.sampled_from(names)), stage=draw(st.integers(-2, 2))) for _ in range(2) if "stage" in kinds]
    devices = st.integers(0, num_devices - 1)
    on += [Pin(layer=draw(st.sampled_from(names)), device=draw(devices)) for _ in range(2) if "device" in kinds]
    some = st.lists(st.sampled_from(names), min_size=2, max_size=3, unique=True).map(tuple)
    several = len(names) > 1
    return Pins(
        on=tuple(on),
        together=(draw(some),) if several and "together" in kinds else (),
        apart=(draw(some),) if several and "apart" in kinds else (),
        no_cut=(draw(st.sampled_from(edges)),) if edges and "no_cut" in kinds else (),
        max_layers=draw(st.integers(1, len(names))) if "few" in kinds else None,
    )


@st.composite
def problems(
    draw: st.DrawFn,
    *,
    graphs: st.SearchStrategy[GraphCosts] | None = None,
    cluster: st.SearchStrategy[Cluster] | None = None,
    constrained: bool = True,
    pinned: bool | None = None,
    together: bool = False,
    unordered: bool = False,
    copies: bool = False,
    chunks: bool = False,
    nested: bool = False,
    variants: bool = False,
    tight: bool = False,
) -> PartitionProblem:
    """Draws a partition problem; it may be infeasible.

    The last seven are rules that few partitioners take, and none is drawn unless it is asked for.

    Args:
        graphs: of the costs; `costs()` by default.
        cluster: of the cluster; `clusters()` by default.
        constrained: whether numbers of stages and replicas may be asked for.
        pinned: whether there are pins; None for either where it is constrained, and else none.
        together: whether groups of layers may have to share a stage, beside the costs' colocated ones.
        unordered: whether the order of the stages may leave layers unbound. Transfers are then not relayed.
        copies: whether layers share parameters of which stages keep copies. Levels cannot be nested then.
        chunks: whether stages go round the devices twice. No layer is then pinned to a stage or device.
        nested: whether levels are planned one inside the other, on clusters of their own and without
            what that forbids: pins, memory limits, numbers of stages.
        variants: whether layers may run in several ways.
        tight: whether all devices have memory limits about as small as the graph's layers allow.
    """
    if nested:
        cluster = rules.nesting_clusters() if cluster is None else cluster
    drawn = draw(clusters() if cluster is None else cluster)
    num_stages = max_stages = max_replicas = None
    replicas: tuple[int, ...] | None = None
    rule = draw(st.sampled_from(["free", "free", "one", "stages", "most", "replicas"])) if constrained else "free"
    if rule == "one":
        max_replicas = 1
    elif rule == "stages":
        num_stages = draw(st.integers(1, drawn.num_devices))
    elif rule == "most":
        max_stages = draw(st.integers(1, drawn.num_devices))
        max_replicas = draw(st.sampled_from([None, 1, 2]))
    elif rule == "replicas":
        replicas = tuple(draw(st.lists(st.integers(1, 2), min_size=1, max_size=drawn.num_devices)))
    graph = draw(costs() if graphs is None else graphs)
    if copies:
        graph = draw(rules.with_shared_copies(graph))
    if variants:
        graph = draw(rules.with_variants(graph))
    if pinned is None:
        pinned = constrained and draw(st.integers(0, 2)) == 2
    problem = PartitionProblem(
        costs=graph,
        cluster=drawn,
        num_microbatches=draw(st.integers(1, 9)),
        in_flight=draw(st.sampled_from([one_forward_one_backward, in_flight_all, stashed])),
        num_stages=num_stages,
        max_stages=max_stages,
        replicas=replicas,
        max_replicas=max_replicas,
        optimizer_ratio=draw(st.sampled_from([0.0, 1.0, 2.0])),
        transfers=draw(st.sampled_from(["added", "added", "overlapped", "relayed", "free"])),
        even_replicas=replicas is None and draw(st.integers(0, 3)) == 3,
        reduction=draw(st.sampled_from(["ring", "ring", "server"])),
        weight_versions=draw(st.sampled_from([one_version, one_version, stashed])),
        holds_received=draw(st.sampled_from([True, True, False])),
        reduce_every=draw(st.sampled_from(["iteration", "iteration", "microbatch"])),
        fan_out=draw(st.sampled_from(["stage", "tensor"])),
        pins=draw(pins(graph, drawn.num_devices)) if pinned else Pins(),
    )
    if together:
        problem = replace(problem, together=draw(rules.groups_together(graph)))
    if (unordered or chunks) and problem.transfers == "relayed":
        problem = replace(problem, transfers="added")
    if unordered:
        problem = replace(problem, unordered=draw(rules.unordered_layers(graph)))
    if chunks:
        problem = replace(problem, chunks=2, pins=problem.pins.model_copy(update={"on": ()}))
    if nested:
        problem = draw(rules.nested_problems(problem))
    return draw(rules.with_tight_memory(problem)) if tight else problem
