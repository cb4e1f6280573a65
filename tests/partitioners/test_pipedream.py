"""PipeDream's profiles under its own cost: drawn ones against its recurrence, and variants of published ones."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.judges import pipedream_best, pipedream_seconds
from pipeflow.errors import Infeasible, PlanError
from pipeflow.graphs.costs import GraphCosts, LayerCosts, TensorCosts
from pipeflow.partitioners import PARTITIONERS
from pipeflow.partitioners.cluster import Cluster, Device, Level, Link
from pipeflow.partitioners.objective import objective
from pipeflow.partitioners.partition import Stage
from pipeflow.partitioners.problem import PartitionProblem
from pipeflow.partitioning import PartitionReport, partition

DATA = Path(__file__).parents[2] / "../shared/data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the published workloads are no part of pipeflow")
ROUNDING = 1e-9


@st.composite
def profiles(draw: st.DrawFn) -> str:
    """A small profile: an input, nodes that read one or two earlier ones, some with several outputs."""
    count = draw(st.integers(1, 6))
    lines, edges = (
        ["node0 -- Input0 -- forward_compute_time=5, backward_compute_time=0, activation_size=7, parameter_size=0"],
        [],
    )
    for node in range(1, count + 1):
        size = draw(st.sampled_from(["0", "2e6", "5000000.0", "[1e6; 2e6]"]))
        lines.append(
            f"node{node} -- Conv2d(3, 64, kernel_size=(3, 3)) -- forward_compute_time={draw(st.integers(0, 6))}, "
            f"backward_compute_time={draw(st.integers(0, 6))}.5, activation_size={size}, "
            f"parameter_size={draw(st.sampled_from([0, 10**6, 8 * 10**6]))}"
        )
        for before in draw(st.sets(st.integers(max(0, node - 3), node - 1), min_size=1, max_size=2)):
            edges.append(f"\tnode{before} -- node{node}")
    return "\n".join([*lines, *edges]) + "\n"


def cut(path: Path, text: str, machines: list[int], bandwidths: list[float], **options: Any) -> PartitionReport:
    path.write_text(text)
    return partition(path, format="pipedream", num_devices=machines, bandwidth=bandwidths, **options)


def judged(text: str, found: PartitionReport, machines: list[int], bandwidths: list[float], **options: Any) -> float:
    return 1e3 * pipedream_seconds(
        text, found.stages, found.devices, machines=machines, bandwidths=bandwidths, **options
    )


@given(
    text=profiles(),
    machines=st.sampled_from([[1], [2], [3], [4], [2, 2], [3, 2], [1, 3], [2, 1], [2, 2, 2]]),
    bandwidths=st.sampled_from([[1e9, 2e8, 1e8], [1e10, 1e10, 1e9]]),
    transfers=st.booleans(),
    replicas=st.booleans(),
)
@settings(max_examples=80)
def test_reaches_and_proves_what_its_recurrence_gives(
    tmp_path_factory: pytest.TempPathFactory,
    text: str,
    machines: list[int],
    bandwidths: list[float],
    transfers: bool,
    replicas: bool,
) -> None:
    bandwidths = bandwidths[: len(machines)]
    best = 1e3 * pipedream_best(text, machines=machines, bandwidths=bandwidths, transfers=transfers, replicas=replicas)
    found = cut(
        tmp_path_factory.getbasetemp() / "drawn.graph.txt",
        text,
        machines,
        bandwidths,
        transfers="relayed" if transfers else None,
        max_replicas=None if replicas else 1,
    )
    assert found.objective == pytest.approx(best, rel=ROUNDING)
    assert judged(text, found, machines, bandwidths, transfers=transfers) == pytest.approx(best, rel=ROUNDING)
    assert found.gap < 1e-8


@given(text=profiles(), memory=st.sampled_from([0, 3 * 10**6, 10**7, 3 * 10**7]), replicas=st.booleans())
@settings(max_examples=30)
def test_stashes_fit(tmp_path_factory: pytest.TempPathFactory, text: str, memory: int, replicas: bool) -> None:
    path = tmp_path_factory.getbasetemp() / "drawn.graph.txt"
    machines, bandwidths = [3], [1e9]
    free = cut(path, text, machines, bandwidths, max_replicas=None if replicas else 1)
    # One stage holds no stash, so that something always fits.
    found = cut(path, text, machines, bandwidths, max_replicas=None if replicas else 1, memory_bytes=memory)
    assert judged(text, found, machines, bandwidths, memory=memory) == pytest.approx(found.objective, rel=ROUNDING)
    assert found.objective >= free.objective * (1 - ROUNDING)
    assert found.gap < 1e-8


def nested_problem(cluster: Cluster, **options: Any) -> PartitionProblem:
    costs = GraphCosts(
        layers=(LayerCosts(name="a", forward_seconds=3.0), LayerCosts(name="b", forward_seconds=1.0, parameter_bytes=8))
    )
    rules = {"nested": True, "reduce_every": "microbatch", "transfers": "free", "num_microbatches": 12, **options}
    return PartitionProblem(costs=costs, cluster=cluster, **rules)


def two_levels(**changes: Any) -> Cluster:
    devices = tuple(Device(name=f"d{i}") for i in range(4))
    values = {"devices": devices, "levels": (Level(size=2, bandwidth=16.0), Level(size=4, bandwidth=1.0)), **changes}
    return Cluster(**values)


def test_a_stage_inside_two_machines_is_replicated_over_both() -> None:
    problem = nested_problem(two_levels())
    stages = [Stage.replicated(["a"], [0, 2]), Stage.replicated(["b"], [1, 3])]
    # inside a machine max(3, 1); then both layers' 8 bytes over the outer links, shared by 2 devices: 2 * 1/2 * 8 / 2
    assert objective(problem, stages) == pytest.approx((3 + 4) / 2)
    # better: a machine each, a on both devices of its own
    assert PARTITIONERS["nested"](problem).certificate.objective == pytest.approx(1.5)


def test_with_too_many_ideals_those_near_the_best_cuts_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    draw, layers = random.Random(0), []
    for index in range(27):  # three chains: 10 ** 3 ideals
        inputs = (f"n{index - 3}",) if index >= 3 else ()
        output = TensorCosts(name=f"n{index}", bytes=0)
        layers.append(
            LayerCosts(name=f"n{index}", inputs=inputs, outputs=(output,), forward_seconds=draw.uniform(1, 30))
        )
    problem = replace(nested_problem(two_levels()), costs=GraphCosts(layers=tuple(layers)), max_replicas=1)
    found = PARTITIONERS["nested"](problem).certificate
    monkeypatch.setattr("pipeflow.partitioners.nested._ROUNDS", 0)
    assert found.objective < PARTITIONERS["nested"](problem).certificate.objective * 0.999
    assert found.gap < 0.01


@pytest.mark.parametrize(
    ("cluster", "options", "story"),
    [
        (two_levels(links=(Link(a=0, b=1),)), {}, "links of their own"),
        (two_levels(levels=(Level(size=2), Level(size=6))), {}, "full groups"),
        (Cluster.uniform(4, memory_bytes=10), {}, "memory is not counted"),
        (two_levels(), {"reduce_every": "iteration"}, "'microbatch', and 'relayed' or 'free'"),
        (two_levels(), {"transfers": "added"}, "'relayed' or 'free'"),
        (two_levels(), {"num_stages": 2}, "only max_replicas=1"),
        (two_levels(), {"even_replicas": True}, "may share unevenly"),
    ],
)
def test_what_cannot_be_nested_is_refused(cluster: Cluster, options: dict[str, Any], story: str) -> None:
    with pytest.raises(PlanError, match=story):
        nested_problem(cluster, **options)


@pytest.mark.parametrize("devices", [([0, 1, 2], [3]), ([0], [2]), ([0, 1], [1, 3])])
def test_stages_that_are_not_nested_have_no_price(devices: tuple[list[int], list[int]]) -> None:
    stages = [Stage.replicated(["a"], devices[0]), Stage.replicated(["b"], devices[1])]
    if devices == ([0], [2]):
        assert objective(nested_problem(two_levels()), stages) == 3.0  # one device of each machine
        return
    with pytest.raises(PlanError, match="not nested"):
        objective(nested_problem(two_levels()), stages)


@pytest.mark.parametrize("name", ["chain", "orders", "uniform", "exhaustive"])
def test_others_refuse_nested_levels(name: str) -> None:
    with pytest.raises(PlanError, match="'nested' and 'auto'"):
        PARTITIONERS[name](nested_problem(two_levels()))


def published() -> list[dict[str, Any]]:
    path = DATA / "pipedream/bottlenecks.json"
    return json.loads(path.read_text()) if path.is_file() else []


@needs_data
@pytest.mark.parametrize("entry", published(), ids=lambda e: f"{e['model']}-{e['machines']}-{''.join(e['options'])}")
def test_published_bottlenecks_are_never_exceeded(entry: dict[str, Any], tmp_path: Path) -> None:
    machines, bandwidths, options = entry["machines"], entry["bandwidth_Bps"], entry["options"]
    text = (DATA / f"pipedream/{entry['model']}.graph.txt").read_text()
    transfers = "--activation_compression_ratio" in options
    memory = 16 * 10**9 if "--use_memory_constraint" in options else None
    found = cut(
        tmp_path / "published.graph.txt",
        text,
        machines,
        bandwidths,
        transfers="relayed" if transfers else None,
        max_replicas=1 if "--straight_pipeline" in options else None,
        memory_bytes=memory,
    )
    rules = {"transfers": transfers, "memory": memory}
    assert judged(text, found, machines, bandwidths, **rules) == pytest.approx(found.objective, rel=ROUNDING)
    assert found.objective <= 1e3 * entry["bottleneck_stage_s"] * (1 + ROUNDING)


VARIANTS = [([3], [1e9]), ([16], [5e9]), ([5, 3], [2e10, 1e9]), ([2, 2, 2], [1e11, 1e10, 1e9])]


@needs_data
@pytest.mark.parametrize("model", ["vgg16", "gnmt", "resnet18"])
@pytest.mark.parametrize(("machines", "bandwidths"), VARIANTS)
@pytest.mark.parametrize("scale", [0.01, 100])
def test_variants_are_what_the_judge_says(
    model: str, machines: list[int], bandwidths: list[float], scale: float, tmp_path: Path
) -> None:
    text = (DATA / f"pipedream/{model}.graph.txt").read_text()
    text = re.sub(r"(_compute_time=)([\d.]+)", lambda m: f"{m[1]}{float(m[2]) * scale:.6f}", text)
    found = cut(tmp_path / "variant.graph.txt", text, machines, bandwidths, transfers="relayed")
    assert judged(text, found, machines, bandwidths, transfers=True) == pytest.approx(found.objective, rel=ROUNDING)
    assert found.lower_bound <= found.objective


@needs_data
def test_memory_that_cannot_suffice_for_a_stash(tmp_path: Path) -> None:
    text = (DATA / "pipedream/vgg16.graph.txt").read_text()
    found = cut(tmp_path / "vgg16.graph.txt", text, [4], [1e10], memory_bytes=10**9)
    assert judged(text, found, [4], [1e10], memory=10**9) == pytest.approx(found.objective, rel=ROUNDING)
    with pytest.raises(Infeasible):
        cut(tmp_path / "vgg16.graph.txt", text, [4], [1e10], memory_bytes=10**9, num_stages=4)
