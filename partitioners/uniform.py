"""Stages of an even number of layers in the graph's order: what one does by hand.

Decides from counts alone; costs only tell whether the result fits and what it is worth.
"""

from __future__ import annotations

from pipeflow.errors import Infeasible
from pipeflow.partitioners.atoms import Cut
from pipeflow.partitioners.bounds import lower_bound
from pipeflow.partitioners.certify import certified, stages_of
from pipeflow.partitioners.feasibility import require_feasible, shortfall
from pipeflow.partitioners.partition import Partition
from pipeflow.partitioners.problem import PartitionProblem


def uniform(problem: PartitionProblem) -> Partition:
    """Cuts the order of the layers into runs whose counts differ as little as groups allow.

    As many stages as are asked for, or else as there are devices or groups of colocated layers;
    one replica each unless `replicas` says otherwise; devices in order.

    Raises:
        Infeasible: a stage does not fit its device, or cannot be replicated as asked.
    """
    require_feasible(problem)
    atoms = problem.atoms
    replicas = problem.replicas or (1,) * (problem.stage_count or problem.stage_limit)
    if sum(replicas) > problem.cluster.num_devices:
        raise Infeasible(["the even cut has one stage on a device; for several chunks use another partitioner"])
    ends = _even_ends([len(names) for names in atoms.members], len(replicas))
    starts = [0, *ends[:-1]]
    parts: list[tuple[range, range]] = []
    device = 0
    for start, end, count in zip(starts, ends, replicas, strict=True):
        if count > 1 and not atoms.replicable[start:end].all():
            name = next(c.name for group in atoms.layers[start:end] for c in group if not c.replicable)
            raise Infeasible([f"the even cut puts {name!r}, which cannot be replicated, on {count} replicas"])
        parts.append((range(start, end), range(device, device + count)))
        device += count
    cut: Cut = parts
    if problem.cluster.is_uniform:
        cut = problem.pinned.on_pinned_devices(cut, problem.cluster.num_devices)
    stages = stages_of(problem, cut)
    if broken := problem.pins.broken(stages):
        raise Infeasible([f"the even cut breaks a pin: {story}; use another partitioner" for story in broken[:1]])
    if reasons := shortfall(problem, stages):
        raise Infeasible([f"the even cut does not fit: {reasons[0]}", *reasons[1:]])
    return certified(problem, stages, partitioner="uniform", lower_bound=lower_bound(problem))


def _even_ends(sizes: list[int], num_stages: int) -> list[int]:
    """Where each stage ends: at the atom boundary next to its even share, each stage at least one atom."""
    total, done, before = sum(sizes), 0, 0
    ends: list[int] = []
    for stage in range(num_stages):
        goal = total * (stage + 1) / num_stages
        last = len(sizes) - (num_stages - stage - 1)
        while done < last and (done == (ends[-1] if ends else 0) or before + sizes[done] / 2 < goal):
            before += sizes[done]
            done += 1
        ends.append(last if stage == num_stages - 1 else done)
    return ends
