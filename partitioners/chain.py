"""The best cut of the graph's own order: exact, with replicas, memory and communication."""

from __future__ import annotations

from pipeflow.partitioners.bounds import lower_bound
from pipeflow.partitioners.certify import certified, stages_of
from pipeflow.partitioners.feasibility import no_cut_fits, require_feasible
from pipeflow.partitioners.linear import LinearCut, cut_order
from pipeflow.partitioners.objective import objective
from pipeflow.partitioners.partition import Partition, Stage
from pipeflow.partitioners.problem import PartitionProblem


def chain(problem: PartitionProblem) -> Partition:
    """Cuts the topological order of the atoms by the recurrence of `pipeflow.partitioners.linear`.

    Exact for that order with the devices in order, where links are equal and no tensor is sent to
    two stages or more (or `fan_out` is "tensor"); otherwise the best of the cuts that count such
    tensors too low and too high. Ties go to fewer devices, then to fewer replicas and layers in
    the earlier stages.

    The lower bound holds for every partition of the problem. Where the graph has only one
    topological order and the devices are alike, it is the recurrence's own optimum, which
    counts a tensor sent to several stages once; otherwise it is that of
    `pipeflow.partitioners.bounds`.

    Raises:
        Infeasible: no cut of the order fits.
    """
    require_feasible(problem)
    order = range(problem.atoms.count)
    bound = lower_bound(problem)
    found = cut_order(problem, order, bound=bound)
    if found is None:
        raise no_cut_fits(problem, closest(problem, bound), "cut of the graph's order")
    if problem.atoms.has_one_order and problem.cluster.is_uniform and problem.chunks == 1:
        bound = max(bound, found.seconds * (1 - 1e-12))
    return certified(problem, best_stages(problem, found), partitioner="chain", lower_bound=bound)


def best_stages(problem: PartitionProblem, found: LinearCut) -> tuple[Stage, ...]:
    """The stages of a cut, or better ones if counting readers one by one finds them."""
    stages = stages_of(problem, found.stages)
    seconds = objective(problem, stages)
    if seconds <= found.seconds * (1 + 1e-9) or problem.fan_out == "tensor":
        return stages
    order = [atom for atoms, _ in found.stages for atom in atoms]
    other = cut_order(problem, order, bound=found.seconds, readers="each")
    if other is not None:
        candidate = stages_of(problem, other.stages)
        if objective(problem, candidate) < seconds:
            return candidate
    return stages


def closest(problem: PartitionProblem, bound: float) -> tuple[Stage, ...] | None:
    """A cut that would fit if every device had a little more memory."""
    for percent in (2, 5, 10, 25, 50, 100, 300, 1000, 10_000, 10**9):
        found = cut_order(problem, range(problem.atoms.count), bound=bound, memory_factor=1 + percent / 100)
        if found is not None:
            return stages_of(problem, found.stages)
    return None
