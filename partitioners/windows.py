"""Exact search around the busiest stage of a partition: a better order there, and a lower bound.

The layers of a few stages next to each other are a window. Any partition of the graph, restricted to
a window, is a partition of the window that is no dearer: a stage keeps some of its layers and
pays for some of its nets. So what no partition of a window can reach, none of the graph can, and
where stages are dear because of what passes between few layers, a window tells it. A window of a
few thousand ideals is solved by the programme over ideals; the order of its best partition takes the
place of the window's in the whole, which is cut again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipeflow.graphs.costs import GraphCosts
from pipeflow.partitioners.chain import best_stages
from pipeflow.partitioners.cluster import Cluster
from pipeflow.partitioners.ideals import Programme
from pipeflow.partitioners.lattice import Lattice, enumerate_ideals
from pipeflow.partitioners.linear import cut_order
from pipeflow.partitioners.objective import objective, stage_terms
from pipeflow.partitioners.orders import place_free
from pipeflow.partitioners.partition import Stage
from pipeflow.partitioners.pins import Pins
from pipeflow.partitioners.problem import PartitionProblem

_MOST_IDEALS = 2500
_MOST_STEPS = 12
_STRICTLY = 1 - 1e-9
_CLOSE = 1e-3
"""Thresholds are halved until the window's optimum is known that well."""


def supports(problem: PartitionProblem) -> bool:
    """Whether windows of the problem bound it, and are what the programme over ideals can express."""
    relayed = problem.transfers == "relayed"
    return problem.cluster.is_uniform and problem.chunks == 1 and not problem.nested and not relayed


def improve(
    problem: PartitionProblem, start: Sequence[Stage] | None, bound: float
) -> tuple[tuple[Stage, ...], float] | None:
    """A partition at least as good as `start`, and a proven lower bound of at least `bound`.

    None if there is no partition to start from: its busiest stage tells where to look.
    """
    if start is None:
        return None
    best = tuple(start)
    for _ in range(_MOST_STEPS):
        reach = objective(problem, best)
        window = _widest(problem, best)
        if window is None or reach * _STRICTLY <= bound:
            break
        rows, bound = window.solve(bound, reach)
        better = None if rows is None else _recut(problem, best, window, rows, bound)
        if better is None or objective(problem, better) >= reach * _STRICTLY:
            break
        best = better
    return best, bound


@dataclass(frozen=True)
class _Window:
    """Some atoms of a problem as a problem, with its ideals."""

    atoms: tuple[int, ...]
    problem: PartitionProblem
    masks: list[int]

    def solve(self, bound: float, reach: float) -> tuple[tuple[Stage, ...] | None, float]:
        """The best partition found that is better than `reach`, and the least that any can be."""
        programme = Programme(self.problem, Lattice(self.problem, self.masks))
        best, low, high, upper = None, bound, reach, reach * _STRICTLY
        while high - low > _CLOSE * high:
            chain = programme.chain(upper)
            found = None if chain is None else programme.stages(chain)
            if chain is None:
                low = upper
            elif found is None:
                high = upper
            else:
                best, high = found, min(upper, objective(self.problem, found))
            upper = max((low + high) / 2, low)
        return best, max(bound, low)


def _widest(problem: PartitionProblem, stages: Sequence[Stage]) -> _Window | None:
    """The window around the busiest stage, widened to either side while it has few enough ideals."""
    terms = stage_terms(problem, stages)
    low = high = max(range(len(stages)), key=lambda index: terms[index].seconds)
    widest = _window(problem, stages, low, high)
    grows = widest is not None
    while grows:
        grows = False
        for a, b in ((low - 1, high), (low, high + 1)):
            wider = _window(problem, stages, a, b) if a >= 0 and b < len(stages) else None
            if wider is not None:
                widest, low, high, grows = wider, min(a, low), max(b, high), True
    return widest


def _window(problem: PartitionProblem, stages: Sequence[Stage], low: int, high: int) -> _Window | None:
    """The stages low .. high as a problem without limits, or None if it has too many ideals."""
    names = {name for stage in stages[low : high + 1] for name in stage.layers}
    atoms = tuple(a for a, members in enumerate(problem.atoms.members) if members[0] in names)
    groups = [problem.atoms.members[a] for a in atoms if len(problem.atoms.members[a]) > 1]
    layers, tensors = [], set[str]()
    for name in sorted(names, key=problem.costs.position_by_layer.__getitem__):
        layer = problem.costs.layer_by_name[name]
        layers.append(layer.model_copy(update={"inputs": tuple(t for t in layer.inputs if t in tensors)}))
        tensors.update(tensor.name for tensor in layer.outputs)
    devices = tuple(d.model_copy(update={"memory_bytes": None}) for d in problem.cluster.devices)
    smaller = replace(
        problem,
        costs=GraphCosts(layers=tuple(layers)),
        cluster=Cluster(devices=devices, levels=problem.cluster.levels, links=problem.cluster.links),
        unordered=problem.unordered & names,
        together=tuple(groups),
        pins=Pins(),
        num_stages=None,
        max_stages=None,
        replicas=None,
        max_replicas=problem.replica_limit,
    )
    masks = enumerate_ideals(smaller, _MOST_IDEALS)
    return None if masks is None else _Window(atoms, smaller, masks)


def _recut(
    problem: PartitionProblem, stages: Sequence[Stage], window: _Window, inner: Sequence[Stage], bound: float
) -> tuple[Stage, ...] | None:
    """The best cut of the order of `stages`, with the window's layers in the order of `inner`."""
    place = {name: index for index, stage in enumerate(stages) for name in stage.layers}
    rank = {name: index for index, stage in enumerate(inner) for name in stage.layers}
    first = min(place[problem.atoms.members[a][0]] for a in window.atoms)

    def key(atom: int) -> tuple[int, int, int]:
        name = problem.atoms.members[atom][0]
        return (first, rank[name], atom) if name in rank else (place[name], -1, atom)

    order = place_free(problem.atoms, sorted(range(problem.atoms.count), key=key))
    found = cut_order(problem, order, bound=bound, upper=objective(problem, stages))
    return None if found is None else best_stages(problem, found)
