"""Workloads of Piper (NeurIPS 2021): JSON with alternatives for every node and degree.

Each alternative becomes a `Variant` of its layer, under its own name and degree of tensor parallelism.
Times are seconds per sample, which is a micro-batch. Of the memory, `memoryUsageA` is held for each
micro-batch in flight and `memoryUsageB` whatever is in flight. Every edge is a tensor of its own, for
each costs by itself; `syncTimeFw` and `syncTimeBw` are bytes that the devices of a replica move on top
where an edge enters or leaves their stage, there and back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import networkx as nx

from pipeflow.errors import FormatError
from pipeflow.graphs.costs import GraphCosts, LayerCosts, TensorCosts, Variant
from pipeflow.graphs.formats.edges import edge_ends, in_order, nodes_by_id
from pipeflow.graphs.formats.fields import Record, checked, count, identity, mapping, number, records, whole_file
from pipeflow.graphs.formats.profile import Profile, refusing
from pipeflow.graphs.formats.whole_bytes import WholeBytes
from pipeflow.values import parse_json

_SIZES = ("parameterSize", "memoryUsageA", "memoryUsageB")


def read(path: Path) -> Profile:
    """Reads a workload.

    Raises:
        FormatError: a key is missing or its value is none that it may have, an id stands twice, an edge ends
            nowhere or stands twice, the nodes are in a cycle, or a node has no alternative at all.
    """
    with refusing(path, "a Piper workload"):
        return _profile(path.stem, whole_file(parse_json(path.read_bytes())))


def _profile(name: str, data: Record) -> Profile:
    nodes = nodes_by_id(records(data, "nodes", "the file"))
    graph: nx.DiGraph[str] = nx.DiGraph()
    graph.add_nodes_from(nodes)
    for index, edge in enumerate(records(data, "edges", "the file")):
        source, target = edge_ends(edge, index, nodes)
        if graph.has_edge(source, target):
            raise FormatError(f"edge {source} -> {target} of {name!r} stands twice; give one edge")
        graph.add_edge(source, target, bytes=number(edge, "communicationCost", f"edge {source} -> {target}"))
    order = in_order(graph, nodes)
    place = {node: index for index, node in enumerate(nodes)}
    limit = number(data, "maxMemoryPerDevice", "the file")
    ways = {node: _alternatives(node, nodes[node]) for node in order}
    sizes = [number(way, key, where) for each in ways.values() for where, _, way in each for key in _SIZES]
    whole = WholeBytes.of((*sizes, limit))
    return Profile(
        format="piper",
        costs=GraphCosts(
            name=name, layers=tuple(_layer(graph, node, place, nodes[node], ways[node], whole) for node in order)
        ),
        num_devices=count(data, "maxDevices", "the file"),
        memory_bytes=whole.limit(limit),
        unit_bytes=whole.unit,
        bandwidth=number(data, "bandwidth", "the file", is_positive=True) / whole.unit,
        num_microbatches=count(data, "mbsInBatch", "the file"),
        memory="variants",
        reduction="server",
        even_replicas=True,
    )


_Way = tuple[str, int, Record]
"""How messages call an alternative, its degree, and its record."""


def _alternatives(own: str, node: Record) -> list[_Way]:
    """All alternatives of a node, by degree."""
    where, result = f"node {own}", []
    by_degree = mapping(node, "TMPCs", where)
    for degree in by_degree:
        if not degree.isdecimal() or int(degree) < 1:
            raise FormatError(f"{where}: TMPCs has the degree {degree!r}; it must be a whole number of at least 1")
    for degree in sorted(by_degree, key=int):
        for way in records(by_degree, degree, f"TMPCs of {where}"):
            name = identity(way, "id", f"{where}, degree {degree}")
            result.append((f"{where}, degree {degree}, alternative {name!r}", int(degree), way))
    if not result:
        raise FormatError(f"{where} has no alternative in TMPCs; give one for some degree")
    if len({story for story, _, _ in result}) != len(result):
        raise FormatError(f"{where} has two alternatives of the same id and degree")
    return result


def _layer(
    graph: nx.DiGraph[str], own: str, place: Mapping[str, int], node: Record, ways: Sequence[_Way], whole: WholeBytes
) -> LayerCosts:
    before = sorted(graph.predecessors(own), key=place.__getitem__)
    after = sorted(graph.successors(own), key=place.__getitem__)
    variants = tuple(_variant(own, way, before, after, whole) for way in ways)
    plain = variants[0]
    return LayerCosts(
        name=own,
        kind=str(node.get("name", "")),
        inputs=tuple(_tensor(a, own) for a in before),
        outputs=tuple(
            TensorCosts(name=_tensor(own, b), bytes=amount, gradient_bytes=amount)
            for b in after
            for amount in [whole.amount(graph.edges[own, b]["bytes"])]
        ),
        forward_seconds=plain.seconds,
        parameter_bytes=plain.parameter_bytes,
        saved_bytes=plain.saved_bytes,
        variants=variants,
    )


def _variant(own: str, way: _Way, before: list[str], after: list[str], whole: WholeBytes) -> Variant:
    where, degree, record = way
    border = [
        (tensor, amount)
        for key, ends in (("syncTimeFw", {a: _tensor(a, own) for a in before}),
                          ("syncTimeBw", {b: _tensor(own, b) for b in after}))
        for end, tensor in ends.items()
        for amount in [_sync(record, key, end, where)]
        if amount
    ]  # fmt: skip
    return Variant(
        name=identity(record, "id", where),
        degree=degree,
        seconds=number(record, "timePerSample", where),
        parameter_bytes=whole.amount(number(record, "parameterSize", where)),
        resident_bytes=whole.amount(number(record, "memoryUsageB", where)),
        saved_bytes=whole.amount(number(record, "memoryUsageA", where)),
        border_bytes=tuple((tensor, whole.amount(2 * amount)) for tensor, amount in border),
    )


def _sync(record: Record, key: str, end: str, where: str) -> float:
    """Bytes beside the edge to or from a node, 0 where nothing is said."""
    amounts = mapping(record, key, where, {})
    return checked(amounts.get(end, 0), f"{where}: {key}[{end}]={amounts.get(end)!r}")


def _tensor(source: str, target: str) -> str:
    return f"{source}:{target}"
