from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from pipeflow.cli import cli

ROOT = Path(__file__).resolve().parent.parent.parent
DIGITS = ROOT / "examples" / "digits.py"
GAN = ROOT / "examples" / "gan.py"

TINY = """
import torch
from torch import nn
import pipeflow as pf

def graph():
    graph = pf.LayerGraph("tiny")
    hidden = graph.input("x", ("B", 4))
    for i in range(3):
        hidden = graph.add(f"l{i}", pf.lazy(LAYER, 4, 4), hidden)
    graph.loss("loss", nn.functional.mse_loss, hidden, graph.input("y", ("B", 4)))
    return graph

def batches(epoch, seed):
    generator = torch.Generator().manual_seed(1000 * seed + epoch)
    for size in (6, 6, 2):
        x = torch.randn(size, 4, generator=generator)
        yield {"x": x, "y": x.flip(1)}

def recipe():
    return pf.Recipe(
        name="tiny", graph=graph, train_batches=batches, test_batches=lambda: batches(99, 99),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
        batch_size=6, num_epochs=2, num_devices=2, num_stages=2, replicas=(1, 1), num_microbatches=3, EXTRA
    )
"""


def write_recipe(folder: Path, *, layer: str = "nn.Linear", extra: str = "", before: str = "") -> str:
    path = folder / "tiny.py"
    path.write_text(
        TINY.replace("def graph", before + "\ndef graph", 1).replace("LAYER", layer).replace("EXTRA", extra)
    )
    return str(path)


def train(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["train", *arguments])


def train_json(*arguments: str) -> dict[str, Any]:
    done = train(*arguments, "--json")
    assert done.exit_code == 0, done.output
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def test_a_run_shows_plan_proof_epochs_and_figures(tmp_path: Path) -> None:
    done = train(write_recipe(tmp_path))
    assert done.exit_code == 0, done.output
    for text in ("plan of 'tiny'", "proved: ", "epoch 2/2", "predicted", "largest difference 0 (bitwise equal)"):
        assert text in done.stdout
    assert done.stderr == ""


def test_one_replica_per_stage_trains_bitwise_as_one_device(tmp_path: Path) -> None:
    run = train_json(write_recipe(tmp_path))
    assert len(run["losses"]) == 6
    assert len(run["stages"]) == 2
    assert run["comparison"]["largest_loss_difference"] == 0
    assert run["comparison"]["largest_parameter_difference"] == 0


