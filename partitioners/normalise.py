"""Passes that make a problem smaller and keep its optimum: layers that some best partition joins.

Colocated groups, and the cycles that they close, are atoms already (`pipeflow.partitioners.atoms`).
`fold` joins an atom v with a neighbour u where moving v to u's stage can never hurt:

    order    v is bound after u alone, or before u alone, or not at all, so it may stand where u does;
    seconds  compute of v + all transfers of v that do not end in u  <=  transfers between u and v.

Then the stage that gains v saves the transfers between the two and pays no more than it saves,
the stage that loses it saves too, and no third stage notices. That covers nodes with a single
neighbour whose transfer costs more than they do, and series of which one link is dearer than
the next. It holds where stages have one replica on devices alike, transfers add to compute, any
smaller number of stages will do, and memory cannot bind (or v takes none). No pin may name v, nor
count stages or layers.

An atom that takes no time is joined with an atom that is an end of all its nets, however many others
are, if the order allows it as above: there it touches no stage that its nets do not touch anyway. (Where
each reading stage costs the producer once more, only if it produces nothing that several read.)

`join` gives up a stated part of the optimum for a smaller problem. Let t be the transfers between u
and v, c the compute of v and r its other transfers. The stage that gains v pays c + r - t more at
most, and the one that loses it r - c - t. Where the first is at most e (c_u + t) and the second at most
e (c + t), both are at most e times seconds that the stage spends on this pair and no other, as no
atom is in two pairs: so no stage becomes dearer than 1 + e times what it was. Passes multiply.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from pipeflow.partitioners.atoms import Atoms
from pipeflow.partitioners.feasibility import memory_limits
from pipeflow.partitioners.objective import compute_seconds
from pipeflow.partitioners.problem import PartitionProblem, Position


def fold(problem: PartitionProblem) -> PartitionProblem:
    """The problem with such layers in `together`: no larger, and with the same optimum."""
    if not _applies(problem):
        return problem
    while pairs := list(_disjoint_pairs(problem)):
        members = problem.atoms.members
        joined = tuple((*members[pair.u], *members[pair.v]) for pair in pairs)
        problem = replace(problem, together=(*problem.together, *joined))
    return problem


def join(problem: PartitionProblem, *, most_atoms: int, most_loss: float) -> tuple[PartitionProblem, float]:
    """A smaller problem, and by how much its optimum is above that of `problem` at most, relatively.

    Args:
        most_atoms: passes end once there are no more.
        most_loss: of all passes together.
    """
    loss = 1.0
    while _applies(problem) and problem.atoms.count > most_atoms:
        pairs = list(_disjoint_pairs(problem, ((1 + most_loss) / loss - 1) / 2))
        if not pairs:
            break
        members = problem.atoms.members
        joined = tuple((*members[pair.u], *members[pair.v]) for pair in pairs)
        problem = replace(problem, together=(*problem.together, *joined))
        loss *= 1 + max(pair.loss for pair in pairs)
    return problem, (loss - 1) * (1 + 1e-9)


def _applies(problem: PartitionProblem) -> bool:
    return (
        problem.replica_limit == 1
        and problem.stage_count is None
        and problem.cluster.is_uniform
        and problem.transfers in ("added", "free")
        and not problem.cluster.devices[0].speed_by_kind
        and not problem.pinned.stages
        and problem.pinned.max_layers is None
    )


def memory_binds(problem: PartitionProblem) -> bool:
    """Whether some set of layers might be too much for the smallest device."""
    limit = min(memory_limits(problem))
    if limit == math.inf:
        return False
    atoms, devices = problem.atoms, problem.device_limit
    most = max(problem.in_flight(Position(1, d, problem.num_microbatches)) for d in range(1, devices + 1))
    parameters = int(atoms.parameter_bytes.sum())
    moved = sum(net.bytes for net in atoms.nets if net.is_activation)
    held = most * (int(atoms.saved_bytes.sum()) + moved)
    versions = max(problem.weight_versions(Position(1, d, problem.num_microbatches)) for d in range(1, devices + 1))
    return parameters * (versions + problem.gradient_ratio + problem.optimizer_ratio) + held + 2 > limit


class _Pair(NamedTuple):
    """Atoms to join, and what that loses at most."""

    u: int
    v: int
    loss: float


def _disjoint_pairs(problem: PartitionProblem, most_loss: float = 0.0) -> Iterator[_Pair]:
    """Pairs to join, no atom in two of them, so that each stays right after the others."""
    atoms = problem.atoms
    device, (inside, outside) = problem.cluster.devices[0], _transfers(problem, atoms)
    seconds = [compute_seconds(group, device) for group in atoms.layers]
    stays = _takes_memory(problem)
    taken: set[int] = set()
    for v, u in _without_seconds(problem, seconds):
        if u not in taken and v not in taken and not stays[v] and v not in problem.pinned.fixed:
            taken |= {u, v}
            yield _Pair(u, v, 0.0)
    for v in range(atoms.count):
        partners = inside[v]
        if v in taken or not partners or stays[v] or v in problem.pinned.fixed or outside[v] == math.inf:
            continue
        u = max(sorted(partners), key=partners.__getitem__)
        if u in taken or not _may_stand_with(atoms, v, u):
            continue
        rest, between = outside[v] + math.fsum(w for other, w in partners.items() if other != u), partners[u]
        loss = max(
            _part(seconds[v] + rest - between, seconds[u] + between),
            _part(rest - seconds[v] - between, seconds[v] + between),
        )
        if loss <= most_loss:
            taken |= {u, v}
            yield _Pair(u, v, loss)


def _may_stand_with(atoms: Atoms, v: int, u: int) -> bool:
    """Whether v may be on the stage of u, wherever that is."""
    before, after = set(atoms.predecessors[v]), set(atoms.successors[v])
    return before == {u} or after == {u} or not before | after


def _without_seconds(problem: PartitionProblem, seconds: Sequence[float]) -> Iterator[tuple[int, int]]:
    """(v, u) where v takes no time and u is an end of all its nets, and v may stand where u does."""
    atoms = problem.atoms
    common: dict[int, set[int]] = {}
    for net in atoms.nets:
        for end in net.ends:
            others = set(net.ends) - {end}
            if problem.fan_out == "stage" and end == net.producer and len(net.readers) > 1:
                others = set()
            common[end] = common[end] & others if end in common else others
    for v in range(atoms.count):
        if seconds[v] == 0.0:
            u = min((u for u in common.get(v, ()) if _may_stand_with(atoms, v, u)), default=None)
            if u is not None:
                yield v, u


def _part(excess: float, spent: float) -> float:
    """The excess as a part of what is spent already; 0 if there is none."""
    return 0.0 if excess <= 0 else excess / spent if spent > 0 else math.inf


def _takes_memory(problem: PartitionProblem) -> list[bool]:
    """Whether an atom may not change its stage because memory might then not suffice."""
    atoms = problem.atoms
    if not memory_binds(problem):
        return [False] * atoms.count
    result = [bool(p or s) for p, s in zip(atoms.parameter_bytes, atoms.saved_bytes, strict=True)]
    positions = [Position(1, d, problem.num_microbatches) for d in range(1, problem.device_limit + 1)]
    if problem.holds_received and any(problem.in_flight(position) for position in positions):
        # Another stage may then receive, and hold, more than it did.
        for net in atoms.nets:
            if net.is_activation and net.bytes:
                for end in net.ends:
                    result[end] = True
    return result


def _transfers(problem: PartitionProblem, atoms: Atoms) -> tuple[list[dict[int, float]], list[float]]:
    """Of every atom: seconds of the nets shared with one other atom alone, and of all its others."""
    bandwidth, latency = problem.transfer_link
    inside: list[dict[int, float]] = [{} for _ in range(atoms.count)]
    outside = [0.0] * atoms.count
    for net in atoms.nets:
        seconds = latency + net.bytes / bandwidth
        if len(net.readers) == 1:
            u, v = net.ends
            inside[u][v] = inside[u].get(v, 0.0) + seconds
            inside[v][u] = inside[v].get(u, 0.0) + seconds
            continue
        for end in net.ends:
            if problem.fan_out == "tensor":
                outside[end] += seconds
            elif end == net.producer:
                outside[end] += seconds * len(net.readers)
            else:
                outside[end] = math.inf  # one more reading stage may cost the producer
    return inside, outside
