"""A partitioner of one's own, and the laws that find what is wrong with it.

`fill` is complete: stages are filled from the left up to a threshold, and the least threshold that leaves no
layer over is found by halving. `boast` is the same with one bug, which no look at a plan would show: it certifies
that threshold as a lower bound. No cut of this order beats it, but some cut of another order may, or replicas.

    python examples/own_partitioner.py
"""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import Phase, given, settings

import pipeflow.testing as testing
from pipeflow.errors import Infeasible, PlanError
from pipeflow.partitioners.bounds import lower_bound
from pipeflow.partitioners.certify import certified, stages_of
from pipeflow.partitioners.feasibility import require_feasible, shortfall
from pipeflow.partitioners.partition import Partition
from pipeflow.partitioners.problem import PartitionProblem


def filled(seconds: list[float], threshold: float) -> list[list[int]]:
    """Runs of atoms, each of at most `threshold` seconds or of one atom."""
    runs: list[list[int]] = [[]]
    for atom, amount in enumerate(seconds):
        if runs[-1] and sum(seconds[a] for a in runs[-1]) + amount > threshold:
            runs.append([])
        runs[-1].append(atom)
    return runs


def fill(problem: PartitionProblem, *, boasts: bool = False) -> Partition:
    """Stages of at most the least threshold of compute that suffices, one device each."""
    require_feasible(problem)
    if problem.stage_count is not None:
        raise PlanError("fill finds its own number of stages; leave it open")
    seconds = [sum(layer.seconds for layer in layers) for layers in problem.atoms.layers]
    low, high = 0.0, sum(seconds)
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (low, middle) if len(filled(seconds, middle)) <= problem.stage_limit else (middle, high)
    cut = [(atoms, [device]) for device, atoms in enumerate(filled(seconds, high))]
    stages = stages_of(problem, cut)
    if reasons := shortfall(problem, stages):
        raise Infeasible(reasons)
    bound = max(low, lower_bound(problem)) if boasts else lower_bound(problem)
    return certified(problem, stages, partitioner="fill", lower_bound=bound)


def boast(problem: PartitionProblem) -> Partition:
    """`fill` with the planted bug."""
    return fill(problem, boasts=True)


def story_of(partitioner: Callable[[PartitionProblem], Partition], *, num_problems: int = 200) -> str | None:
    """What the laws say against a partitioner on drawn problems; None if it keeps them all."""
    graphs, cluster = testing.costs(max_layers=5), testing.clusters(max_devices=3)

    @given(problem=testing.problems(graphs=graphs, cluster=cluster, constrained=False, pinned=True))
    @settings(
        max_examples=num_problems, deadline=None, derandomize=True, database=None, phases=[Phase.generate, Phase.shrink]
    )
    def laws(problem: PartitionProblem) -> None:
        testing.check_partitioner(partitioner, problem)

    try:
        laws()
    except AssertionError as error:
        return str(error)
    return None


def main() -> tuple[str | None, str | None]:
    """The stories of both."""
    result = story_of(fill), story_of(boast)
    for name, story in zip(("fill", "boast"), result, strict=True):
        print(f"{name}: {story or 'keeps the laws'}")
    return result


if __name__ == "__main__":
    main()
