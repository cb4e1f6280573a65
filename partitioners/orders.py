"""The best of many linear orders: a DAG is cut well by cutting a good order of it.

Every partition is a cut of some topological order, so the chain programme over all orders would be
exact. This draws orders of several kinds, cuts each by `pipeflow.partitioners.linear`, and then
redraws the orders inside the stages of the best cut: that cut remains one of the new order, so no
round is worse than the last. The number of rounds is fixed and so are the draws: the same problem
gives the same partition.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Sequence

from pipeflow.partitioners.atoms import Atoms
from pipeflow.partitioners.bounds import lower_bound
from pipeflow.partitioners.certify import certified
from pipeflow.partitioners.chain import best_stages, closest
from pipeflow.partitioners.feasibility import no_cut_fits, require_feasible
from pipeflow.partitioners.linear import LinearCut, cut_order
from pipeflow.partitioners.objective import objective
from pipeflow.partitioners.partition import Partition, Stage
from pipeflow.partitioners.placement import place
from pipeflow.partitioners.problem import PartitionProblem

_CLOSED = 1 - 1e-9


def orders(problem: PartitionProblem) -> Partition:
    """The best cut of many orders. A heuristic; the lower bound is that of `bounds`.

    Raises:
        Infeasible: no cut of any order that was drawn fits.
    """
    require_feasible(problem)
    bound = lower_bound(problem)
    stages = best_of_orders(problem, rounds=num_rounds(problem))
    if stages is None:
        raise no_cut_fits(problem, closest(problem, bound), "cut of many orders")
    return certified(problem, place(problem, stages), partitioner="orders", lower_bound=bound)


def num_rounds(problem: PartitionProblem) -> int:
    """So many that the whole takes seconds: fewer where a round takes longer."""
    atoms, is_single = problem.atoms.count, problem.replica_limit == 1 and problem.cluster.is_uniform
    return max(4, min(24, 3 * atoms, 12_000 // max(1, atoms * (1 if is_single else 8))))


def best_of_orders(
    problem: PartitionProblem, *, rounds: int, seed: int = 0, start: Sequence[Stage] | None = None, bound: float = 0.0
) -> tuple[Stage, ...] | None:
    """The best cut of `rounds` orders, or None if none is feasible.

    Args:
        rounds: how many orders.
        seed: of the draws.
        start: a valid partition to begin with, if one is known. If nothing beats it, it is not returned.
        bound: a proven lower bound, if one is known.
    """
    atoms, draw = problem.atoms, random.Random(seed)
    bound = max(bound, lower_bound(problem))
    best = _as_cut(problem, start) if start else None
    known = best
    one = atoms.has_one_order
    for number in range(1 if one else rounds):
        if number == 0:
            order = list(range(atoms.count))
        elif best is None or number % 8 == 1 or number <= 6:
            order = draw_order(atoms, [range(atoms.count)], draw, number)
        else:
            order = draw_order(atoms, [block for block, _ in best.stages], draw, number)
        upper = best.seconds if best else math.inf
        found = cut_order(problem, order, bound=bound, upper=upper)
        if found is not None and (best is None or found.seconds < best.seconds * _CLOSED):
            best = found
            if best.seconds * _CLOSED <= bound:
                break
    return None if best is None or best is known else best_stages(problem, best)


def _as_cut(problem: PartitionProblem, stages: Sequence[Stage]) -> LinearCut:
    """A partition as a cut of some order of the atoms."""
    stage_of = {name: index for index, stage in enumerate(stages) for name in stage.layers}
    blocks: list[list[int]] = [[] for _ in stages]
    for atom, names in enumerate(problem.atoms.members):
        blocks[stage_of[names[0]]].append(atom)
    cut = tuple((tuple(block), stage.devices) for block, stage in zip(blocks, stages, strict=True))
    return LinearCut(objective(problem, stages), cut)


def draw_order(atoms: Atoms, blocks: Sequence[Sequence[int]], draw: random.Random, kind: int) -> list[int]:
    """A topological order that runs through the blocks one after another.

    Args:
        blocks: sets of atoms, a chain of ideals.
        kind: chooses the rule: depth first, closing what is open, or at random.
    """
    result: list[int] = []
    backward = kind % 2 == 1
    following = atoms.predecessors if backward else atoms.successors
    for block in reversed(blocks) if backward else blocks:
        result += _order_block(atoms, block, following, draw, kind // 2 % 3)
    if backward:
        result.reverse()
    return place_free(atoms, result)


def _order_block(
    atoms: Atoms, block: Sequence[int], following: Sequence[Sequence[int]], draw: random.Random, rule: int
) -> list[int]:
    inside = {atom for atom in block if atoms.bound[atom]}
    waiting = dict.fromkeys(inside, 0)
    for atom in inside:
        for after in following[atom]:
            if after in inside:
                waiting[after] += 1
    weight = _weights(atoms, draw, rule)
    ready = [(weight(atom, 0), atom) for atom in sorted(inside) if not waiting[atom]]
    heapq.heapify(ready)
    result: list[int] = []
    while ready:
        _, atom = heapq.heappop(ready)
        result.append(atom)
        for after in following[atom]:
            if after in inside:
                waiting[after] -= 1
                if not waiting[after]:
                    heapq.heappush(ready, (weight(after, len(result)), after))
    return result + [atom for atom in block if not atoms.bound[atom]]


def _weights(atoms: Atoms, draw: random.Random, rule: int) -> Callable[[int, int], float]:
    """The priority of an atom that becomes ready at a time; the smallest goes first."""
    if rule == 0:  # depth first: what became ready last
        return lambda atom, time: -time + draw.random()
    if rule == 1:  # what closes more bytes than it opens
        balance = [0.0] * atoms.count
        for net in atoms.nets:
            balance[net.producer] += net.bytes
            for reader in net.readers:
                balance[reader] -= net.bytes / len(net.readers)
        spread = max(map(abs, balance), default=0.0) or 1.0
        return lambda atom, time: balance[atom] / spread + 0.3 * draw.random() - 0.02 * time
    return lambda atom, time: draw.random()


def place_free(atoms: Atoms, order: Sequence[int]) -> list[int]:
    """Moves unbound atoms next to the atom that they exchange most bytes with."""
    if all(atoms.bound):
        return list(order)
    partners: dict[int, dict[int, float]] = {a: {} for a in range(atoms.count) if not atoms.bound[a]}
    for net in atoms.nets:
        for end in net.ends:
            if end in partners:
                for other in net.ends:
                    if other != end:
                        partners[end][other] = partners[end].get(other, 0.0) + net.bytes + 1
    attached: dict[int, list[int]] = {}
    roots = [atom for atom in order if atoms.bound[atom]]
    placed = set(roots)
    pending = [atom for atom in order if not atoms.bound[atom]]
    while pending:
        waiting = []
        for atom in pending:
            known = {other: w for other, w in partners[atom].items() if other in placed}
            if known:
                attached.setdefault(max(known, key=lambda o: (known[o], -o)), []).append(atom)
                placed.add(atom)
            else:
                waiting.append(atom)
        if len(waiting) == len(pending):
            roots += waiting
            break
        pending = waiting
    result: list[int] = []
    stack = list(reversed(roots))
    while stack:
        atom = stack.pop()
        result.append(atom)
        stack.extend(reversed(attached.get(atom, [])))
    return result
