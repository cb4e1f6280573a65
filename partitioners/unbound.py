"""What a stage pays at least for the atoms that the order of stages does not bind.

A training graph has backward layers without a forward one: they may be on any stage, and pass
gradients between atoms that are bound. Groups of unbound atoms that exchange something are small. For
given bound atoms X of a stage, such a group U costs it

    min over the parts V of U that it may hold:  compute of V + transfers that its border (X and V) cuts

whatever other stages do. That depends on X only through how many of the bound ends of each of the
group's nets are in X: none, some, or all. So it is a table over these states, filled once; a stage's
sum over all groups is a lower bound of what it pays, since stages choose their parts each for itself.

It holds where transfers are added to compute. What an unbound atom holds in memory is not counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import NamedTuple

import networkx as nx
import numpy as np

from pipeflow.partitioners.atoms import Atoms, Floats, Ints, Net
from pipeflow.partitioners.objective import compute_seconds
from pipeflow.partitioners.problem import PartitionProblem

_MOST_ENTRIES = 200_000
"""Entries of one group's table, times the parts that are tried for each. A larger group is not counted."""

_NONE, _SOME, _ALL = range(3)


class _GroupNet(NamedTuple):
    """A net of a group: its unbound ends, by position in the group; its bound ends; its seconds."""

    inside: tuple[int, ...]
    outside: tuple[int, ...]
    seconds: float


@dataclass(frozen=True)
class UnboundGroup:
    """Unbound atoms that exchange something, and the table of what they cost a stage.

    Attributes:
        nets: the bound ends of each net that has any; states are in their order, the first the slowest.
        table: seconds, by state.
        counted: the nets of the problem that are in the table.
    """

    nets: tuple[tuple[int, ...], ...]
    table: Floats
    counted: frozenset[Net]

    def seconds(self, counts: Sequence[Ints]) -> Floats:
        """What the group costs at least.

        Args:
            counts: for each of `nets`, how many of its ends are in each of several stages.
        """
        state = np.zeros(len(counts[0]), dtype=np.int64)
        for ends, count in zip(self.nets, counts, strict=True):
            state = state * 3 + np.where(count == 0, _NONE, np.where(count == len(ends), _ALL, _SOME))
        result: Floats = self.table[state]
        return result


def unbound_groups(problem: PartitionProblem) -> list[UnboundGroup]:
    """The groups of unbound atoms of a problem that cost a stage something, where they can be counted."""
    atoms = problem.atoms
    if problem.transfers != "added" or all(atoms.bound):
        return []
    result = []
    for group in _components(atoms):
        nets = _nets(problem, group)
        bound = [net for net in nets if net.outside]
        if bound and 3 ** len(bound) * 2 ** len(group) <= _MOST_ENTRIES:
            counted = frozenset(net for net in atoms.nets if not set(group).isdisjoint(net.ends))
            table = _table(problem, group, nets)
            result.append(UnboundGroup(tuple(net.outside for net in bound), table, counted))
    return result


def _components(atoms: Atoms) -> list[list[int]]:
    graph: nx.Graph[int] = nx.Graph()
    graph.add_nodes_from(atom for atom in range(atoms.count) if not atoms.bound[atom])
    for net in atoms.nets:
        free = [end for end in net.ends if not atoms.bound[end]]
        graph.add_edges_from(pairwise(free))
    return sorted(sorted(component) for component in nx.connected_components(graph))


def _nets(problem: PartitionProblem, group: Sequence[int]) -> list[_GroupNet]:
    """The nets that touch the group; those of the same ends are one."""
    atoms, (bandwidth, latency) = problem.atoms, problem.transfer_link
    position = {atom: index for index, atom in enumerate(group)}
    sums: dict[tuple[tuple[int, ...], tuple[int, ...]], float] = {}
    for net in atoms.nets:
        inside = tuple(sorted(position[end] for end in net.ends if end in position))
        if inside:
            outside = tuple(sorted(end for end in net.ends if end not in position))
            sums[inside, outside] = sums.get((inside, outside), 0.0) + latency + net.bytes / bandwidth
    return [_GroupNet(inside, outside, seconds) for (inside, outside), seconds in sorted(sums.items())]


def _table(problem: PartitionProblem, group: Sequence[int], nets: Sequence[_GroupNet]) -> Floats:
    device = problem.cluster.devices[0]
    seconds = [compute_seconds(problem.atoms.layers[atom], device) for atom in group]
    parts = list(product((False, True), repeat=len(group)))
    states = list(product((_NONE, _SOME, _ALL), repeat=sum(bool(net.outside) for net in nets)))
    state_of = np.array(states).reshape(len(states), -1)
    best = np.full(len(states), np.inf)
    for part in parts:
        cost = np.full(len(states), math.fsum(s for s, here in zip(seconds, part, strict=True) if here))
        column = 0
        for net in nets:
            held = sum(part[i] for i in net.inside)
            if not net.outside:
                cost += net.seconds * (0 < held < len(net.inside))
                continue
            state = state_of[:, column]
            column += 1
            touched = (state != _NONE) | (held > 0)
            whole = (state == _ALL) & (held == len(net.inside))
            cost += net.seconds * (touched & ~whole)
        np.minimum(best, cost, out=best)
    return best
