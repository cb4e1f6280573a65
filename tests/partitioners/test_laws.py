"""What every row of PARTITIONERS must do, on drawn problems, with exhaustive search as the oracle."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import pytest
from hypothesis import assume, given, settings

from pipeflow.errors import Infeasible
from pipeflow.graphs.costs import GraphCosts
from pipeflow.partitioners import PARTITIONERS
from pipeflow.partitioners.cluster import Cluster
from pipeflow.partitioners.partition import Partition
from pipeflow.partitioners.problem import PartitionProblem
from pipeflow.testing.costs import clusters, costs, problems
from pipeflow.testing.partitions import check_partition

NAMES = sorted(name for name in PARTITIONERS if name != "cpsat" or find_spec("ortools"))
EXACT_ON_CHAINS = ["chain", "exhaustive"]
ROUNDING = 1e-9


def suited(name: str, problem: PartitionProblem) -> PartitionProblem:
    """The problem without what the algorithm refuses."""
    if name not in ("cpsat", "ideals", "milp"):
        return problem
    device, level = problem.cluster.devices[0], problem.cluster.levels[-1]
    return replace(
        problem,
        cluster=Cluster.uniform(
            problem.cluster.num_devices, device, bandwidth=level.bandwidth, latency=level.latency
        ),
        max_replicas=1,
        replicas=None,
        num_stages=problem.num_stages if name == "cpsat" else None,
        overlap=problem.overlap and name == "ideals",
    )


def attempt(name: str, problem: PartitionProblem) -> Partition | None:
    try:
        return PARTITIONERS[name](problem)
    except Infeasible as error:
        if not error.reasons or not all(error.reasons):
            raise AssertionError("Infeasible without a reason") from error
        return None


@pytest.mark.parametrize("name", NAMES)
@given(problem=problems())
@settings(max_examples=100)
def test_valid_and_between_bound_and_optimum(name: str, problem: PartitionProblem) -> None:
    problem = suited(name, problem)
    partition, best = attempt(name, problem), attempt("exhaustive", problem)
    if partition is None:
        return
    check_partition(partition, problem)
    assert best is not None, f"{name} found a partition where the oracle found none"
    optimum = best.certificate.objective
    assert partition.certificate.partitioner.startswith(name)
    assert partition.certificate.objective >= optimum * (1 - ROUNDING)
    assert partition.certificate.lower_bound <= optimum * (1 + ROUNDING)


@given(problem=problems(graphs=costs(is_chain=True), cluster=clusters(is_uniform=True)))
@settings(max_examples=300)
def test_chain_is_optimal_on_chains(problem: PartitionProblem) -> None:
    found, best = attempt("chain", problem), attempt("exhaustive", problem)
    assert (found is None) == (best is None)
    if found is None or best is None:
        return
    assert found.certificate.objective == pytest.approx(best.certificate.objective, rel=ROUNDING)
    if problem.atoms.has_one_order:  # colocated ends of a chain may leave fewer atoms, still in one order
        assert found.certificate.gap < ROUNDING


@pytest.mark.parametrize("name", NAMES)
@given(problem=problems())
@settings(max_examples=25)
def test_same_problem_same_partition(name: str, problem: PartitionProblem) -> None:
    problem = suited(name, problem)
    assert attempt(name, problem) == attempt(name, replace(problem))


def renamed(graph: GraphCosts) -> GraphCosts:
    """The same graph with every name changed, and the alphabetical order turned round."""
    names = {c.name: f"n{len(graph.layers) - i:03}" for i, c in enumerate(graph.layers)}

    def tensor(name: str) -> str:
        layer, _, index = name.partition(":")
        return names.get(layer, layer) + (f":{index}" if index else "")

    return graph.model_copy(
        update={
            "layers": tuple(
                c.model_copy(
                    update={
                        "name": names[c.name],
                        "inputs": tuple(tensor(t) for t in c.inputs),
                        "outputs": tuple(t.model_copy(update={"name": tensor(t.name)}) for t in c.outputs),
                    }
                )
                for c in graph.layers
            ),
            "colocated": tuple(tuple(names[n] for n in group) for group in graph.colocated),
        }
    )


@pytest.mark.parametrize("name", NAMES)
@given(problem=problems())
@settings(max_examples=25)
def test_names_do_not_matter(name: str, problem: PartitionProblem) -> None:
    problem = suited(name, problem)
    graph = GraphCosts.model_validate(renamed(problem.costs).model_dump())
    before, after = attempt(name, problem), attempt(name, replace(problem, costs=graph))
    assert (before is None) == (after is None)
    if before is None or after is None:
        return
    assert before.certificate == after.certificate
    number = {c.name: i for i, c in enumerate(problem.costs.layers)}
    number_after = {c.name: i for i, c in enumerate(graph.layers)}
    assert [[number[n] for n in s.layers] for s in before.stages] == [
        [number_after[n] for n in s.layers] for s in after.stages
    ]


def scaled(problem: PartitionProblem, factor: int) -> PartitionProblem:
    """All seconds times `factor`: of layers, and of links by their bandwidth and latency."""
    graph = problem.costs.model_copy(
        update={
            "layers": tuple(
                c.model_copy(
                    update={
                        "forward_seconds": c.forward_seconds * factor,
                        "backward_input_seconds": c.backward_input_seconds * factor,
                        "backward_weight_seconds": c.backward_weight_seconds * factor,
                    }
                )
                for c in problem.costs.layers
            )
        }
    )
    cluster = problem.cluster.model_copy(
        update={
            key: tuple(
                link.model_copy(
                    update={"bandwidth": link.bandwidth and link.bandwidth / factor, "latency": link.latency * factor}
                )
                for link in getattr(problem.cluster, key)
            )
            for key in ("levels", "links")
        }
    )
    return replace(
        problem,
        costs=GraphCosts.model_validate(graph.model_dump()),
        cluster=Cluster.model_validate(cluster.model_dump()),
    )


@pytest.mark.parametrize("name", NAMES)
@given(problem=problems())
@settings(max_examples=25)
def test_twice_the_cost_is_twice_the_objective(name: str, problem: PartitionProblem) -> None:
    problem = suited(name, problem)
    once, twice = attempt(name, problem), attempt(name, scaled(problem, 2))
    assert (once is None) == (twice is None)
    if once is None or twice is None:
        return
    assert twice.certificate.objective == 2 * once.certificate.objective
    assert twice.certificate.lower_bound == 2 * once.certificate.lower_bound


@pytest.mark.parametrize("name", EXACT_ON_CHAINS)
@given(problem=problems(cluster=clusters(is_uniform=True, limited=False), constrained=False))
@settings(max_examples=60)
def test_one_more_device_never_hurts(name: str, problem: PartitionProblem) -> None:
    assume(problem.fan_out == "tensor" or name == "exhaustive")  # chain is not exact otherwise
    level, device = problem.cluster.levels[0], problem.cluster.devices[0]
    larger = Cluster.uniform(problem.cluster.num_devices + 1, device, bandwidth=level.bandwidth, latency=level.latency)
    now, then = attempt(name, problem), attempt(name, replace(problem, cluster=larger))
    assert now is not None
    assert then is not None
    assert then.certificate.objective <= now.certificate.objective * (1 + ROUNDING)
