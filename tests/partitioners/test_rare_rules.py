"""Problems that few partitioners take: unordered layers, variants, nested levels, several chunks, hardly any memory.

The oracle is every partition, one by one (`pipeflow.testing.enumeration`), which shares no search with any row.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeflow.errors import Infeasible, PlanError
from pipeflow.graphs.costs import GraphCosts, LayerCosts, TensorCosts, Variant
from pipeflow.partitioners import PARTITIONERS
from pipeflow.partitioners.cluster import Cluster, Level
from pipeflow.partitioners.exhaustive import is_feasible
from pipeflow.partitioners.infeasible import explained, is_impossible
from pipeflow.partitioners.pins import Pins
from pipeflow.partitioners.problem import PartitionProblem, one_version
from pipeflow.testing.drawn_problems import clusters, costs, problems
from pipeflow.testing.enumeration import least_objective
from pipeflow.testing.partitioners import check_partitioner
from pipeflow.testing.partitions import check_partition
from tests.partitioners.test_laws import NAMES, suited

GRAPHS = costs(min_layers=2, max_layers=4)
CLUSTERS = clusters(max_devices=3)
ROUNDING = 1e-9


def for_variants(problem: PartitionProblem) -> PartitionProblem:
    """The problem without what `variants` refuses."""
    device = problem.cluster.devices[0].model_copy(update={"speed_by_kind": {}})
    return replace(
        problem,
        cluster=Cluster.uniform(problem.cluster.num_devices, device, bandwidth=problem.cluster.levels[-1].bandwidth),
        transfers="free" if problem.transfers == "free" else "added",
        num_stages=None,
        max_stages=None,
        replicas=None,
        pins=Pins(),
        weight_versions=one_version,
        holds_received=False,
    )


def test_devices_that_share_a_layer_count_beside_replicas() -> None:
    """Two stages of one replica, one of them on two devices: three devices, which max_replicas=1 does not forbid."""
    layers = (
        LayerCosts(name="a", outputs=(TensorCosts(name="a"),), forward_seconds=1.0),
        LayerCosts(name="b", inputs=("a",), variants=(Variant(name="keep", degree=2, seconds=1.0),)),
    )
    problem = PartitionProblem(
        costs=GraphCosts(layers=layers), cluster=Cluster.uniform(3), max_replicas=1, holds_received=False
    )
    found = PARTITIONERS["variants"](problem)
    assert [(stage.layers, stage.degree) for stage in found.stages] == [(("a",), 1), (("b",), 2)]
    assert found.certificate.objective == 1.0


@pytest.mark.parametrize(("ratio", "memory"), [(2.0, 8192), (1.5, 7168)])
def test_a_layer_without_variants_holds_no_more_than_its_parameters_and_state(ratio: float, memory: int) -> None:
    """To the byte: two layers of 1024 bytes of parameters with as many of gradients and state on one device."""
    layers = (
        LayerCosts(name="a", outputs=(TensorCosts(name="a"),), forward_seconds=1.0, parameter_bytes=1024),
        LayerCosts(name="b", inputs=("a",), forward_seconds=1.0, parameter_bytes=1024),
        LayerCosts(name="c", variants=(Variant(name="keep", seconds=1.0),)),
    )
    problem = PartitionProblem(
        costs=GraphCosts(layers=layers),
        cluster=Cluster.uniform(1, memory_bytes=memory),
        optimizer_ratio=ratio,
        holds_received=False,
    )
    assert PARTITIONERS["variants"](problem).certificate.objective == 3.0
    with pytest.raises(Infeasible):
        PARTITIONERS["variants"](replace(problem, cluster=Cluster.uniform(1, memory_bytes=memory - 1)))


@given(problem=problems(graphs=GRAPHS, cluster=CLUSTERS, variants=True, together=True))
@settings(max_examples=40)
def test_ways_to_run_layers(problem: PartitionProblem) -> None:
    check_partitioner(PARTITIONERS["variants"], for_variants(problem))


@given(problem=problems(graphs=GRAPHS, cluster=CLUSTERS, variants=True, tight=True))
@settings(max_examples=60)
def test_ways_to_run_layers_where_memory_hardly_suffices(problem: PartitionProblem) -> None:
    """Nothing that fits is called infeasible, and no bound is above what fits."""
    problem = for_variants(problem)
    least = least_objective(problem)
    try:
        found = PARTITIONERS["variants"](problem).certificate
    except Infeasible:
        assert least is None
        return
    assert least is not None
    assert found.lower_bound <= least * (1 + ROUNDING)
    assert found.objective >= least * (1 - ROUNDING)


@given(problem=problems(graphs=GRAPHS, nested=True, together=True))
@settings(max_examples=40)
def test_levels_one_inside_the_other(problem: PartitionProblem) -> None:
    check_partitioner(PARTITIONERS["nested"], problem, exact=True)


def test_no_rule_is_said_to_leave_no_way_to_run_a_layer() -> None:
    """As its other costs have it the layer fits no device; in its variant it does. Nothing proves the contrary."""
    layers = (
        LayerCosts(name="a", parameter_bytes=4096, variants=(Variant(name="keep", resident_bytes=16),)),
        LayerCosts(name="b", variants=(Variant(name="keep", degree=2),)),
    )
    cluster = Cluster.uniform(2, memory_bytes=1024)
    problem = PartitionProblem(costs=GraphCosts(layers=layers), cluster=cluster, holds_received=False)
    with pytest.raises(Infeasible) as caught:
        PARTITIONERS["variants"](problem)
    assert explained(problem, caught.value) is caught.value
    assert not is_impossible(problem)
    with pytest.raises(PlanError, match="does not look at"):
        is_feasible(problem)


def test_degrees_that_no_cut_has_are_named() -> None:
    layers = (LayerCosts(name="a"), LayerCosts(name="b", variants=(Variant(name="keep", degree=2),)))
    problem = PartitionProblem(costs=GraphCosts(layers=layers), cluster=Cluster.uniform(2), holds_received=False)
    with pytest.raises(Infeasible, match="stages of like degrees fits 2 devices"):
        PARTITIONERS["variants"](problem)


CHUNKED = ["auto", "chain", "exhaustive", "moves", "orders", "uniform"]


def line(count: int) -> GraphCosts:
    return GraphCosts(
        layers=tuple(
            LayerCosts(name=f"l{i}", inputs=(f"l{i - 1}",) if i else (), outputs=(TensorCosts(name=f"l{i}"),))
            for i in range(count)
        )
    )


@pytest.mark.parametrize("name", CHUNKED)
def test_a_device_that_holds_two_stages_does_not_prove_that_there_is_none(name: str) -> None:
    """Two layers a stage at most, or three stages: one device of two chunks, or two, can hold that."""
    few = PartitionProblem(costs=line(3), cluster=Cluster.uniform(1), chunks=2, pins=Pins(max_layers=2))
    three = PartitionProblem(costs=line(3), cluster=Cluster.uniform(2), chunks=2, num_stages=3)
    for problem in (few, three):
        assert least_objective(problem) is not None
        try:
            check_partition(PARTITIONERS[name](problem), problem)
        except Infeasible as error:  # most look at one stage on a device alone
            assert not error.rules
            assert "needs a device of its own" not in str(error) or "with one stage on a device" in str(error)


@pytest.mark.parametrize("name", CHUNKED)
def test_more_stages_than_chunks_have_places_for(name: str) -> None:
    problem = PartitionProblem(costs=line(6), cluster=Cluster.uniform(2), chunks=2, num_stages=5)
    with pytest.raises(Infeasible, match="5 stages, but the cluster has 2 devices for 2 chunks each"):
        PARTITIONERS[name](problem)


@pytest.mark.parametrize("name", CHUNKED)
@given(problem=problems(graphs=costs(min_layers=2, max_layers=3), cluster=CLUSTERS, chunks=True))
@settings(max_examples=12)
def test_two_chunks_on_unlike_devices(name: str, problem: PartitionProblem) -> None:
    """Stages go round the devices in order, as often as there are chunks; what is proved of one chunk is not used."""
    check_partitioner(PARTITIONERS[name], problem)


@given(
    problem=st.one_of(
        problems(graphs=GRAPHS, cluster=CLUSTERS),
        problems(graphs=GRAPHS, cluster=CLUSTERS, pinned=True),
        problems(graphs=GRAPHS, cluster=CLUSTERS, together=True, tight=True),
        problems(graphs=GRAPHS, cluster=CLUSTERS, together=True, unordered=True),
        problems(graphs=GRAPHS, cluster=CLUSTERS, copies=True),
    )
)
@settings(max_examples=200)
def test_the_oracle_against_every_partition(problem: PartitionProblem) -> None:
    """Two searches that share nothing but the objective: one knows ideals and bounds, the other tries everything."""
    least = least_objective(problem)
    try:
        found = PARTITIONERS["exhaustive"](problem)
    except Infeasible:
        assert least is None
        return
    check_partition(found, problem)
    assert least == pytest.approx(found.certificate.objective, rel=ROUNDING)


@pytest.mark.parametrize("name", NAMES)
@given(
    problem=st.one_of(
        problems(graphs=GRAPHS, cluster=CLUSTERS, together=True, tight=True),
        problems(graphs=GRAPHS, cluster=CLUSTERS, together=True, unordered=True),
        problems(graphs=GRAPHS, cluster=CLUSTERS, copies=True),
    )
)
@settings(max_examples=16)
def test_groups_together_layers_unordered_copies_and_hardly_any_memory(name: str, problem: PartitionProblem) -> None:
    check_partitioner(PARTITIONERS[name], suited(name, problem))


@pytest.fixture
def few_ideals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three ideals are already too many for `nested` to look at all of them."""
    monkeypatch.setattr(import_module("pipeflow.partitioners.nested"), "_MOST_IDEALS", 3)


@pytest.mark.usefixtures("few_ideals")
def test_shares_of_nested_levels_multiply() -> None:
    """Of 2 micro-batches 4 flat replicas run a half each; on 2 of 2 groups they run a quarter, and the bound knows."""
    layers = tuple(LayerCosts(name=f"l{i}", forward_seconds=s) for i, s in enumerate((5.0, 6.0, 2.0)))
    problem = PartitionProblem(
        costs=GraphCosts(layers=layers),
        cluster=Cluster(devices=Cluster.uniform(4).devices, levels=(Level(size=2), Level(size=4))),
        num_microbatches=2,
        nested=True,
        reduce_every="microbatch",
        transfers="free",
    )
    assert PARTITIONERS["nested"](problem).certificate.objective == 13 / 4


@given(problem=problems(graphs=costs(min_layers=3, max_layers=4), nested=True))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@pytest.mark.usefixtures("few_ideals")
def test_nested_bounds_hold_where_not_all_ideals_are_looked_at(problem: PartitionProblem) -> None:
    check_partitioner(PARTITIONERS["nested"], problem)
