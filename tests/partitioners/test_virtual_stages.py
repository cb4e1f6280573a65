"""Several chunks on a device: never worse than contiguous stages, and what they gain is told."""

from __future__ import annotations

import functools
import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings

import pipeflow as pf
from pipeflow.errors import Infeasible, PlanError
from pipeflow.graphs.costs import GraphCosts, LayerCosts, TensorCosts
from pipeflow.graphs.formats.profile import Profile
from pipeflow.partitioners import PARTITIONERS
from pipeflow.partitioners.auto import search
from pipeflow.partitioners.objective import objective
from pipeflow.partitioners.partition import Partition
from pipeflow.partitioners.pins import Pin, Pins
from pipeflow.partitioners.problem import PartitionProblem
from pipeflow.partitioners.rounds import slots_of, stages_in_rounds
from pipeflow.partitioners.virtual_stages import interleave
from pipeflow.testing import check_partition, clusters, problems

DATA = Path(__file__).parents[2] / "../shared/data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the published workloads are no part of pipeflow")


def line(*seconds: float, parameters: int = 0) -> GraphCosts:
    names = [f"l{i}" for i in range(len(seconds))]
    return GraphCosts(
        inputs=(TensorCosts(name="x"),),
        layers=tuple(
            LayerCosts(
                name=name,
                inputs=(before,),
                outputs=(TensorCosts(name=name),),
                forward_seconds=s,
                parameter_bytes=parameters,
            )
            for name, before, s in zip(names, ["x", *names], seconds, strict=False)
        ),
    )


@pytest.mark.parametrize("partitioner", ["auto", "chain", "uniform", "exhaustive"])
def test_what_chunks_gain_is_reported_whoever_finds_the_contiguous_stages(partitioner: str) -> None:
    report = pf.partition(line(1.0, 2.0, 1.0), num_devices=2, max_replicas=1, chunks=2, partitioner=partitioner)
    assert report.stages == (("l0",), ("l1",), ("l2",))
    assert report.devices == ((0,), (1,), (0,))
    assert (report.chunks, report.objective, report.contiguous_objective) == (2, 2.0, 3.0)
    assert report.gain_over_contiguous == pytest.approx(1 / 3)


def test_one_chunk_is_contiguous() -> None:
    report = pf.partition(line(1.0, 2.0, 1.0), num_devices=2, max_replicas=1)
    assert (report.chunks, report.objective, report.contiguous_objective, report.gain_over_contiguous) == (1, 3, 3, 0)


def test_replicas_stay_where_virtual_stages_gain_nothing() -> None:
    report = pf.partition(line(1.0, 2.0, 1.0), num_devices=4, num_microbatches=4, chunks=2)
    assert report.objective == report.contiguous_objective == 1.0
    assert report.gain_over_contiguous == 0.0


def test_what_fits_in_two_chunks_alone_has_no_gain_to_tell() -> None:
    costs = GraphCosts(
        layers=tuple(
            LayerCosts(
                name=f"l{i}",
                inputs=(f"l{i - 1}",) if i else (),
                outputs=(TensorCosts(name=f"l{i}"),),
                forward_seconds=1.0,
                parameter_bytes=size,
            )
            for i, size in enumerate((3, 2, 1, 2))
        )
    )
    profile = Profile(format="sizes", costs=costs, memory="sizes", num_devices=2, memory_bytes=4)
    with pytest.raises(Infeasible):
        pf.partition(profile)
    report = pf.partition(profile, chunks=2)
    assert report.contiguous_objective is None
    assert report.gain_over_contiguous is None
    held = {0: 0, 1: 0}
    for stage, (device,) in zip(report.stages, report.devices, strict=True):
        held[device] += sum(costs.layer_by_name[name].parameter_bytes for name in stage)
    assert held == {0: 4, 1: 4}


@pytest.mark.parametrize(
    ("options", "story"),
    [
        ({"num_stages": 2}, "num_stages=2 with chunks=2"),
        ({"max_stages": 2}, "max_stages=2 with chunks=2"),
        ({"replicas": (1, 1)}, "replicas=.* with chunks=2"),
        ({"transfers": "relayed"}, "count transfers as 'added'"),
        ({"pins": Pins(on=(Pin(layer="l0", stage=0),))}, "set chunks=1"),
        ({"chunks": 0}, "chunks=0; it must be at least 1"),
    ],
)
def test_what_contradicts_chunks_is_refused(options: dict[str, object], story: str) -> None:
    arguments: dict[str, object] = {"num_devices": 2, "chunks": 2, **options}
    with pytest.raises(PlanError, match=story):
        pf.partition(line(1.0, 2.0, 1.0), **arguments)  # type: ignore[arg-type]  # drawn options


