"""Workloads of Piper (NeurIPS 2021): JSON with alternatives for every node and degree.

Each alternative becomes a `Variant` of its layer, under its own name and degree of tensor parallelism.
Times are seconds per sample, which is a micro-batch. Of the memory, `memoryUsageA` is held for each
micro-batch in flight and `memoryUsageB` whatever is in flight. Every edge is a tensor of its own, for
each costs by itself; `syncTimeFw` and `syncTimeBw` are bytes that the devices of a replica move on top
where an edge enters or leaves their stage, there and back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import networkx as nx

from pipeflow.errors import FormatError
from pipeflow.graphs.costs import GraphCosts, LayerCosts, TensorCosts, Variant
from pipeflow.graphs.formats.profile import Profile, refusing
from pipeflow.values import parse_json


def read(path: Path) -> Profile:
    """Reads a workload.

    Raises:
        FormatError: a key is missing or of the wrong type, an edge ends nowhere or stands twice, the
            nodes are in a cycle, or a node has no alternative at all.
    """
    with refusing(path, "a Piper workload"):
        return _profile(path.stem, parse_json(path.read_bytes()))


def _profile(name: str, data: Mapping[str, Any]) -> Profile:
    nodes = {node["id"]: node for node in data["nodes"]}
    if len(nodes) != len(data["nodes"]):
        raise FormatError(f"two nodes of {name!r} have the same id")
    graph: nx.DiGraph[int] = nx.DiGraph()
    graph.add_nodes_from(nodes)
    for edge in data["edges"]:
        source, target = edge["sourceId"], edge["destId"]
        if source not in nodes or target not in nodes:
            raise FormatError(f"edge {source} -> {target} of {name!r} ends at a node that does not exist")
        if graph.has_edge(source, target):
            raise FormatError(f"edge {source} -> {target} of {name!r} stands twice")
        graph.add_edge(source, target, bytes=math.ceil(edge["communicationCost"]))
    if not nx.is_directed_acyclic_graph(graph):
        raise FormatError(f"the nodes of {name!r} are in a cycle: {nx.find_cycle(graph)[:4]}")
    place = {node: index for index, node in enumerate(nodes)}
    order = nx.lexicographical_topological_sort(graph, key=place.__getitem__)
    return Profile(
        format="piper",
        costs=GraphCosts(name=name, layers=tuple(_layer(graph, nodes[node], place) for node in order)),
        num_devices=data["maxDevices"],
        memory_bytes=math.floor(data["maxMemoryPerDevice"]),
        bandwidth=data["bandwidth"],
        num_microbatches=data["mbsInBatch"],
        memory="variants",
        reduction="server",
        even_replicas=True,
    )


def _layer(graph: nx.DiGraph[int], node: Mapping[str, Any], place: Mapping[int, int]) -> LayerCosts:
    own = node["id"]
    before = sorted(graph.predecessors(own), key=place.__getitem__)
    after = sorted(graph.successors(own), key=place.__getitem__)
    variants = tuple(
        _variant(own, int(degree), alternative, before, after)
        for degree, alternatives in sorted(node["TMPCs"].items(), key=lambda item: int(item[0]))
        for alternative in alternatives
    )
    if not variants:
        raise FormatError(f"node {own} has no alternative")
    if len({(v.name, v.degree) for v in variants}) != len(variants):
        raise FormatError(f"node {own} has two alternatives of the same id and degree")
    plain = variants[0]
    return LayerCosts(
        name=str(own),
        kind=str(node.get("name", "")),
        inputs=tuple(_tensor(a, own) for a in before),
        outputs=tuple(
            TensorCosts(name=_tensor(own, b), bytes=amount, gradient_bytes=amount)
            for b in after
            for amount in [graph.edges[own, b]["bytes"]]
        ),
        forward_seconds=plain.seconds,
        parameter_bytes=plain.parameter_bytes,
        saved_bytes=plain.saved_bytes,
        variants=variants,
    )


def _variant(own: int, degree: int, data: Mapping[str, Any], before: list[int], after: list[int]) -> Variant:
    entering, leaving = data.get("syncTimeFw", {}), data.get("syncTimeBw", {})
    border = [(_tensor(a, own), entering.get(str(a), 0)) for a in before]
    border += [(_tensor(own, b), leaving.get(str(b), 0)) for b in after]
    return Variant(
        name=data["id"],
        degree=degree,
        seconds=float(data["timePerSample"]),
        parameter_bytes=math.ceil(data["parameterSize"]),
        resident_bytes=math.ceil(data["memoryUsageB"]),
        saved_bytes=math.ceil(data["memoryUsageA"]),
        border_bytes=tuple((tensor, math.ceil(2 * amount)) for tensor, amount in border if amount),
    )


def _tensor(source: int, target: int) -> str:
    return f"{source}:{target}"
