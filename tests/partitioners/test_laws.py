"""What every row of PARTITIONERS must do, on drawn problems, with exhaustive search as the oracle."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipeflow.errors import Infeasible
from pipeflow.partitioners import PARTITIONERS
from pipeflow.partitioners.cluster import Cluster
from pipeflow.partitioners.partition import Partition
from pipeflow.partitioners.pins import Pins
from pipeflow.partitioners.problem import PartitionProblem, holds_nothing, one_version
from pipeflow.testing.drawn_problems import clusters, costs, problems
from pipeflow.testing.partitioners import check_partitioner
from pipeflow.testing.partitions import check_partition

SOLVERS = {"cpsat": "ortools", "milp": "scipy"}
OTHERS = {"nested", "variants"}  # for problems of their own, in test_pipedream.py and test_piper.py
NAMES = sorted(n for n in PARTITIONERS if n not in OTHERS and (n not in SOLVERS or find_spec(SOLVERS[n])))
EXACT_ON_CHAINS = ["chain", "exhaustive"]
ROUNDING = 1e-9


def without_stages(pins: Pins) -> Pins:
    return pins.model_copy(update={"on": tuple(pin for pin in pins.on if pin.stage is None)})


def together_only(pins: Pins) -> Pins:
    return Pins(together=pins.together, no_cut=pins.no_cut)


def suited(name: str, problem: PartitionProblem) -> PartitionProblem:
    """The problem without what the algorithm refuses."""
    if name not in ("beam", "cpsat", "ideals", "milp"):
        return problem
    if name == "milp":
        problem = replace(problem, in_flight=holds_nothing)
    placed = any(pin.device is not None for pin in problem.pins.on)
    may_replicate = name == "ideals" and problem.max_stages is None and not placed
    device, level = problem.cluster.devices[0], problem.cluster.levels[-1]
    return replace(
        problem,
        cluster=Cluster.uniform(problem.cluster.num_devices, device, bandwidth=level.bandwidth, latency=level.latency),
        max_replicas=problem.max_replicas if may_replicate else 1,
        replicas=None,
        num_stages=problem.num_stages if name == "cpsat" else None,
        transfers=problem.transfers
        if name == "ideals" or (name, problem.transfers) == ("beam", "overlapped") or problem.transfers == "free"
        else "added",
        weight_versions=problem.weight_versions if name in ("beam", "ideals") else one_version,
        pins=together_only(problem.pins)
        if name == "beam"
        else problem.pins
        if name == "cpsat"
        else without_stages(problem.pins),
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
@settings(max_examples=60)
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
@settings(max_examples=20)
def test_deterministic_blind_to_names_and_to_scale(name: str, problem: PartitionProblem) -> None:
    check_partitioner(PARTITIONERS[name], suited(name, problem))


@pytest.mark.parametrize("name", EXACT_ON_CHAINS)
@given(problem=problems(cluster=clusters(is_uniform=True, limited=False), constrained=False))
@settings(max_examples=40)
def test_one_more_device_never_hurts(name: str, problem: PartitionProblem) -> None:
    assume(problem.fan_out == "tensor" or name == "exhaustive")  # chain is not exact otherwise
    level, device = problem.cluster.levels[0], problem.cluster.devices[0]
    larger = Cluster.uniform(problem.cluster.num_devices + 1, device, bandwidth=level.bandwidth, latency=level.latency)
    now, then = attempt(name, problem), attempt(name, replace(problem, cluster=larger))
    assert now is not None
    assert then is not None
    assert then.certificate.objective <= now.certificate.objective * (1 + ROUNDING)


@pytest.mark.skipif(find_spec("ortools") is None, reason="needs OR-tools")
@given(problem=problems(cluster=clusters(min_devices=2, max_devices=3, is_uniform=True, limited=False)))
@settings(max_examples=12)
def test_two_chunks_are_no_worse_than_one(problem: PartitionProblem) -> None:
    free = replace(problem, max_replicas=1, replicas=None, num_stages=None, max_stages=None, pins=Pins())
    one = replace(free, transfers="added")
    two = replace(one, chunks=2)
    before, after = attempt("auto", one), attempt("auto", two)
    assert before is not None
    assert after is not None
    check_partition(after, two)
    assert after.certificate.objective <= before.certificate.objective * (1 + ROUNDING)


@given(problem=problems(cluster=clusters(is_uniform=True, max_devices=5)))
@settings(max_examples=400)
def test_ideals_are_optimal_and_know_what_is_infeasible(problem: PartitionProblem) -> None:
    """Replicas, stashes and whatever memory depends on where a stage stands: nothing is left to luck."""
    problem = replace(suited("ideals", problem), max_stages=None, fan_out="tensor")
    found, best = attempt("ideals", problem), attempt("exhaustive", problem)
    assert (found is None) == (best is None)
    if found is not None and best is not None:
        assert found.certificate.objective == pytest.approx(best.certificate.objective, rel=1e-8)
        assert found.certificate.gap < 1e-8


ANY = ["chain", "orders", "moves", "auto"]
LIMITED = [
    *((name, "unlike devices") for name in ANY),
    *((name, "replicas") for name in (*ANY, "ideals")),
    *((name, "one replica") for name in ("beam", "cpsat", "ideals", "milp") if name in NAMES),
]


@pytest.mark.parametrize(("name", "kind"), LIMITED)
@given(data=st.data())
@settings(max_examples=25)
def test_memory_is_kept_on_unlike_devices_and_with_replicas(name: str, kind: str, data: st.DataObject) -> None:
    """Every device limited, seldom with room to spare: a cut is valid, or the row says why there is none."""
    cluster = clusters(min_devices=2, is_uniform=kind != "unlike devices", limited=True)
    problem = data.draw(problems(graphs=costs(min_layers=3, max_layers=6), cluster=cluster))
    if kind == "replicas":
        problem = replace(problem, max_replicas=None, max_stages=None, replicas=None, num_stages=None)
    problem = suited(name, problem)
    found, best = attempt(name, problem), attempt("exhaustive", problem)
    if found is None:
        assert best is None or name != "ideals", "an exact row found nothing where there is a partition"
        return
    assert best is not None
    check_partition(found, problem)
    optimum = best.certificate.objective
    assert found.certificate.lower_bound <= optimum * (1 + ROUNDING)
    assert found.certificate.objective >= optimum * (1 - ROUNDING)


@pytest.mark.parametrize("name", [n for n in ("chain", "orders", "moves", "cpsat") if n in NAMES])
@given(problem=problems(cluster=clusters(min_devices=2, max_devices=3, is_uniform=True, limited=False)))
@settings(max_examples=20)
def test_several_chunks_on_a_device(name: str, problem: PartitionProblem) -> None:
    """A cut for two rounds is valid, and what it proves holds for `auto`'s too."""
    problem = replace(problem, max_replicas=1, replicas=None, num_stages=None, max_stages=None, transfers="added")
    problem = replace(problem, chunks=2, pins=Pins())
    found = attempt(name, problem)
    assert found is not None
    check_partition(found, problem)
    other = PARTITIONERS["auto"](problem)
    assert found.certificate.lower_bound <= other.certificate.objective * (1 + ROUNDING)


@given(problem=problems(cluster=clusters(min_devices=2)))
@settings(max_examples=60)
def test_moves_never_lose_what_they_started_from(problem: PartitionProblem) -> None:
    start, found = attempt("chain", problem), attempt("moves", problem)
    assert (start is None) == (found is None)
    if start is not None and found is not None:
        assert found.certificate.objective <= start.certificate.objective
        assert len(found.stages) == len(start.stages)
