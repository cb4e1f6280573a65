"""Workloads of Piper (NeurIPS 2021): JSON with alternatives for every node and degree.

Read are the alternatives without tensor parallelism (degree 1) and without recomputation
(`vanilla`). Times are seconds per sample. Of the memory, `memoryUsageA` is held for each
micro-batch in flight; `memoryUsageB` is parameters with their state, which becomes the least ratio
of state to parameters that covers every node.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import networkx as nx

from pipeflow.errors import FormatError
from pipeflow.graphs.costs import GraphCosts, LayerCosts, TensorCosts
from pipeflow.graphs.formats.profile import Profile, refusing


def read(path: Path) -> Profile:
    """Reads a workload.

    Raises:
        FormatError: a key is missing or of the wrong type, an edge ends nowhere, the nodes are in a
            cycle, or a node has no alternative of degree 1 without recomputation.
    """
    with refusing(path, "a Piper workload"):
        return _profile(path.stem, json.loads(path.read_bytes()))


def _profile(name: str, data: Mapping[str, Any]) -> Profile:
    nodes = {node["id"]: _plain(node) for node in data["nodes"]}
    kinds = {node["id"]: node["name"] for node in data["nodes"]}
    graph: nx.DiGraph[int] = nx.DiGraph()
    graph.add_nodes_from(nodes)
    moved: dict[int, int] = {}
    for edge in data["edges"]:
        source, target = edge["sourceId"], edge["destId"]
        if source not in nodes or target not in nodes:
            raise FormatError(f"edge {source} -> {target} of {name!r} ends at a node that does not exist")
        graph.add_edge(source, target)
        moved[source] = max(moved.get(source, 0), math.ceil(edge["communicationCost"]))
    if not nx.is_directed_acyclic_graph(graph):
        raise FormatError(f"the nodes of {name!r} are in a cycle: {nx.find_cycle(graph)[:4]}")
    place = {node: index for index, node in enumerate(nodes)}
    layers = tuple(
        LayerCosts(
            name=str(node),
            kind=kinds[node],
            inputs=tuple(str(p) for p in sorted(graph.predecessors(node), key=place.__getitem__)),
            outputs=(TensorCosts(name=str(node), bytes=moved.get(node, 0), gradient_bytes=moved.get(node, 0)),),
            forward_seconds=float(nodes[node]["timePerSample"]),
            parameter_bytes=math.ceil(nodes[node]["parameterSize"]),
            saved_bytes=math.ceil(nodes[node]["memoryUsageA"]),
        )
        for node in nx.lexicographical_topological_sort(graph, key=place.__getitem__)
    )
    ratios = [n["memoryUsageB"] / n["parameterSize"] - 1 for n in nodes.values() if n["parameterSize"]]
    return Profile(
        format="piper",
        costs=GraphCosts(name=name, layers=layers),
        num_devices=data["maxDevices"],
        memory_bytes=math.floor(data["maxMemoryPerDevice"]),
        bandwidth=data["bandwidth"],
        num_microbatches=data["mbsInBatch"],
        state_ratio=max(0.0, *ratios, 0.0),
    )


def _plain(node: Mapping[str, Any]) -> Mapping[str, Any]:
    """The alternative of a node without tensor parallelism and without recomputation."""
    for alternative in node["TMPCs"].get("1", ()):
        if alternative["id"] == "vanilla":
            plain: Mapping[str, Any] = alternative
            return plain
    raise FormatError(f"node {node['id']} has no 'vanilla' alternative of degree 1")
