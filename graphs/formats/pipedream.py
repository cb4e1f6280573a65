"""Profiles of PipeDream (SOSP 2019): text, one node or one edge a line.

    node4 -- Linear(...) -- forward_compute_time=1.5, backward_compute_time=3.0, activation_size=4.0, parameter_size=8.0
            node4 -- node5

Times are milliseconds; an activation size may be a list, which counts in sum. `Input` nodes cost
nothing and become inputs of the graph. Lines that begin with `#` are comments.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import networkx as nx

from pipeflow.errors import FormatError
from pipeflow.graphs.costs import GraphCosts, LayerCosts, TensorCosts
from pipeflow.graphs.formats.edges import in_order
from pipeflow.graphs.formats.fields import checked
from pipeflow.graphs.formats.profile import Profile, refusing
from pipeflow.graphs.formats.whole_bytes import WholeBytes

_MILLISECOND = 1e-3
_FIELD = re.compile(r"(\w+)=(\[[^\]]*\]|[^,]+)")
_TIMES_AND_SIZES = ("forward_compute_time", "backward_compute_time", "activation_size", "parameter_size")

_Values = Mapping[str, float]


def read(path: Path) -> Profile:
    """Reads a profile.

    Raises:
        FormatError: a line is neither a node nor an edge, a node stands twice, a value is missing or no amount,
            an edge ends nowhere, there is nothing to compute, or the nodes are in a cycle.
    """
    with refusing(path, "a PipeDream profile"):
        return _profile(path, path.read_text(encoding="utf-8-sig"))


def _profile(path: Path, text: str) -> Profile:
    descriptions: dict[str, str] = {}
    values: dict[str, _Values] = {}
    graph: nx.DiGraph[str] = nx.DiGraph()
    for number, line in enumerate(text.splitlines(), 1):
        parts = [part.strip() for part in line.split(" -- ")]
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if line[0].isspace() and len(parts) == 2:
            graph.add_edge(parts[0], parts[1])
        elif len(parts) >= 3:
            # A partitioned graph has ` -- stage_id=...` at the end of its lines.
            last = len(parts) - (2 if parts[-1].startswith("stage_id=") else 1)
            name, where = parts[0], f"{path}:{number}: node {parts[0]}"
            if name in values:
                raise FormatError(f"{where} stands twice; names must be unique")
            descriptions[name], values[name] = " -- ".join(parts[1:last]), _values(where, parts[last])
            graph.add_node(name)
        else:
            raise FormatError(f"{path}:{number}: {line.strip()!r} is neither a node nor an edge of a PipeDream profile")
    if lost := [node for node in graph if node not in values]:
        raise FormatError(f"{path}: an edge ends at {lost[0]!r}, which is no node")
    order = in_order(graph, values)
    inputs = {node for node in values if descriptions[node].startswith("Input") and not graph.in_degree(node)}
    if not values.keys() - inputs:
        raise FormatError(f"{path} has no nodes that compute anything; is it a PipeDream profile?")
    place = {node: index for index, node in enumerate(values)}
    whole = WholeBytes.of(own[key] for own in values.values() for key in ("activation_size", "parameter_size"))
    return Profile(
        format="pipedream",
        costs=GraphCosts(
            name=path.name.split(".")[0],
            inputs=tuple(TensorCosts(name=node) for node in values if node in inputs),
            layers=tuple(
                _layer(
                    node,
                    descriptions[node],
                    values[node],
                    sorted(graph.predecessors(node), key=place.__getitem__),
                    whole,
                )
                for node in order
                if node not in inputs
            ),
        ),
        seconds_per_unit=_MILLISECOND,
        unit_bytes=whole.unit,
        memory="stashes",
        nested=True,
        transfers="free",
        reduction="server",
        reduce_every="microbatch",
    )


def _values(where: str, text: str) -> _Values:
    found = dict(_FIELD.findall(text))
    if lost := [key for key in _TIMES_AND_SIZES if key not in found]:
        raise FormatError(f"{where} has no key {lost[0]!r}; a node has {', '.join(_TIMES_AND_SIZES)}")
    return {key: _amount(f"{where}: {key}={found[key].strip()}", found[key]) for key in _TIMES_AND_SIZES}


def _amount(story: str, text: str) -> float:
    """A number, or the sum of a list of them."""
    inside = text.strip()
    try:
        if not inside.startswith("["):
            return checked(float(inside), story)
        parts = [float(part) for part in re.split(r"[;,]", inside.strip("[]")) if part.strip()]
    except ValueError as error:
        raise FormatError(f"{story}; it must be a finite number of at least 0") from error
    return sum(checked(part, story) for part in parts)


def _layer(name: str, description: str, own: _Values, before: Sequence[str], whole: WholeBytes) -> LayerCosts:
    moved = whole.amount(own["activation_size"])
    return LayerCosts(
        name=name,
        kind=description.partition("(")[0],
        inputs=tuple(before),
        outputs=(TensorCosts(name=name, bytes=moved, gradient_bytes=moved),),
        forward_seconds=own["forward_compute_time"] * _MILLISECOND,
        backward_input_seconds=own["backward_compute_time"] * _MILLISECOND,
        parameter_bytes=whole.amount(own["parameter_size"]),
        saved_bytes=moved,
    )
