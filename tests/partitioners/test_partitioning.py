"""pf.partition, normalisation, and the published workloads that are quick."""

from __future__ import annotations

import importlib.util
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings

from pipeflow.errors import FormatError, Infeasible, PlanError
from pipeflow.graphs.costs import GraphCosts, LayerCosts, TensorCosts
from pipeflow.graphs.formats import FORMATS
from pipeflow.graphs.formats.profile import Profile
from pipeflow.partitioners import PARTITIONERS
from pipeflow.partitioners.bounds import cut_bound
from pipeflow.partitioners.cluster import Cluster
from pipeflow.partitioners.exhaustive import exhaustive
from pipeflow.partitioners.normalise import fold
from pipeflow.partitioners.problem import PartitionProblem
from pipeflow.partitioning import partition
from pipeflow.testing.drawn_problems import clusters, problems
from pipeflow.testing.hand import chain_costs

DATA = Path(__file__).parents[2] / "../shared/data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the published workloads are no part of pipeflow")

COSTS = GraphCosts(
    layers=tuple(
        LayerCosts(name=n, inputs=i, outputs=(TensorCosts(name=n, bytes=10),), forward_seconds=s)
        for n, i, s in (("a", (), 1.0), ("b", ("a",), 2.0), ("c", ("a",), 3.0), ("d", ("b", "c"), 1.0))
    )
)


@given(problem=problems(cluster=clusters(is_uniform=True)))
@settings(max_examples=80)
def test_folding_keeps_the_optimum(problem: PartitionProblem) -> None:
    problem = replace(problem, max_replicas=1, replicas=None, num_stages=None, transfers="added")
    smaller = fold(problem)
    try:
        before = exhaustive(problem).certificate.objective
    except Infeasible:
        with pytest.raises(Infeasible):
            exhaustive(smaller)
        return
    assert exhaustive(smaller).certificate.objective == pytest.approx(before, rel=1e-9)
    assert cut_bound(smaller) <= before * (1 + 1e-9)


def test_report_is_in_the_units_of_the_file() -> None:
    profile = Profile(format="pipeflow", costs=COSTS, seconds_per_unit=0.5)
    report = partition(profile, num_devices=2, max_replicas=1)
    assert report.objective == 8.0
    assert set(json.loads(report.model_dump_json())) == {
        "objective",
        "lower_bound",
        "gap",
        "seconds",
        "partitioner",
        "stages",
        "replicas",
        "devices",
        "degrees",
        "variants",
        "chunks",
        "contiguous_objective",
        "gain_over_contiguous",
    }
    assert sorted(n for stage in report.stages for n in stage) == list("abcd")
    assert partition(COSTS, num_devices=2, max_replicas=1, partitioner=PARTITIONERS["uniform"]).partitioner == "uniform"


def test_a_partitioner_must_give_a_partition() -> None:
    with pytest.raises(PlanError, match="gave a NoneType; it must return a Partition"):
        partition(chain_costs(2), num_devices=2, partitioner=lambda problem: None)  # type: ignore[arg-type, return-value]


def test_contradictions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="number of devices"):
        partition(COSTS)
    with pytest.raises(PlanError, match="no partitioner"):
        partition(COSTS, num_devices=2, partitioner="best")
    with pytest.raises(FormatError, match="no format"):
        partition(tmp_path / "x", format="onnx")
    with pytest.raises(FormatError, match="not a file"):
        partition(tmp_path / "x", format="piper")
    with pytest.raises(Infeasible, match="run on no accelerator"):
        partition(Profile(format="x", costs=COSTS, unsupported=("b",)), num_devices=2)


@needs_data
@pytest.mark.parametrize("name", ["LayerGraphs/bert24_training", "LayerGraphs/resnet50_training"])
@pytest.mark.parametrize("count", [4, 8])
def test_published_optima_are_reached_and_proved(name: str, count: int) -> None:
    root = DATA / "dnn-partitioning"
    optimum = json.loads((root / "optima.json").read_text())[name]["contiguous"][str(count)]["optimum"]
    report = partition(root / f"{name}.json", format="dnn-partitioning", num_devices=count)
    assert report.objective == pytest.approx(optimum, rel=1e-6)
    assert report.gap < 1e-6
    spec = importlib.util.spec_from_file_location("judge", DATA / "judge.py")
    assert spec is not None
    assert spec.loader is not None
    judge = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(judge)
    workload = json.loads((root / f"{name}.json").read_text())
    assert judge.bottleneck(workload, [[int(n) for n in s] for s in report.stages]) == pytest.approx(report.objective)


@needs_data
def test_memory_that_cannot_suffice_is_told() -> None:
    path = DATA / "dnn-partitioning/LayerGraphs/resnet50_training.json"
    assert FORMATS["dnn-partitioning"](path).memory_bytes == 17185374208
    with pytest.raises(Infeasible, match=r"lack 4.1 GiB"):
        partition(path, format="dnn-partitioning", num_devices=2)


@pytest.mark.parametrize(
    ("options", "story"),
    [
        ({"num_devices": 0}, r"num_devices=\(0,\)"),
        ({"num_devices": 1.5}, r"num_devices=\(1.5,\)"),
        ({"bandwidth": 0}, "bandwidth=0; give bytes per second"),
        ({"bandwidth": math.nan}, "bandwidth=nan; give bytes per second"),
        ({"memory_bytes": -1}, "memory_bytes=-1; give a finite number"),
        ({"memory_bytes": math.inf}, "memory_bytes=inf; give a finite number"),
        ({"latency": -1.0}, "latency=-1.0; give seconds"),
        ({"num_microbatches": 0}, "num_microbatches=0; it must be at least 1"),
        ({"num_stages": 1.5}, "num_stages=1.5; it must be at least 1, and a whole number"),
        ({"transfers": "slow"}, "transfers='slow'; known are added"),
    ],
)
def test_amounts_that_make_no_sense_are_refused(options: dict[str, object], story: str) -> None:
    arguments: dict[str, object] = {"num_devices": 2, **options}
    with pytest.raises(PlanError, match=story):
        partition(GraphCosts(layers=(LayerCosts(name="a"),)), **arguments)  # type: ignore[arg-type]  # wrong on purpose


def test_links_do_not_change_transfers_that_a_file_gives_as_times(tmp_path: Path) -> None:
    """Bytes are made up for them; any other bandwidth, or none, would silently give other times."""
    nodes = [{"id": i, "supportedOnFpga": 1, "fpgaLatency": 4.0, "isBackwardNode": 0, "size": 1.0} for i in (0, 1)]
    edges = [{"sourceId": 0, "destId": 1, "cost": 3.0}]
    path = tmp_path / "two.json"
    path.write_text(json.dumps({"maxSizePerFPGA": 2.0, "maxFPGAs": 2, "nodes": nodes, "edges": edges}))
    for cluster in (None, Cluster.uniform(2), Cluster(devices=Cluster.uniform(2).devices)):
        report = partition(path, format="dnn-partitioning", cluster=cluster)
        assert report.objective == pytest.approx(7.0)
    for options in ({"bandwidth": 1e9}, {"cluster": Cluster.uniform(2, bandwidth=1e9)}):
        with pytest.raises(PlanError, match="how long its transfers take"):
            partition(path, format="dnn-partitioning", **options)
