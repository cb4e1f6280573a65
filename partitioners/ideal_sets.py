"""Which ideals to cut a graph at where a programme over pairs of ideals is to stay affordable.

All of them where there are few; otherwise those that the widest source leads through, each with all
that it needs and nothing else, and the prefixes of some orders; then those near the cuts of the best
partition known. It knows no costs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random
from typing import NamedTuple

import networkx as nx

from pipeflow.partitioners.lattice import enumerate_ideals
from pipeflow.partitioners.orders import draw_order
from pipeflow.partitioners.problem import PartitionProblem

_MOST_ORDERS = 8


class IdealSet(NamedTuple):
    """Ideals as bit masks, the empty and the whole one among them.

    Attributes:
        masks: the ideals.
        is_all: whether the graph has no others, so that nothing better is missed.
    """

    masks: list[int]
    is_all: bool


def sets_of_ideals(problem: PartitionProblem, most: int, work: int) -> Iterator[IdealSet]:
    """Sets of ideals to look at, each on its own; at least one.

    Args:
        problem: all of whose atoms are bound.
        most: ideals of one set, unless it is the prefixes of an order.
        work: triples of ideals that are worth their time over all orders.
    """
    every = enumerate_ideals(problem, most)
    if every is not None:
        yield IdealSet(every, is_all=True)
        return
    if through := _through_widest_source(problem, most):
        yield IdealSet(through, is_all=False)
    atoms = problem.atoms
    affordable = work // ((atoms.count + 1) ** 3 // 6)
    for kind in range(max(1, min(_MOST_ORDERS, affordable))):
        order = list(range(atoms.count))
        if kind:
            order = draw_order(atoms, [order], Random(kind), kind)
        masks = [0]
        for atom in order:
            masks.append(masks[-1] | 1 << atom)
        yield IdealSet(masks, is_all=False)


def ideals_near(problem: PartitionProblem, cuts: Sequence[int], most: int) -> list[int]:
    """The ideals that differ from one of `cuts` by the fewest atoms, as many for each; `most` about.

    Args:
        problem: all of whose atoms are bound.
        cuts: ideals, the empty and the whole one among them.
    """
    atoms = problem.atoms
    before = [sum(1 << a for a in group) for group in atoms.predecessors]
    after = [sum(1 << a for a in group) for group in atoms.successors]
    found = set(cuts)
    for cut in cuts:
        near = [cut]
        seen = {cut}
        for mask in near:
            if len(near) >= most // len(cuts):
                break
            for atom in range(atoms.count):
                other = mask ^ 1 << atom
                is_ideal = not (after[atom] & mask if mask >> atom & 1 else before[atom] & ~mask)
                if is_ideal and other not in seen:
                    seen.add(other)
                    near.append(other)
        found.update(near)
    return sorted(found)


def _through_widest_source(problem: PartitionProblem, most: int) -> list[int] | None:
    """The ideals of the atoms after one source, each with all that they need; None if they are too many."""
    graph: nx.DiGraph[int] = nx.DiGraph(problem.atoms.edges)
    graph.add_nodes_from(range(problem.atoms.count))
    sources = [atom for atom in sorted(graph) if not graph.in_degree(atom)]
    among = max((nx.descendants(graph, source) | {source} for source in sources), key=len)
    masks = enumerate_ideals(problem, most, among)
    if masks is None:
        return None
    needed = {atom: sum(1 << a for a in nx.ancestors(graph, atom) | {atom}) for atom in among}
    whole = set()
    for mask in masks:
        needs = 0
        for atom in among:
            if mask >> atom & 1:
                needs |= needed[atom]
        whole.add(needs)
    return sorted(whole | {(1 << problem.atoms.count) - 1})
