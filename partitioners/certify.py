"""From cuts of atoms to a partition with its certificate.

The objective of a certificate is always recomputed here by the one objective, whatever the
search believed.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeflow.partitioners.atoms import Cut
from pipeflow.partitioners.objective import objective
from pipeflow.partitioners.partition import Certificate, Partition, Stage
from pipeflow.partitioners.problem import PartitionProblem


def stages_of(problem: PartitionProblem, cut: Cut) -> tuple[Stage, ...]:
    """The stages that a cut of the problem's atoms means."""
    position = problem.costs.position_by_layer
    return tuple(Stage.replicated(problem.atoms.names(atoms, position), tuple(devices)) for atoms, devices in cut)


def certified(problem: PartitionProblem, stages: Sequence[Stage], *, partitioner: str, lower_bound: float) -> Partition:
    """The partition with its certificate.

    Args:
        lower_bound: proven for all partitions of the problem. Where rounding puts it a hair above
            the objective, the objective stands.
    """
    broken = problem.pins.broken(stages)
    assert not broken, f"{partitioner} broke a pin: {broken[0]}"
    seconds = objective(problem, stages)
    assert lower_bound <= seconds * (1 + 1e-9), f"bound {lower_bound} above the objective {seconds} of {partitioner}"
    certificate = Certificate(partitioner=partitioner, objective=seconds, lower_bound=min(lower_bound, seconds))
    return Partition(stages=tuple(stages), certificate=certificate)
