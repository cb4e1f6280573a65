"""Profiles of PipeDream (SOSP 2019): text, one node or one edge a line.

    node4 -- Linear(...) -- forward_compute_time=1.5, backward_compute_time=3.0, activation_size=4.0, parameter_size=8.0
            node4 -- node5

Times are milliseconds; an activation size may be a list, which counts in sum. `Input` nodes cost
nothing and become inputs of the graph.
"""

from __future__ import annotations

import re
from pathlib import Path

import networkx as nx

from pipeflow.errors import FormatError
from pipeflow.graphs.costs import GraphCosts, LayerCosts, TensorCosts
from pipeflow.graphs.formats.profile import Profile, refusing

_MILLISECOND = 1e-3
_FIELD = re.compile(r"(\w+)=(\[[^\]]*\]|[^,]+)")
_TIMES_AND_SIZES = ("forward_compute_time", "backward_compute_time", "activation_size", "parameter_size")


def read(path: Path) -> Profile:
    """Reads a profile.

    Raises:
        FormatError: a line is neither a node nor an edge, a value is missing or no number, an
            edge ends nowhere, or the nodes are in a cycle.
    """
    with refusing(path, "a PipeDream profile"):
        return _profile(path, path.read_text(encoding="utf-8-sig"))


def _profile(path: Path, text: str) -> Profile:
    descriptions: dict[str, str] = {}
    values: dict[str, dict[str, float]] = {}
    graph: nx.DiGraph[str] = nx.DiGraph()
    for number, line in enumerate(text.splitlines(), 1):
        parts = [part.strip() for part in line.split(" -- ")]
        if not line.strip():
            continue
        if line[0].isspace() and len(parts) == 2:
            graph.add_edge(parts[0], parts[1])
        elif len(parts) >= 3:
            # A partitioned graph has ` -- stage_id=...` at the end of its lines.
            last = len(parts) - (2 if parts[-1].startswith("stage_id=") else 1)
            descriptions[parts[0]], values[parts[0]] = " -- ".join(parts[1:last]), _values(path, number, parts[last])
            graph.add_node(parts[0])
        else:
            raise FormatError(f"{path}:{number}: {line.strip()!r} is neither a node nor an edge of a PipeDream profile")
    if lost := [node for node in graph if node not in values]:
        raise FormatError(f"{path}: an edge ends at {lost[0]!r}, which is no node")
    if not values:
        raise FormatError(f"{path} has no nodes; is it a PipeDream profile?")
    if not nx.is_directed_acyclic_graph(graph):
        raise FormatError(f"{path}: the nodes are in a cycle: {nx.find_cycle(graph)[:4]}")
    return Profile(
        format="pipedream",
        costs=_costs(path.name.split(".")[0], graph, descriptions, values),
        seconds_per_unit=_MILLISECOND,
        memory="stashes",
        nested=True,
        transfers="free",
        reduction="server",
        reduce_every="microbatch",
    )


def _values(path: Path, number: int, text: str) -> dict[str, float]:
    found = dict(_FIELD.findall(text))
    try:
        return {key: sum(float(x) for x in found[key].strip("[]").split(";") if x.strip()) for key in _TIMES_AND_SIZES}
    except (KeyError, ValueError) as error:
        raise FormatError(f"{path}:{number}: {error} in {text!r}; a node has {', '.join(_TIMES_AND_SIZES)}") from error


def _costs(
    name: str, graph: nx.DiGraph[str], descriptions: dict[str, str], values: dict[str, dict[str, float]]
) -> GraphCosts:
    place = {node: index for index, node in enumerate(values)}
    inputs = {n for n in values if descriptions[n].startswith("Input") and not graph.in_degree(n)}
    order = nx.lexicographical_topological_sort(graph, key=place.__getitem__)

    def layer(node: str) -> LayerCosts:
        own = values[node]
        moved = round(own["activation_size"])
        return LayerCosts(
            name=node,
            kind=descriptions[node].partition("(")[0],
            inputs=tuple(sorted(graph.predecessors(node), key=place.__getitem__)),
            outputs=(TensorCosts(name=node, bytes=moved, gradient_bytes=moved),),
            forward_seconds=own["forward_compute_time"] * _MILLISECOND,
            backward_input_seconds=own["backward_compute_time"] * _MILLISECOND,
            parameter_bytes=round(own["parameter_size"]),
            saved_bytes=moved,
        )

    return GraphCosts(
        name=name,
        inputs=tuple(TensorCosts(name=node) for node in values if node in inputs),
        layers=tuple(layer(node) for node in order if node not in inputs),
    )