def test_any_layout_gives_the_same_losses(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    one = train_json(recipe, "--devices", "1", "--no-check-reference")
    two = train_json(recipe, "--devices", "2", "--replicas", "2", "--no-check-reference")
    assert one["num_ranks"] == 1
    assert len(two["stages"]) == 1
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert one["comparison"] is None


def test_the_seed_changes_the_run(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    first, again, other = (
        train_json(recipe, "--seed", seed, "--epochs", "1", "--no-check-reference")["losses"] for seed in "001"
    )
    assert first == again
    assert first != other


def test_a_saved_plan_is_run(tmp_path: Path) -> None:
    recipe, plan = write_recipe(tmp_path), str(tmp_path / "plan.json")
    assert CliRunner().invoke(cli, ["plan", recipe, "--output", plan]).exit_code == 0
    digests = {train_json(recipe, "--plan", plan, "--no-check-reference")["digest"] for _ in range(2)}
    assert len(digests) == 1
    done = train(recipe, "--plan", plan, "--stages", "1")
    assert done.exit_code == 2
    assert "--plan fixes what --stages would" in done.stderr
    done = train(recipe, "--allow", "mine")
    assert done.exit_code == 2
    assert "no plan is read; leave it out" in done.stderr


def test_a_plan_for_another_graph_is_refused(tmp_path: Path, plan_file: Path) -> None:
    done = train(write_recipe(tmp_path), "--plan", str(plan_file))
    assert done.exit_code == 2
    assert "plan again" in done.stderr
    assert done.stdout == ""  # it is not proved first


def test_what_does_not_fit_is_a_document_too(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    done = train(recipe, "--memory", "10", "--json")
    assert done.exit_code == 1
    document = json.loads(done.stdout)
    assert document["feasible"] is False
    assert document["reasons"]
    done = train(recipe, "--memory", "10")
    assert done.exit_code == 1
    assert done.stdout == ""


def test_a_layer_that_raises_while_it_is_measured_is_named(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, layer="Failing", before=FAILING)
    (tmp_path / "tiny.flag").touch()
    for command in ("plan", "train"):
        done = CliRunner().invoke(cli, [command, recipe])
        assert done.exit_code == 2
        assert "layer 'l0' cannot be measured: ValueError: out of order" in done.stderr
        assert "Traceback" not in done.output


@pytest.mark.parametrize(("goal", "code"), [("1e9", 1), ("-1e9", 0)])
def test_a_missed_goal_is_a_negative_result(tmp_path: Path, goal: str, code: int) -> None:
    extra = f"metric=lambda predictions, batch: float(predictions['l2'].mean()), metric_goal={goal}"
    recipe = write_recipe(tmp_path, extra=extra)
    done = train(recipe, "--no-check-reference")
    assert done.exit_code == code
    assert ("promises at least" in done.stderr) == bool(code)
    # Nobody promised anything of a shorter run.
    assert train(recipe, "--no-check-reference", "--epochs", "1").exit_code == 0


FAILING = """
class Failing(nn.Linear):
    def forward(self, x):
        if not isinstance(x, torch._subclasses.FakeTensor) and FLAG.exists():
            raise ValueError("out of order")
        return super().forward(x)

import pathlib
FLAG = pathlib.Path(__file__).with_suffix(".flag")
"""


def test_a_layer_that_raises_ends_the_run_in_one_message(tmp_path: Path) -> None:
    recipe, plan = write_recipe(tmp_path, layer="Failing", before=FAILING), str(tmp_path / "plan.json")
    assert CliRunner().invoke(cli, ["plan", recipe, "--output", plan]).exit_code == 0
    (tmp_path / "tiny.flag").touch()
    done = train(recipe, "--plan", plan)
    assert done.exit_code == 1
    assert "ValueError: out of order" in done.stderr
    assert "layer 'l0'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def digits_plan(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("digits") / "plan.json")
    assert CliRunner().invoke(cli, ["plan", str(DIGITS), "--output", path]).exit_code == 0
    return path


@pytest.fixture(scope="module")
def digits_run(digits_plan: str) -> dict[str, Any]:
    return train_json(str(DIGITS), "--plan", digits_plan, "--epochs", "2")


@pytest.mark.xdist_group("digits")  # they share a run
def test_digits_learns_as_on_one_device(digits_run: dict[str, Any]) -> None:
    assert [stage["devices"] for stage in digits_run["stages"]] == [[0, 1], [2]]
    assert digits_run["epochs"][-1]["metric"] > 0.9
    assert digits_run["comparison"]["largest_loss_difference"] < 1e-4


@pytest.mark.xdist_group("digits")  # they share a run
def test_digits_gives_the_same_losses_under_torchrun(digits_plan: str, digits_run: dict[str, Any]) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", "-m"]
    arguments = [str(DIGITS), "--plan", digits_plan, "--epochs", "1", "--no-check-reference", "--json"]
    done = subprocess.run(
        [*launch, "pipeflow", "train", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    there = json.loads(done.stdout)  # one document: only rank 0 speaks
    assert there["ranks_are"] == "processes"
    assert there["losses"] == pytest.approx(digits_run["losses"][: len(there["losses"])], rel=1e-4)
    assert there["epochs"][0]["metric"] == pytest.approx(digits_run["epochs"][0]["metric"], abs=0.01)


def test_a_gan_trains_in_its_phases_as_on_one_device() -> None:
    run = train_json(str(GAN), "--epochs", "1")
    assert len(run["losses"]) == 2 * 15  # 1,797 digits in batches of 128, a step of each phase for each
    assert run["comparison"]["largest_loss_difference"] == 0
    assert run["comparison"]["largest_parameter_difference"] == 0
