"""Pins that no partition can keep, as far as that shows without a search.

Every atom can be on an interval of stages: an edge keeps the order, an edge between atoms that are
to be apart steps on by one, a pin leaves one stage. Where no number of stages leaves every atom a
stage and every stage an atom of its own, no partition keeps the pins. Seconds and bytes play no part.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping

import networkx as nx

from pipeflow.partitioners.problem import PartitionProblem


def pins_contradict(problem: PartitionProblem) -> bool:
    """Whether no partition can keep the pins, within the limits on stages and replicas."""
    pinned, atoms = problem.pinned, problem.atoms
    if pinned.is_free:
        return False
    if any(a == b for a, b in pinned.apart):
        return True
    if pinned.max_layers is not None and max(pinned.sizes) > pinned.max_layers:
        return True
    for atom, devices in pinned.devices.items():
        most = problem.replica_limit if atoms.replicable[atom] else 1
        if len(devices) > most:
            return True
    steps = _steps(problem)
    counts = [problem.stage_count] if problem.stage_count is not None else range(1, problem.chunked_limit + 1)
    return not any(_is_possible(problem, steps, count) for count in counts)


def _steps(problem: PartitionProblem) -> list[tuple[int, int, int]]:
    """(a, b, n): atom b is at least n stages after a; in the order of a."""
    atoms = problem.atoms
    steps = [(a, b, 0) for a, b in atoms.edges]
    graph: nx.DiGraph[int] = nx.DiGraph(atoms.edges)
    graph.add_nodes_from(range(atoms.count))
    for a, group in _by_first(problem.pinned.apart).items():
        after = nx.descendants(graph, a)
        steps += [(a, b, 1) for b in group if b in after]
    return sorted(steps)


def _by_first(pairs: Iterable[tuple[int, int]]) -> Mapping[int, list[int]]:
    groups: dict[int, list[int]] = {}
    for a, b in pairs:
        groups.setdefault(a, []).append(b)
    return groups


def _is_possible(problem: PartitionProblem, steps: list[tuple[int, int, int]], count: int) -> bool:
    """Whether every atom finds a stage among so many, and every stage an atom, as far as intervals tell."""
    pinned, atoms = problem.pinned, problem.atoms
    if pinned.max_layers is not None and count * pinned.max_layers < pinned.sizes.sum():
        return False
    if any(len(group) > count for group in problem.pins.apart):
        return False
    first, last = [0] * atoms.count, [count - 1] * atoms.count
    for atom, indices in pinned.stages.items():
        places = {index if index >= 0 else count + index for index in indices}
        place = places.pop()
        if places or not 0 <= place < count:
            return False
        if problem.replicas is not None:
            replicas = problem.replicas[place]
            if replicas < len(pinned.devices.get(atom, ())) or (replicas > 1 and not atoms.replicable[atom]):
                return False
        first[atom] = last[atom] = place
    for a, b, n in steps:
        first[b] = max(first[b], first[a] + n)
    for a, b, n in reversed(steps):
        last[a] = min(last[a], last[b] - n)
    return all(a <= b for a, b in zip(first, last, strict=True)) and _fills(first, last, count)


def _fills(first: list[int], last: list[int], count: int) -> bool:
    """Whether every stage can have an atom of its own: the one that must be used up soonest each time."""
    coming = sorted(range(len(first)), key=first.__getitem__, reverse=True)
    open_until: list[int] = []
    for stage in range(count):
        while coming and first[coming[-1]] <= stage:
            heapq.heappush(open_until, last[coming.pop()])
        while open_until and open_until[0] < stage:
            heapq.heappop(open_until)
        if not open_until:
            return False
        heapq.heappop(open_until)
    return True
