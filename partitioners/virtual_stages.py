"""Several chunks on a device: what virtual stages gain over a contiguous partition.

It begins with the contiguous partition, whichever partitioner found it, and keeps it where nothing
better is found: the result is never worse. Virtual stages have one replica each. It knows how to
improve, not how contiguous partitions are found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from pipeflow.errors import Infeasible, PlanError
from pipeflow.partitioners import cpsat as cpsat_model
from pipeflow.partitioners import rounds
from pipeflow.partitioners.bounds import cut_bound, lower_bound
from pipeflow.partitioners.certify import certified
from pipeflow.partitioners.chain import chain
from pipeflow.partitioners.coarsen import coarsen
from pipeflow.partitioners.normalise import fold
from pipeflow.partitioners.objective import objective
from pipeflow.partitioners.partition import Partition, Stage, num_turns
from pipeflow.partitioners.problem import PartitionProblem

_WORK = 12.0
"""The solver's budget: gains come early, proofs late or never."""

_MOST_SOLVED = 15_000
"""Atoms times slots up to which the solver is asked."""

_MOST_ATOMS = 4_000
"""Beyond, runs of atoms are moved together."""


def require_room(problem: PartitionProblem) -> None:
    """Refuses what contradicts several chunks on a device.

    Raises:
        PlanError: a number of stages is asked for, or layers can run in several ways.
    """
    if problem.chunks == 1:
        return
    given = {"num_stages": problem.num_stages, "max_stages": problem.max_stages, "replicas": problem.replicas}
    for name, value in given.items():
        if value is not None:
            raise PlanError(
                f"{name}={value} with chunks={problem.chunks}; there are up to chunks times devices stages then, "
                f"give one or the other"
            )
    if problem.costs.has_variants:
        raise PlanError(
            f"chunks={problem.chunks}, but layers can run in several ways, and these are chosen for contiguous stages "
            "alone; set chunks=1"
        )


def with_contiguous(
    problem: PartitionProblem, partitioner: Callable[[PartitionProblem], Partition], *, use_solver: bool
) -> tuple[Partition | None, Partition]:
    """The partitioner's contiguous partition, None where it finds none, and the best with the problem's chunks.

    Raises:
        Infeasible: there is neither. What fits no device as one stage may fit it as two, so with several chunks
            nothing is proved.
    """
    contiguous, failure = None, None
    try:
        contiguous = partitioner(replace(problem, chunks=1))
    except Infeasible as error:
        if problem.chunks == 1:
            raise
        failure = Infeasible([f"with one stage on a device: {reason}" for reason in error.reasons])
    found = contiguous if problem.chunks == 1 else interleave(problem, contiguous, use_solver=use_solver)
    if found is None:
        assert failure is not None, "no partition and no reason"
        raise failure
    return contiguous, found


def interleave(problem: PartitionProblem, contiguous: Partition | None, *, use_solver: bool) -> Partition | None:
    """The best partition found with several chunks on a device; None where there is none.

    Args:
        problem: with its chunks.
        contiguous: the partition to improve, of the problem with one chunk; None where there is none. It
            stays as it is where a number of stages is asked for.
        use_solver: whether OR-tools may be asked.
    """
    if contiguous is not None and num_turns([stage.devices for stage in contiguous.stages]) > problem.chunks:
        contiguous = _in_order(problem)
    stages = None if contiguous is None else contiguous.stages
    name = "" if contiguous is None else contiguous.certificate.partitioner
    if problem.stage_count is not None or problem.max_stages is not None:
        if stages is None:
            return None
        return certified(problem, stages, partitioner=name, lower_bound=lower_bound(problem))
    smaller = fold(replace(problem, max_replicas=1))
    bound = max(lower_bound(problem), cut_bound(smaller) if problem.replica_limit == 1 else 0.0)
    replicated = stages is not None and any(stage.num_replicas > 1 for stage in stages)

    def consider(found: Sequence[Stage] | None, by: str) -> None:
        nonlocal stages, name
        if found is not None and (stages is None or objective(problem, found) < objective(problem, stages)):
            stages, name = tuple(found), f"{name}, then {by}" if name else by

    def is_closed() -> bool:
        return stages is not None and objective(problem, stages) * (1 - 1e-9) <= bound

    if not is_closed():
        start = None if replicated else stages
        coarse = coarsen(smaller, _MOST_ATOMS)
        consider(rounds.improve(coarse, None if coarse is not smaller else start, bound)[0], "rounds")
    slots = problem.cluster.num_devices * problem.chunks
    solves = use_solver and smaller.atoms.count * slots <= _MOST_SOLVED and cpsat_model.supports(smaller) is None
    if solves and not is_closed():
        start = None if stages is None or any(stage.num_replicas > 1 for stage in stages) else stages
        better, proved = cpsat_model.improve(smaller, start, bound, work=_WORK)
        bound = bound if problem.replica_limit > 1 else max(bound, proved)
        consider(better, "cpsat")
    if stages is None:
        return None
    return certified(problem, stages, partitioner=name, lower_bound=bound)


def _in_order(problem: PartitionProblem) -> Partition | None:
    """The best chain on unlike devices in their own order, in which several chunks leave them."""
    try:
        return chain(problem)
    except Infeasible:
        return None
