"""Fewer atoms for problems too large to search whole: runs of an order, cut where little is open.

Unlike joining (`pipeflow.partitioners.normalise`), this may lose without saying beforehand how much.
The certificate tells it afterwards: its lower bound is one of the whole problem. A partition of the
coarse problem is one of the whole problem, since runs of a topological order can always share a
stage. An atom that a pin names is a run of its own.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pipeflow.partitioners.atoms import Atoms, Floats, Ints
from pipeflow.partitioners.problem import PartitionProblem


def coarsen(problem: PartitionProblem, most: int) -> PartitionProblem:
    """The problem with at most `most` atoms, each a run of the atoms' order.

    The order is walked in `most / 2` windows of equal work, and each window is divided where the fewest
    bytes are open, as well as at its end.
    """
    atoms = problem.atoms
    if atoms.count <= most:
        return problem
    work = np.cumsum([sum(layer.seconds for layer in group) + 1e-12 for group in atoms.layers])
    window = np.minimum((work / work[-1] * (most // 2)).astype(np.int64), most // 2 - 1)
    run = _split(problem, _run_of_atom(window, _open_bytes(atoms)))
    groups: dict[int, list[str]] = {}
    for atom, index in enumerate(run):
        groups.setdefault(int(index), []).extend(atoms.members[atom])
    return replace(problem, together=(*problem.together, *(tuple(g) for g in groups.values() if len(g) > 1)))


def _split(problem: PartitionProblem, run: Ints) -> Ints:
    """The runs, divided around atoms that pins name, and so that no run has more layers than a stage may."""
    pinned = problem.pinned
    if pinned.is_free:
        return run
    starts = np.diff(run, prepend=-1) != 0
    for atom in pinned.fixed:
        starts[atom : atom + 2] = True
    if pinned.max_layers is not None:
        held = 0
        for atom, size in enumerate(pinned.sizes):
            held = size if starts[atom] else held + size
            # A quarter of a stage at most: so that stages can still be filled.
            if held > max(size, pinned.max_layers // 4):
                starts[atom], held = True, size
    return np.cumsum(starts)


def _open_bytes(atoms: Atoms) -> Floats:
    """Bytes of the nets that have ends on both sides of the place after each atom."""
    change = np.zeros(atoms.count + 1)
    for net in atoms.nets:
        change[min(net.ends)] += net.bytes
        change[max(net.ends)] -= net.bytes
    return np.cumsum(change)[: atoms.count]


def _run_of_atom(window: Ints, opened: Floats) -> Ints:
    """The run of every atom: two for each window, divided after its atom with the fewest bytes open."""
    starts = np.flatnonzero(np.diff(window, prepend=-1))
    run = np.zeros(len(window), np.int64)
    for index, (a, b) in enumerate(zip(starts, [*starts[1:], len(window)], strict=True)):
        middle = a + 1 + int(np.argmin(opened[a:b]))
        run[a:middle], run[middle:b] = 2 * index, 2 * index + 1
    return run
