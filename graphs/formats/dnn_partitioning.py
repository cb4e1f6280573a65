"""Workloads of "Efficient Algorithms for Device Placement of DNN Graph Operators" (NeurIPS 2020).

JSON with `maxSizePerFPGA`, `maxFPGAs`, `nodes` and `edges`. Times are milliseconds. An edge's
`cost` is the time to move its source's output over a link; here it becomes bytes over a link of
`BANDWIDTH`, fine enough that rounding to whole bytes changes no time by more than 1e-15 s.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import networkx as nx

from pipeflow.errors import FormatError
from pipeflow.graphs.costs import GraphCosts, LayerCosts, TensorCosts
from pipeflow.graphs.formats.profile import Profile, refusing
from pipeflow.values import parse_json

BANDWIDTH = 2.0**50
"""Bytes per second of the link that transfer times are expressed for."""

_MILLISECOND = 1e-3


def read(path: Path, *, edge_scale: float = 1.0) -> Profile:
    """Reads a throughput workload; a training graph has backward nodes, which are `unordered`.

    Args:
        path: of the JSON file.
        edge_scale: multiplies every edge cost.

    Raises:
        FormatError: a key is missing or of the wrong type, an edge ends nowhere, or the nodes
            are in a cycle.
    """
    with refusing(path, "a dnn-partitioning workload"):
        return _profile(path.stem, parse_json(path.read_bytes()), edge_scale)


def _profile(name: str, data: Mapping[str, Any], edge_scale: float) -> Profile:
    nodes = {node["id"]: node for node in data["nodes"]}
    graph: nx.DiGraph[int] = nx.DiGraph()
    graph.add_nodes_from(nodes)
    seconds: dict[int, float] = {}
    for edge in data["edges"]:
        source, target = edge["sourceId"], edge["destId"]
        if source not in nodes or target not in nodes:
            raise FormatError(f"edge {source} -> {target} of {name!r} ends at a node that does not exist")
        graph.add_edge(source, target)
        seconds[source] = max(seconds.get(source, 0.0), float(edge["cost"]) * edge_scale * _MILLISECOND)
    if not nx.is_directed_acyclic_graph(graph):
        raise FormatError(f"the nodes of {name!r} are in a cycle: {nx.find_cycle(graph)[:4]}")
    place = {node: index for index, node in enumerate(nodes)}
    order = list(nx.lexicographical_topological_sort(graph, key=place.__getitem__))
    colours: dict[Any, list[str]] = {}
    for node in order:
        if nodes[node].get("colorClass") is not None:
            colours.setdefault(nodes[node]["colorClass"], []).append(str(node))
    layers = tuple(
        LayerCosts(
            name=str(node),
            inputs=tuple(str(p) for p in sorted(graph.predecessors(node), key=place.__getitem__)),
            outputs=(TensorCosts(name=str(node), bytes=round(seconds.get(node, 0.0) * BANDWIDTH)),),
            # What the accelerators cannot run is refused by name later, whatever its latency says.
            forward_seconds=float(nodes[node]["fpgaLatency"]) * _MILLISECOND if nodes[node]["supportedOnFpga"] else 0.0,
            parameter_bytes=math.ceil(nodes[node]["size"]),
        )
        for node in order
    )
    return Profile(
        format="dnn-partitioning",
        costs=GraphCosts(
            name=name, layers=layers, colocated=tuple(tuple(group) for group in colours.values() if len(group) > 1)
        ),
        seconds_per_unit=_MILLISECOND,
        num_devices=max(1, int(data["maxFPGAs"])),
        memory_bytes=math.floor(data["maxSizePerFPGA"]),
        bandwidth=BANDWIDTH,
        unordered=tuple(str(node) for node in order if nodes[node]["isBackwardNode"]),
        unsupported=tuple(str(node) for node in order if not nodes[node]["supportedOnFpga"]),
        memory="sizes",
        sends_once=True,
        num_microbatches=1,
    )
