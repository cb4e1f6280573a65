"""pf.partition, normalisation, and the published workloads that are quick."""

from __future__ import annotations

import importlib.util
import json
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
