"""Workloads of "Efficient Algorithms for Device Placement of DNN Graph Operators" (NeurIPS 2020).

JSON with `maxSizePerFPGA`, `maxFPGAs`, `nodes` and `edges`. Times are milliseconds. An edge's
`cost` is the time to move its source's output over a link; here it becomes bytes over a link of
`BANDWIDTH`, fine enough that rounding to whole bytes changes no time by more than 1e-15 s
where transfers last neither for minutes nor for less than microseconds.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import networkx as nx

from pipeflow.errors import FormatError
from pipeflow.graphs.costs import GraphCosts, LayerCosts, TensorCosts
from pipeflow.graphs.formats.edges import edge_ends, in_order, nodes_by_id
from pipeflow.graphs.formats.fields import Record, flag, number, records, value, whole_file
from pipeflow.graphs.formats.fields import count as whole_number
from pipeflow.graphs.formats.profile import Profile, refusing
from pipeflow.graphs.formats.whole_bytes import WholeBytes
from pipeflow.values import parse_json

BANDWIDTH = 2.0**50
"""Bytes per second of the link that transfer times are expressed for; less where they last for minutes, more
where they last for less than a microsecond."""

_MOST_SECONDS = 2.0**6
"""Of all transfers together, up to which their bytes at `BANDWIDTH` can be added up as whole numbers."""

_FEWEST_SECONDS = 2.0**-24
"""Below, bytes at `BANDWIDTH` are too few to tell transfers apart."""

_MOST_DOUBLINGS = 900
"""Of `BANDWIDTH`, within what numbers hold."""

_MILLISECOND = 1e-3

_ALIKE = 1e-9
"""Costs of one source's edges that differ by no more, relatively, are the same."""


def read(path: Path, *, edge_scale: float = 1.0) -> Profile:
    """Reads a throughput workload; a training graph has backward nodes, which are `unordered`.

    Args:
        path: of the JSON file.
        edge_scale: multiplies every edge cost.

    Raises:
        FormatError: a key is missing or its value is none that it may have, an id stands twice, an edge ends
            nowhere, edges of one source have different costs, or the nodes are in a cycle.
    """
    with refusing(path, "a dnn-partitioning workload"):
        return _profile(path.stem, whole_file(parse_json(path.read_bytes())), edge_scale)


def _profile(name: str, data: Record, edge_scale: float) -> Profile:
    edges = records(data, "edges", "the file")
    nodes = nodes_by_id(records(data, "nodes", "the file"))
    graph, milliseconds = _edges(edges, nodes)
    order = in_order(graph, nodes)
    place = {node: index for index, node in enumerate(nodes)}
    seconds = {node: cost * edge_scale * _MILLISECOND for node, cost in milliseconds.items()}
    bandwidth = _bandwidth(math.fsum(seconds.values()))
    sizes = {node: number(nodes[node], "size", f"node {node}") for node in order}
    limit = number(data, "maxSizePerFPGA", "the file")
    whole = WholeBytes.of((*sizes.values(), limit))
    supported = {node: flag(nodes[node], "supportedOnFpga", f"node {node}", default=True) for node in order}
    layers = tuple(
        LayerCosts(
            name=node,
            inputs=tuple(sorted(graph.predecessors(node), key=place.__getitem__)),
            outputs=(TensorCosts(name=node, bytes=round(seconds.get(node, 0.0) * bandwidth)),),
            # What the accelerators cannot run is refused by name later, whatever its latency says.
            forward_seconds=number(nodes[node], "fpgaLatency", f"node {node}") * _MILLISECOND
            if supported[node]
            else 0.0,
            parameter_bytes=whole.amount(sizes[node]),
        )
        for node in order
    )
    return Profile(
        format="dnn-partitioning",
        costs=GraphCosts(name=name, layers=layers, colocated=_colocated(nodes, order)),
        seconds_per_unit=_MILLISECOND,
        num_devices=whole_number(data, "maxFPGAs", "the file"),
        memory_bytes=whole.limit(limit),
        unit_bytes=whole.unit,
        bandwidth=bandwidth,
        times_transfers=True,
        unordered=tuple(n for n in order if flag(nodes[n], "isBackwardNode", f"node {n}", default=False)),
        unsupported=tuple(node for node in order if not supported[node]),
        memory="sizes",
        sends_once=True,
        num_microbatches=1,
    )


def _edges(edges: list[Record], nodes: dict[str, Record]) -> tuple[nx.DiGraph[str], dict[str, float]]:
    """The graph, and what moving its output costs a node, in the file's milliseconds."""
    graph: nx.DiGraph[str] = nx.DiGraph()
    graph.add_nodes_from(nodes)
    costs: dict[str, float] = {}
    for index, edge in enumerate(edges):
        source, target = edge_ends(edge, index, nodes)
        cost = number(edge, "cost", f"edge {source} -> {target}")
        known = costs.setdefault(source, cost)
        if not math.isclose(known, cost, rel_tol=_ALIKE):
            raise FormatError(
                f"edge {source} -> {target}: cost={cost}, but another edge of node {source} has cost={known}; the cost "
                "moves the node's one output, so give all its edges the same"
            )
        graph.add_edge(source, target)
    return graph, costs


def _bandwidth(seconds: float) -> float:
    """Of the link for transfers that last so long in all."""
    if not math.isfinite(seconds):
        raise FormatError(f"the edges' costs add up to {seconds}; give finite ones")
    if seconds == 0.0 or _FEWEST_SECONDS <= seconds <= _MOST_SECONDS:
        return BANDWIDTH
    excess = math.frexp(seconds)[1] - math.frexp(_MOST_SECONDS)[1] + 1
    return math.ldexp(BANDWIDTH, min(-excess, _MOST_DOUBLINGS))


def _colocated(nodes: dict[str, Record], order: list[str]) -> tuple[tuple[str, ...], ...]:
    colours: dict[Any, list[str]] = {}
    for node in order:
        colour = value(nodes[node], "colorClass", f"node {node}", None)
        if isinstance(colour, list | dict):
            raise FormatError(f"node {node}: colorClass={colour}; it must be a number or a name")
        if colour is not None:
            colours.setdefault(colour, []).append(node)
    return tuple(tuple(group) for group in colours.values() if len(group) > 1)
