"""The layers as searches see them: grouped into atoms, as arrays.

An atom is a set of layers that every valid partition keeps on one stage: a colocated group, and
whatever a cycle through such groups ties together. The atoms of ordered layers form a DAG, and
a partition is a chain of its ideals. Nothing here knows devices or seconds of transfers.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from pipeflow.graphs.costs import GraphCosts, LayerCosts

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

Cut = Sequence[tuple[Sequence[int], Sequence[int]]]
"""(atoms, devices) of each stage, in order."""


@dataclass(frozen=True, slots=True)
class Net:
    """Something that moves if its atoms are not all on one stage: an activation, or a gradient.

    Attributes:
        producer: the atom that computes the activation.
        readers: other atoms that read it (for a gradient: those that backward passes through), sorted.
        bytes: of one message.
        is_activation: whether a receiving stage keeps it in memory.
    """

    producer: int
    readers: tuple[int, ...]
    bytes: int
    is_activation: bool

    @property
    def ends(self) -> tuple[int, ...]:
        return (self.producer, *self.readers)


@dataclass(frozen=True)
class Atoms:
    """Atoms in a topological order of their ordered edges, by the graph's order where free.

    Attributes:
        members: layer names of each atom, in the graph's order.
        edges: (a, b) with a before b: b reads what a writes, both ordered.
        bound: whether the order of stages binds the atom; unbound atoms may go anywhere.
        nets: what moves between atoms.
        layers: of each atom, with their costs.
    """

    members: tuple[tuple[str, ...], ...]
    edges: tuple[tuple[int, int], ...]
    bound: tuple[bool, ...]
    nets: tuple[Net, ...]
    layers: tuple[tuple[LayerCosts, ...], ...]

    @property
    def count(self) -> int:
        return len(self.members)

    @cached_property
    def parameter_bytes(self) -> Ints:
        return np.array([sum(c.parameter_bytes for c in group) for group in self.layers], dtype=np.int64)

    @cached_property
    def saved_bytes(self) -> Ints:
        return np.array([sum(c.saved_bytes for c in group) for group in self.layers], dtype=np.int64)

    @cached_property
    def replicable(self) -> NDArray[np.bool_]:
        return np.array([all(c.replicable for c in group) for group in self.layers], dtype=np.bool_)

    @cached_property
    def predecessors(self) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(sorted(a for a, _ in group)) for group in self._incident(1))

    @cached_property
    def successors(self) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(sorted(b for _, b in group)) for group in self._incident(0))

    def _incident(self, end: int) -> list[list[tuple[int, int]]]:
        result: list[list[tuple[int, int]]] = [[] for _ in self.members]
        for edge in self.edges:
            result[edge[end]].append(edge)
        return result

    @cached_property
    def has_one_order(self) -> bool:
        """Whether the atoms have a single topological order, so that every partition cuts it."""
        steps = set(self.edges)
        return all(self.bound) and all((a, a + 1) in steps for a in range(self.count - 1))

    def names(self, atoms: Sequence[int], position_by_layer: Mapping[str, int]) -> tuple[str, ...]:
        """The layers of some atoms, in the graph's order."""
        names = [name for atom in atoms for name in self.members[atom]]
        return tuple(sorted(names, key=position_by_layer.__getitem__))


def find_atoms(
    costs: GraphCosts, unordered: frozenset[str] = frozenset(), together: tuple[tuple[str, ...], ...] = ()
) -> Atoms:
    """Groups the layers of `costs` into atoms.

    Args:
        costs: the graph.
        unordered: layers that the order of the stages does not bind.
        together: groups that must share a stage, beside the colocated ones.
    """
    graph: nx.DiGraph[str] = nx.DiGraph()
    graph.add_nodes_from(layer.name for layer in costs.layers)
    ordered = [(a, b) for a, b in costs.graph.edges if a not in unordered and b not in unordered]
    graph.add_edges_from(ordered)
    for group in (g for g in (*costs.colocated, *together) if len(g) > 1):
        graph.add_edges_from(zip(group, (*group[1:], group[0]), strict=True))
    position = costs.position_by_layer
    components = [sorted(c, key=position.__getitem__) for c in nx.strongly_connected_components(graph)]
    components.sort(key=lambda c: position[c[0]])
    component_of = {name: index for index, names in enumerate(components) for name in names}
    pairs = {(component_of[a], component_of[b]) for a, b in ordered}
    order = _topological_order(len(components), [(a, b) for a, b in pairs if a != b])
    rank = {component: place for place, component in enumerate(order)}
    atom_of = {name: rank[component] for name, component in component_of.items()}
    members = tuple(tuple(components[c]) for c in order)
    return Atoms(
        members=members,
        edges=tuple(sorted((rank[a], rank[b]) for a, b in pairs if a != b)),
        bound=tuple(any(name not in unordered for name in names) for names in members),
        nets=_nets(costs, atom_of),
        layers=tuple(tuple(costs.layer_by_name[name] for name in names) for names in members),
    )


def _topological_order(count: int, edges: Sequence[tuple[int, int]]) -> list[int]:
    """Kahn's order, the smallest index first among those that are ready."""
    following: list[list[int]] = [[] for _ in range(count)]
    waiting = [0] * count
    for a, b in edges:
        following[a].append(b)
        waiting[b] += 1
    ready = [index for index in range(count) if not waiting[index]]
    order = []
    while ready:
        index = heapq.heappop(ready)
        order.append(index)
        for b in following[index]:
            waiting[b] -= 1
            if not waiting[b]:
                heapq.heappush(ready, b)
    assert len(order) == count, "strongly connected components left a cycle"
    return order


def _nets(costs: GraphCosts, atom_of: Mapping[str, int]) -> tuple[Net, ...]:
    nets = []
    for name, producer in costs.producer_by_tensor.items():
        tensor, source = costs.tensor_by_name[name], atom_of[producer]
        readers = costs.consumers_by_tensor[name]
        others = tuple(sorted({atom_of[r] for r in readers} - {source}))
        if others:
            nets.append(Net(source, others, tensor.bytes, True))
        learners = {atom_of[r] for r in readers if costs.layer_by_name[r].has_backward}
        others = tuple(sorted(learners - {source}))
        if others and tensor.gradient_bytes:
            nets.append(Net(source, others, tensor.gradient_bytes, False))
    return tuple(nets)
