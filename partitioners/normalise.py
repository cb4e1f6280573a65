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
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

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
        joined = tuple((*members[u], *members[v]) for u, v in pairs)
        problem = replace(problem, together=(*problem.together, *joined))
    return problem


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


def _disjoint_pairs(problem: PartitionProblem) -> Iterator[tuple[int, int]]:
    """Pairs (u, v) to join, no atom in two of them, so that each stays right after the others."""
    atoms = problem.atoms
    device, (inside, outside) = problem.cluster.devices[0], _transfers(problem, atoms)
    binds = memory_binds(problem)
    taken: set[int] = set()
    for v in range(atoms.count):
        if v in problem.pinned.fixed or (binds and (atoms.parameter_bytes[v] or atoms.saved_bytes[v])):
            continue
        partners = inside[v]
        if v in taken or not partners:
            continue
        u = max(sorted(partners), key=partners.__getitem__)
        before, after = set(atoms.predecessors[v]), set(atoms.successors[v])
        if u in taken or not (before == {u} or after == {u} or not before | after) or outside[v] == math.inf:
            continue
        rest = outside[v] + math.fsum(w for other, w in partners.items() if other != u)
        if compute_seconds(atoms.layers[v], device) + rest <= partners[u]:
            taken |= {u, v}
            yield u, v


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
