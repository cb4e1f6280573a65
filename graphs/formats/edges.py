"""Nodes and edges of a file as a graph, in the file's order; what is no such graph is refused by name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import networkx as nx

from pipeflow.errors import FormatError
from pipeflow.graphs.formats.fields import Record, identity


def nodes_by_id(nodes: Sequence[Record]) -> dict[str, Record]:
    """The nodes by their `id`.

    Raises:
        FormatError: there are none, or two have the same id.
    """
    if not nodes:
        raise FormatError("nodes=[]; a graph has at least one node")
    result: dict[str, Record] = {}
    for index, node in enumerate(nodes):
        name = identity(node, "id", f"node {node.get('id', f'number {index}')}")
        if name in result:
            raise FormatError(f"node {name}: id={node['id']!r} is the same id as another node's; ids must be unique")
        result[name] = node
    return result


def edge_ends(edge: Record, index: int, known: Iterable[str]) -> tuple[str, str]:
    """The nodes that an edge joins.

    Raises:
        FormatError: it ends at none of those that are known.
    """
    where = f"edge number {index}"
    source, target = identity(edge, "sourceId", where), identity(edge, "destId", where)
    for end, key in ((source, "sourceId"), (target, "destId")):
        if end not in known:
            raise FormatError(f"edge {source} -> {target}: {key}={end} is a node that does not exist")
    return source, target


def in_order(graph: nx.DiGraph[str], names: Iterable[str]) -> list[str]:
    """A topological order, by the given order where it is free.

    Raises:
        FormatError: the nodes are in a cycle.
    """
    if not nx.is_directed_acyclic_graph(graph):
        cycle = " -> ".join(a for a, _ in nx.find_cycle(graph)[:4])
        raise FormatError(f"the nodes are in a cycle: {cycle} -> ...; a graph has none")
    place = {name: index for index, name in enumerate(names)}
    return list(nx.lexicographical_topological_sort(graph, key=place.__getitem__))
