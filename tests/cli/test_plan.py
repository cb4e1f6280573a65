from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from torch import nn

from pipeflow.cli import cli
from pipeflow.errors import PlanError
from pipeflow.execution_plan import Plan
from pipeflow.graphs import LayerGraph, lazy
from pipeflow.graphs.costs import SharedTensor
from pipeflow.partitioners.cluster import Cluster
from tests.cli.conftest import chain_costs


def save_graph(path: Path) -> Path:
    graph = LayerGraph("tiny")
    hidden = graph.add("first", lazy(nn.Linear, 4, 8), graph.input("x", ("B", 4)))
    graph.loss("loss", nn.functional.cross_entropy, hidden, graph.input("label", ("B",), dtype="int64"))
    graph.save(path)
    return path


def test_costs_are_planned_and_the_plan_is_written(costs_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "plan.json"
    arguments = ["plan", str(costs_file), "--devices", "3", "--batch-size", "8", "--stages", "3", "-o", str(output)]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0, done.output
    plan = Plan.load(output)
    assert [stage.num_replicas for stage in plan.stages] == [1, 1, 1]
    assert plan.batch_size == 8
    assert plan.digest[:12] in done.stdout
    assert done.stderr == ""


def test_json_is_the_plan_itself_and_other_commands_read_it(costs_file: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["plan", str(costs_file), "--devices", "2", "--batch-size", "4", "--json"])
    assert done.exit_code == 0, done.output
    path = tmp_path / "plan.json"
    path.write_text(done.stdout)
    assert CliRunner().invoke(cli, ["verify", str(path)]).exit_code == 0
    assert CliRunner().invoke(cli, ["simulate", str(path)]).exit_code == 0


def test_layers_that_share_weights_are_apart_where_it_is_asked_for(tmp_path: Path) -> None:
    costs = chain_costs(4)
    tied = SharedTensor(name="l0.weight", layers=("l0", "l3"), bytes=100)
    path = tmp_path / "tied.json"
    path.write_text(costs.model_copy(update={"colocated": (("l0", "l3"),), "shared": (tied,)}).model_dump_json())
    arguments = ["plan", str(path), "--devices", "2", "--batch-size", "8", "--stages", "2"]
    together = CliRunner().invoke(cli, arguments)
    assert together.exit_code == 1  # what lies between the two goes where they go, so there is one stage
    apart = CliRunner().invoke(cli, [*arguments, "--shared", "copies"])
    assert apart.exit_code == 0, apart.output
    assert "stages 0, 1 keep copies of l0.weight" in apart.stdout


def test_the_same_call_gives_the_same_plan(costs_file: Path) -> None:
    arguments = ["plan", str(costs_file), "--devices", "3", "--batch-size", "8", "--json"]
    first, second = (CliRunner().invoke(cli, arguments).stdout for _ in range(2))
    assert first == second


def test_options_reach_the_plan(costs_file: Path) -> None:
    options = "--batch-size 12 --microbatches 6 --replicas 2,1 --partitioner chain --schedule gpipe --memory 1MiB"
    done = CliRunner().invoke(cli, ["plan", str(costs_file), "--devices", "3", *options.split(), "--json"])
    assert done.exit_code == 0, done.output
    plan = Plan.model_validate_json(done.stdout)
    assert [stage.num_replicas for stage in plan.stages] == [2, 1]
    assert (plan.num_microbatches, plan.schedule, plan.certificate.partitioner) == (6, "gpipe", "chain")
    assert {device.memory_bytes for device in plan.cluster.devices} == {2**20}


def test_a_cluster_file_says_what_there_is(costs_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "cluster.json"
    cluster = Cluster.uniform(2, bandwidth=1e6, latency=1e-3)
    cluster.save(path)
    done = CliRunner().invoke(cli, ["plan", str(costs_file), "--cluster", str(path), "--batch-size", "4", "--json"])
    assert done.exit_code == 0, done.output
    assert Plan.model_validate_json(done.stdout).cluster == cluster


def test_devices_and_a_cluster_contradict_each_other(costs_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "cluster.json"
    Cluster.uniform(2).save(path)
    arguments = ["plan", str(costs_file), "--cluster", str(path), "--devices", "2", "--batch-size", "4"]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 2
    assert "give one" in done.stderr


def test_what_does_not_fit_is_a_negative_result(costs_file: Path) -> None:
    arguments = ["plan", str(costs_file), "--devices", "2", "--batch-size", "4", "--memory", "100"]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 1
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    done = CliRunner().invoke(cli, [*arguments, "--json"])
    assert done.exit_code == 1
    assert json.loads(done.stdout)["feasible"] is False
    assert json.loads(done.stdout)["reasons"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--devices", "2"], "give --batch-size"),
        (["--batch-size", "4", "--replicas", "two"], "write for example 2,1"),
        (["--batch-size", "4", "--memory", "lots"], "write for example"),
        (["--batch-size", "4", "--partitioner", "none"], "is no partitioner"),
        (["--batch-size", "4", "--schedule", "none"], "is no schedule"),
        (["--batch-size", "4", "--profile-cache", "cache.json"], "leave it out"),
        (["--batch-size", "4", "--allow", "mine"], "leave it out"),
        (["--batch-size", "4", "--stages", "0"], "--stages"),
    ],
)
def test_a_wrong_call_is_refused_in_one_message(costs_file: Path, arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(cli, ["plan", str(costs_file), *arguments])
    assert done.exit_code == 2
    assert message in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "costs.json", "--devices", "2", "--batch-size", "4", "-o"],
        ["plan", "costs.json", "--devices", "2", "--batch-size", "4", "--profile-cache"],
        ["train", "recipe.py", "--profile-cache"],
        ["simulate", "plan.json", "--trace"],
        ["explain", "plan.json", "--svg"],
    ],
)
def test_a_file_that_cannot_be_written_is_found_before_the_work(
    arguments: list[str], costs_file: Path, plan_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(costs_file.parent)
    for path, words in (("nowhere/file.json", "there is no folder 'nowhere'"), (".", "is a directory")):
        done = CliRunner().invoke(cli, [*arguments, path])
        assert done.exit_code == 2
        assert words in done.stderr
        assert done.stdout == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "has the format None"),
        ("nonsense", "is not JSON"),
        ('{"format": "pipeflow-plan-1"}', "has the format 'pipeflow-plan-1'"),
        ('{"format": "pipeflow-costs-1"}', "is not a costs file"),
    ],
)
def test_a_file_that_cannot_be_planned_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "source.json"
    path.write_text(text)
    done = CliRunner().invoke(cli, ["plan", str(path), "--batch-size", "4"])
    assert done.exit_code == 2
    assert message in done.stderr