@given(problem=problems(cluster=clusters(min_devices=2, is_uniform=True)))
@settings(max_examples=60)
def test_moves_in_rounds_are_valid_and_never_worse(problem: PartitionProblem) -> None:
    """Without the solver, with whatever memory and replicas the problem has."""
    transfers = "added" if problem.transfers == "relayed" else problem.transfers
    problem = replace(problem, replicas=None, num_stages=None, max_stages=None, transfers=transfers)
    problem = replace(problem, pins=problem.pins.model_copy(update={"on": ()}), nested=False)
    contiguous: Partition | None
    try:
        contiguous = PARTITIONERS["chain"](problem)
    except Infeasible:
        contiguous = None
    two = replace(problem, chunks=2)
    found = interleave(two, contiguous, use_solver=False)
    assert found is not None or contiguous is None
    if found is not None:
        check_partition(found, two)
    if found is not None and contiguous is not None:
        assert found.certificate.objective <= contiguous.certificate.objective
        assert interleave(two, contiguous, use_solver=False) == found


@given(problem=problems(cluster=clusters(min_devices=2, is_uniform=True, limited=False), constrained=False))
@settings(max_examples=30)
def test_slots_and_stages_say_the_same(problem: PartitionProblem) -> None:
    problem = replace(problem, transfers="added", replicas=None, chunks=2, max_replicas=1)
    count = problem.atoms.count
    stages = stages_in_rounds(problem, [a * 2 * problem.cluster.num_devices // count for a in range(count)])
    slots = slots_of(problem, stages)
    assert slots == sorted(set(slots))
    assert [s % problem.cluster.num_devices for s in slots] == [stage.devices[0] for stage in stages]
    place = {n: s for s, stage in zip(slots, stages, strict=True) for n in stage.layers}
    again = stages_in_rounds(problem, [place[names[0]] for names in problem.atoms.members])
    assert objective(problem, again) == objective(problem, stages)


@needs_data
def test_a_published_workload_gains_by_its_own_judge() -> None:
    spec = importlib.util.spec_from_file_location("judge", DATA / "judge.py")
    assert spec is not None
    assert spec.loader is not None
    judge = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(judge)
    path = DATA / "dnn-partitioning/OperatorGraphs/bert_l-3_inference.json"
    report = pf.partition(path, format="dnn-partitioning", num_devices=3, chunks=2)
    sets: dict[int, list[int]] = {}
    for stage, devices in zip(report.stages, report.devices, strict=True):
        sets.setdefault(devices[0], []).extend(map(int, stage))
    judged = judge.bottleneck(json.loads(path.read_text()), list(sets.values()), contiguous=False)
    assert report.objective == pytest.approx(judged)
    assert report.gain_over_contiguous is not None
    assert report.gain_over_contiguous > 0.1


def test_a_graph_too_large_for_single_moves_is_moved_in_runs() -> None:
    """Its runs go round the devices, and the whole is still priced by the objective."""
    costs = line(*[1.0 + (i % 7) for i in range(4_500)])
    problem = PartitionProblem(
        costs=costs, cluster=pf.Cluster.uniform(2, bandwidth=1e9), max_replicas=1, num_microbatches=1, chunks=2
    )
    found = search(problem, use_solver=False)
    check_partition(found, problem)


def test_that_contiguous_stages_do_not_fit_proves_nothing_of_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers a stage at most: two stages on the one device hold three, whether the search finds them or not."""
    cut = functools.partial(pf.partition, line(1.0, 1.0, 1.0), num_devices=1, chunks=2, pins=Pins(max_layers=2))
    assert len(cut().stages) == 2
    monkeypatch.setattr("pipeflow.partitioners.virtual_stages.interleave", lambda *args, **options: None)
    with pytest.raises(Infeasible, match="with one stage on a device") as caught:
        cut()
    assert not caught.value.rules
