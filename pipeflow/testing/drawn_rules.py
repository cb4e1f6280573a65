"""Hypothesis strategies for the rules of a partition problem that most problems do without.

Layers that are unordered or together, copies of what they share, variants, levels one inside the
other, memory that hardly suffices. `problems` draws them where it is asked to. Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from pipeflow.graphs.costs import GraphCosts, LayerCosts, SharedTensor, Variant
from pipeflow.graphs.sharing import with_copies
from pipeflow.partitioners.cluster import Cluster, Level
from pipeflow.partitioners.objective import stage_terms
from pipeflow.partitioners.partition import Stage
from pipeflow.partitioners.pins import Pins
from pipeflow.partitioners.problem import PartitionProblem

_TICK = 2.0**-10
_UNIT = 1024


@st.composite
def unordered_layers(draw: st.DrawFn, graph: GraphCosts) -> frozenset[str]:
    """Draws layers that the order of the stages does not bind; at times none, or all."""
    return frozenset(layer.name for layer in graph.layers if draw(st.booleans()))


@st.composite
def groups_together(draw: st.DrawFn, graph: GraphCosts) -> tuple[tuple[str, ...], ...]:
    """Draws up to two groups of layers that must share a stage."""
    names = [layer.name for layer in graph.layers]
    if len(names) < 2:
        return ()
    group = st.lists(st.sampled_from(names), min_size=2, max_size=3, unique=True).map(tuple)
    return tuple(draw(st.lists(group, max_size=2)))


@st.composite
def with_shared_copies(draw: st.DrawFn, graph: GraphCosts) -> GraphCosts:
    """Draws up to two parameters that layers share, of which every stage with such a layer keeps a copy."""
    names = [layer.name for layer in graph.layers]
    if len(names) < 2:
        return graph
    users = st.sets(st.sampled_from(names), min_size=2, max_size=3)
    shared = tuple(
        SharedTensor(
            name=f"shared{i}",
            layers=tuple(sorted(group, key=graph.position_by_layer.__getitem__)),
            bytes=draw(st.integers(1, 8)) * _UNIT,
        )
        for i, group in enumerate(draw(st.lists(users, min_size=1, max_size=2)))
    )
    return with_copies(graph.model_copy(update={"shared": shared}))


@st.composite
def with_variants(draw: st.DrawFn, graph: GraphCosts) -> GraphCosts:
    """Draws ways to run some of the graph's layers: up to two, on one device or shared by two."""
    layers = [layer.model_copy(update={"variants": _variants(draw, layer)}) for layer in graph.layers]
    return graph.model_copy(update={"layers": tuple(layers)})


def _variants(draw: st.DrawFn, layer: LayerCosts) -> tuple[Variant, ...]:
    names = draw(st.sampled_from([[], ["keep"], ["keep", "again"]]))
    degrees = draw(st.sampled_from([[1], [1], [1, 2], [2]]))
    tensors = [*layer.inputs[:1], layer.outputs[0].name]
    return tuple(
        Variant(
            name=name,
            degree=degree,
            seconds=draw(st.integers(0, 12)) * _TICK,
            parameter_bytes=draw(st.integers(0, 4)) * _UNIT,
            resident_bytes=draw(st.integers(0, 8)) * _UNIT,
            saved_bytes=draw(st.integers(0, 6)) * _UNIT,
            border_bytes=tuple((tensor, draw(st.integers(0, 3)) * _UNIT) for tensor in tensors if draw(st.booleans())),
        )
        for degree in degrees
        for name in names
    )


@st.composite
def nesting_clusters(draw: st.DrawFn) -> Cluster:
    """Draws a cluster of up to four like devices whose levels can be planned one inside the other."""
    sizes = draw(st.sampled_from([(1,), (2,), (3,), (2, 4)]))
    bandwidths = draw(st.sampled_from([(None, None), (2.0**24, 2.0**20), (2.0**20, 2.0**20)]))
    latency = draw(st.sampled_from([0.0, _TICK / 8]))
    levels = tuple(Level(size=n, bandwidth=b, latency=latency) for n, b in zip(sizes, bandwidths, strict=False))
    return Cluster(devices=Cluster.uniform(sizes[-1]).devices, levels=levels)


@st.composite
def nested_problems(draw: st.DrawFn, problem: PartitionProblem) -> PartitionProblem:
    """Draws what counts where levels are nested; the problem's cluster must be one of `nesting_clusters`."""
    return replace(
        problem,
        nested=True,
        even_replicas=False,
        transfers=draw(st.sampled_from(["relayed", "free"])),
        reduce_every="microbatch",
        num_stages=None,
        max_stages=None,
        replicas=None,
        max_replicas=draw(st.sampled_from([None, None, 1])),
        pins=Pins(),
    )


@st.composite
def with_tight_memory(draw: st.DrawFn, problem: PartitionProblem) -> PartitionProblem:
    """Draws memory limits between two fifths and a little more of what one device would hold with all layers.

    Like devices stay alike.
    """
    whole = Stage.replicated([layer.name for layer in problem.costs.layers], [0])
    need = stage_terms(replace(problem, nested=False), [whole])[0].total_bytes
    cluster, percent = problem.cluster, st.integers(40, 130)
    shares = [draw(percent)] * cluster.num_devices
    if not cluster.is_uniform:
        shares = [draw(percent) for _ in cluster.devices]
    devices = [
        device.model_copy(update={"memory_bytes": need * share // 100})
        for device, share in zip(cluster.devices, shares, strict=True)
    ]
    return replace(problem, cluster=Cluster(devices=tuple(devices), levels=cluster.levels, links=cluster.links))
