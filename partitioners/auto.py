"""Runs what the size of the problem allows, cheapest first, and stops when the gap is closed.

It decides which algorithms to run and keeps the best partition and the best bound of them; it has
no search of its own. What it runs depends on the problem and on whether OR-tools is installed,
never on a clock, so the same problem gives the same partition on the same installation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec

from pipeflow.errors import Infeasible
from pipeflow.partitioners import beam as filling
from pipeflow.partitioners import cpsat as cpsat_model
from pipeflow.partitioners import ideals as ideal_programme
from pipeflow.partitioners import moves, windows
from pipeflow.partitioners.bounds import cut_bound, lower_bound
from pipeflow.partitioners.certify import certified
from pipeflow.partitioners.chain import chain, closest
from pipeflow.partitioners.coarsen import coarsen
from pipeflow.partitioners.device_orders import best_of_device_orders
from pipeflow.partitioners.exhaustive import exhaustive
from pipeflow.partitioners.feasibility import no_cut_fits, require_feasible
from pipeflow.partitioners.nested import nested
from pipeflow.partitioners.normalise import fold, join
from pipeflow.partitioners.objective import objective
from pipeflow.partitioners.orders import best_of_orders, num_rounds
from pipeflow.partitioners.partition import Partition, Stage
from pipeflow.partitioners.problem import PartitionProblem
from pipeflow.partitioners.variants import variants
from pipeflow.partitioners.virtual_stages import with_contiguous

CLOSED = 1e-8
"""A relative gap that counts as none."""

_MOST_EXHAUSTIVE = 6

_MOST_TRIED, _MOST_TRIED_ON = 9, 4
"""Atoms and devices up to which everything is tried where nothing else closed the gap, or found a partition."""

_MOST_ATOMS = 20_000
"""Beyond, the problem is coarsened first."""

_ROUNDS_PER_ORDER = 2
"""Orders of the layers for each order of unlike devices."""

_MOST_LOSS = 0.01
"""What joining layers of a problem that is too large may lose, relatively."""

_LEAST_FILLED = 300
"""Atoms from which on filling stages beats cutting many orders."""

_MOST_ORDERED = 2000
"""Atoms up to which many orders are cut, and ideals counted, where stages can be filled."""

_Step = Callable[[PartitionProblem, Sequence[Stage] | None, float], tuple[tuple[Stage, ...] | None, float] | None]
"""From a problem, the best partition known and a bound, to a better partition and a better bound."""

_MOST_SOLVED = 6000
"""Atoms times stages up to which the solver is worth its time."""


def has_solver() -> bool:
    """Whether OR-tools is installed."""
    return find_spec("ortools") is not None


def auto(problem: PartitionProblem) -> Partition:
    """The best partition that the algorithms of this package find, with the best bound.

    In turn: the chain programme; the oracle for a handful of layers; many orders, on the problem
    with layers folded; the programme over ideals; and CP-SAT, if OR-tools is installed.

    Raises:
        Infeasible: no partition fits, or none was found; the reasons say which.
    """
    return search(problem, use_solver=has_solver())


def search(problem: PartitionProblem, *, use_solver: bool, most_atoms: int = _MOST_ATOMS) -> Partition:
    """`auto`, with or without the solver.

    Args:
        most_atoms: beyond, the problem is coarsened first.
    """
    require_feasible(problem, nests=True, varies=True)
    if problem.chunks > 1:
        return with_contiguous(problem, lambda p: search(p, use_solver=use_solver), use_solver=use_solver)[1]
    if problem.costs.has_variants:
        return _named(problem, variants(problem), "variants", None)
    if problem.nested:
        return _named(problem, nested(problem), "nested", None)
    if problem.atoms.count > most_atoms:
        return _coarse(problem, use_solver, most_atoms)
    best, failure = None, None
    try:
        best = chain(problem)
    except Infeasible as error:
        failure = error
    most_devices = _MOST_EXHAUSTIVE if problem.cluster.is_uniform else 4
    tiny = problem.atoms.count <= _MOST_EXHAUSTIVE and problem.cluster.num_devices <= most_devices
    if _is_closed(best) or (problem.atoms.has_one_order and problem.cluster.is_uniform and best is None):
        return _named(problem, best, "chain", failure)
    if tiny:
        return _named(problem, exhaustive(problem), "exhaustive", None)
    return _improved(problem, best, failure, use_solver)


def _coarse(problem: PartitionProblem, use_solver: bool, most_atoms: int) -> Partition:
    """The best partition of a coarser problem, with a bound of the whole one.

    Where joining layers suffices, what is proven of the joined problem is proven of the whole, but
    for the loss that `join` states. Runs of an order may lose more: then only a bound of the whole is one.
    """
    joined, loss = join(problem, most_atoms=most_atoms, most_loss=_MOST_LOSS)
    bound = lower_bound(problem)
    if joined.atoms.count <= most_atoms:
        found = search(joined, use_solver=use_solver, most_atoms=most_atoms)
        bound = max(bound, found.certificate.lower_bound / (1 + loss))
        how = f"joined, which loses at most {loss:.2%}"
    else:
        found = search(coarsen(joined, max(2, most_atoms // 4)), use_solver=use_solver)
        how = "coarsened"
    name = f"{found.certificate.partitioner}, {how}"
    return certified(problem, found.stages, partitioner=name, lower_bound=bound)


def _improved(
    problem: PartitionProblem, best: Partition | None, failure: Infeasible | None, use_solver: bool
) -> Partition:
    smaller = fold(problem)
    bound = max(lower_bound(problem), cut_bound(smaller), best.certificate.lower_bound if best else 0.0)
    stages, name = (best.stages if best else None), "chain"
    if problem.replica_limit > 1 and problem.replicas is None:
        # Orders without replicas are cut many times faster, and are candidates here too.
        single = fold(replace(problem, max_replicas=1))
        if single.stage_limit >= (problem.stage_count or 1):
            found = best_of_orders(single, rounds=num_rounds(single), bound=bound)
            if found is not None and (stages is None or objective(problem, found) < objective(problem, stages)):
                stages, name = found, "orders"
    if smaller.atoms.count <= _MOST_ORDERED or not _fills(smaller):
        found = best_of_orders(smaller, rounds=num_rounds(smaller), start=stages, bound=bound)
        if found is not None and (stages is None or objective(problem, found) < objective(problem, stages)):
            stages, name = found, "orders"
    for step, improve in _steps(smaller, use_solver).items():
        if stages is not None and objective(problem, stages) * (1 - CLOSED) <= bound:
            break
        improved = improve(smaller, stages, bound)
        if improved is None:
            continue
        better, proved = improved
        if better is None and proved == math.inf:
            raise no_cut_fits(problem, closest(problem, bound), "cut")
        bound = max(bound, proved)
        if better is not None and (stages is None or objective(problem, better) < objective(problem, stages)):
            stages, name = better, step
    over = best_of_device_orders(problem, stages, lambda p: best_of_orders(p, rounds=_ROUNDS_PER_ORDER))
    if over is not None and (stages is None or objective(problem, over) < objective(problem, stages)):
        stages, name = over, "device orders"
    is_closed = stages is not None and objective(problem, stages) * (1 - CLOSED) <= bound
    if not is_closed and problem.atoms.count <= _MOST_TRIED and problem.cluster.num_devices <= _MOST_TRIED_ON:
        return _named(problem, exhaustive(problem), "exhaustive", None)
    if stages is None:
        assert failure is not None, "no partition and no reason"
        raise failure
    return certified(problem, stages, partitioner=f"auto: {name}", lower_bound=bound)


def _fills(problem: PartitionProblem) -> bool:
    return problem.atoms.count >= _LEAST_FILLED and filling.supports(problem) is None


def _steps(problem: PartitionProblem, use_solver: bool) -> dict[str, _Step]:
    """The algorithms that can express the problem and are worth trying on it, in turn."""
    steps: dict[str, _Step] = {}
    if ideal_programme.supports(problem) is None and problem.atoms.count <= _MOST_ORDERED:
        steps["ideals"] = ideal_programme.improve
    if windows.supports(problem):
        steps["windows"] = windows.improve
    if _fills(problem):
        steps["beam"] = filling.improve
        steps["beam, polished"] = moves.polish
    else:
        steps["moves"] = moves.improve
    small = problem.atoms.count * problem.stage_limit <= _MOST_SOLVED
    if use_solver and small and cpsat_model.supports(problem) is None:
        steps["cpsat"] = cpsat_model.improve
    return steps


def _is_closed(partition: Partition | None) -> bool:
    return partition is not None and partition.certificate.gap <= CLOSED


def _named(problem: PartitionProblem, partition: Partition | None, name: str, failure: Infeasible | None) -> Partition:
    if partition is None:
        assert failure is not None, "no partition and no reason"
        raise failure
    bound = partition.certificate.lower_bound
    return certified(problem, partition.stages, partitioner=f"auto: {name}", lower_bound=bound)
