"""The laws that every partitioner keeps, as one check of one problem: for users' own algorithms.

Draw problems with `problems()` and hand each to `check_partitioner`; the oracle is exhaustive
search, so keep the drawn graphs to about seven layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from pipeflow.errors import Infeasible
from pipeflow.graphs.costs import GraphCosts
from pipeflow.partitioners.cluster import Cluster
from pipeflow.partitioners.exhaustive import exhaustive
from pipeflow.partitioners.partition import Partition
from pipeflow.partitioners.pins import Pins
from pipeflow.partitioners.problem import PartitionProblem
from pipeflow.testing.partitions import check_partition

_ROUNDING = 1e-9


def check_partitioner(partitioner: Callable[[PartitionProblem], Partition], problem: PartitionProblem) -> None:
    """Checks that the partitioner keeps its promises on the problem.

    The partition is valid (see `check_partition`); no better than the optimum, whose lower bound it
    claims; the same again; the same under other names; and twice as dear when everything is.
    `Infeasible` counts as an answer, except where it depends on names or scale.

    Raises:
        AssertionError: says which promise is broken.
    """
    found = _attempt(partitioner, problem)
    if found is not None:
        check_partition(found, problem)
        _check_against_oracle(found, problem)
    _require(_attempt(partitioner, problem) == found, "not deterministic: the same problem, another partition")
    graph = renamed(problem.costs)
    other = _attempt(partitioner, replace(problem, costs=graph, pins=_renamed_pins(problem, graph)))
    _require(_shape(other, graph) == _shape(found, problem.costs), "names matter: renamed layers are cut otherwise")
    twice = _attempt(partitioner, scaled(problem, 2))
    _require((twice is None) == (found is None), "scale matters: feasible only when seconds are, or are not, doubled")
    if found is not None and twice is not None:
        before, after = found.certificate.objective, twice.certificate.objective
        _require(abs(after - 2 * before) <= _ROUNDING * after, f"all seconds doubled, but {before} s became {after} s")


def _attempt(partitioner: Callable[[PartitionProblem], Partition], problem: PartitionProblem) -> Partition | None:
    try:
        return partitioner(problem)
    except Infeasible:
        return None


def _check_against_oracle(found: Partition, problem: PartitionProblem) -> None:
    optimum, certificate = exhaustive(problem).certificate.objective, found.certificate
    _require(
        certificate.objective >= optimum * (1 - _ROUNDING),
        f"better than the optimum: {certificate.objective} s, but no partition takes less than {optimum} s",
    )
    _require(
        certificate.lower_bound <= optimum * (1 + _ROUNDING),
        f"not a bound: {certificate.lower_bound} s is said to be the least, but {optimum} s is possible",
    )


def _shape(partition: Partition | None, graph: GraphCosts) -> object:
    """A partition without the names of its layers."""
    if partition is None:
        return None
    stages = [([graph.position_by_layer[name] for name in s.layers], s.devices) for s in partition.stages]
    return stages, partition.certificate.objective


def renamed(graph: GraphCosts) -> GraphCosts:
    """The same graph with every layer's name changed, and their alphabetical order turned round."""
    names = {c.name: f"n{len(graph.layers) - i:03}" for i, c in enumerate(graph.layers)}
    tensors = {
        t.name: names[c.name] + (f":{k}" if len(c.outputs) > 1 else "")
        for c in graph.layers
        for k, t in enumerate(c.outputs)
    }
    data = graph.model_dump()
    for layer in data["layers"]:
        layer["name"] = names[layer["name"]]
        layer["inputs"] = [tensors.get(t, t) for t in layer["inputs"]]
        for tensor in layer["outputs"]:
            tensor["name"] = tensors[tensor["name"]]
    data["colocated"] = [[names[n] for n in group] for group in data["colocated"]]
    return GraphCosts.model_validate(data)


def _renamed_pins(problem: PartitionProblem, graph: GraphCosts) -> Pins:
    names = {before.name: after.name for before, after in zip(problem.costs.layers, graph.layers, strict=True)}
    data = problem.pins.model_dump()
    for pin in data["on"]:
        pin["layer"] = names[pin["layer"]]
    for kind in ("together", "apart", "no_cut"):
        data[kind] = [[names[n] for n in group] for group in data[kind]]
    return Pins.model_validate(data)


def scaled(problem: PartitionProblem, factor: int) -> PartitionProblem:
    """All seconds times `factor`: of layers, and of links by their bandwidth and latency."""
    costs, cluster = problem.costs.model_dump(), problem.cluster.model_dump()
    for layer in costs["layers"]:
        for key in ("forward_seconds", "backward_input_seconds", "backward_weight_seconds"):
            layer[key] *= factor
    for link in (*cluster["levels"], *cluster["links"]):
        link["latency"] *= factor
        if link["bandwidth"] is not None:
            link["bandwidth"] /= factor
    return replace(problem, costs=GraphCosts.model_validate(costs), cluster=Cluster.model_validate(cluster))


def _require(holds: bool, story: str) -> None:
    if not holds:
        raise AssertionError(story)
