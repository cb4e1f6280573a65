"""Where each layer goes: clusters, the problem, its one objective, and one file per algorithm.

`PARTITIONERS` names the algorithms; a row is loaded when it is first looked up, so that
importing this package costs nothing. Nothing in it imports torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipeflow.partitioners.partition import Partition
    from pipeflow.partitioners.problem import PartitionProblem

    Partitioner = Callable[[PartitionProblem], Partition]

_SUMMARIES = {
    "uniform": "stages of an even number of layers, in the graph's order",
    "chain": "exact cut of one topological order, with replicas and memory",
    "orders": "the best of many topological orders, each cut exactly",
    "moves": "annealed moves between the stages of a cut, loads kept up one move at a time",
    "beam": "stages filled one by one up to a threshold, the best few beginnings kept",
    "ideals": "exact over all ideals of the graph, where there are not too many",
    "cpsat": "exact by CP-SAT; needs pipeflow[solvers]",
    "milp": "the same by HiGHS, to check the others; needs pipeflow[solvers]",
    "nested": "levels of links one inside the other, each planned exactly",
    "variants": "exact where layers can run in several ways, over all ideals of a small graph",
    "auto": "what the size of the problem allows, cheapest first, until the gap is closed",
    "exhaustive": "every cut of a small graph: the oracle",
}


class _Table(Mapping[str, "Partitioner"]):
    """Algorithms by name. Row `name` is the function `name` of the module `name`."""

    def __getitem__(self, name: str) -> Partitioner:
        if name not in _SUMMARIES:
            raise KeyError(name)
        partitioner: Partitioner = getattr(import_module(f"{__name__}.{name}"), name)
        return partitioner

    def __iter__(self) -> Iterator[str]:
        return iter(_SUMMARIES)

    def __len__(self) -> int:
        return len(_SUMMARIES)

    def summary(self, name: str) -> str:
        """What the algorithm does, in one line."""
        return _SUMMARIES[name]


PARTITIONERS = _Table()
"""Read-only: name to `Callable[[PartitionProblem], Partition]`."""