def test_a_graph_file_is_measured_and_planned(tmp_path: Path) -> None:
    source, cache = save_graph(tmp_path / "graph.json"), tmp_path / "cache.json"
    arguments = ["plan", str(source), "--devices", "2", "--batch-size", "4", "--profile-cache", str(cache), "--json"]
    first, second = (CliRunner().invoke(cli, arguments) for _ in range(2))
    assert first.exit_code == 0, first.output
    assert Plan.model_validate_json(first.stdout).graph_digest == LayerGraph.load(source).digest
    assert first.stdout == second.stdout  # measured once, kept in the cache


def test_planning_from_costs_never_loads_torch(costs_file: Path) -> None:
    script = f"""
import sys
from click.testing import CliRunner
from pipeflow.cli import cli
from pipeflow.errors import PlanError
done = CliRunner().invoke(cli, ["plan", {str(costs_file)!r}, "--devices", "2", "--batch-size", "4"])
assert done.exit_code == 0, done.output
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_plan_keeps_its_pins(costs_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    command = ["plan", str(costs_file), "--devices", "3", "--batch-size", "6", "--output", str(path)]
    done = CliRunner().invoke(cli, [*command, "--pin", "l0=device:1", "--pin", "l4=stage:-1", "--apart", "l0,l4"])
    assert done.exit_code == 0, done.output
    plan = Plan.load(path)
    assert plan.pins.apart == (("l0", "l4"),)
    assert 1 in plan.stages[plan.stage_by_layer["l0"]].devices
    text = path.read_text().replace('"stage": -1', '"stage": 0')
    path.write_text(text)
    with pytest.raises(PlanError, match="pinned to stage 0, but is on stage 1"):
        Plan.load(path)
