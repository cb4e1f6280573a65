"""A checkpoint that one plan wrote goes on under another as if nothing had been."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import pipeflow as pf
from pipeflow.errors import CheckpointError
from pipeflow.runtime.replica import OptimizerFactory
from tests.runtime.models import THREE_STAGES, Stages, bomb_graph, bomb_plan, forked_batch, forked_graph, make_plan, sgd

PLANS: dict[str, Stages] = {
    "three stages": THREE_STAGES,
    "one": [([n for layers, _ in THREE_STAGES for n in layers], (0,))],
    "replicas": [(["a", "b"], (0, 1)), (["c", "d", "e", "p", "s", "loss"], (1,))],
}


def adam(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01)


def decay(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)


@pytest.mark.parametrize("optimizer", [sgd, adam])
@pytest.mark.parametrize("target", PLANS)
def test_goes_on_under_any_other_plan(optimizer: OptimizerFactory, target: str, tmp_path: Path) -> None:
    graph = forked_graph()

    def make(name: str) -> pf.Engine:
        return pf.Engine(graph, make_plan(graph, PLANS[name]), optimizer, lr_scheduler=decay, num_threads=1)

    with make("three stages") as engine, make("one") as straight:
        for seed in range(3):
            straight.step(forked_batch(8, seed=seed))
            engine.step(forked_batch(8, seed=seed))
        engine.save(tmp_path / "saved")
        with make(target) as other:
            other.load(tmp_path / "saved")
            assert other.num_steps == 3
            for seed in range(3, 6):
                expected = straight.step(forked_batch(8, seed=seed)).loss
                assert other.step(forked_batch(8, seed=seed)).loss == pytest.approx(expected, rel=1e-5)
            for name, value in straight.state_dict().items():
                torch.testing.assert_close(other.state_dict()[name], value, rtol=1e-4, atol=1e-6)


def test_damage_is_found_before_anything_is_read(tmp_path: Path) -> None:
    graph = forked_graph()
    folder = tmp_path / "saved"
    with pf.Engine(graph, make_plan(graph, THREE_STAGES), sgd) as engine:
        engine.step(forked_batch(8))
        engine.save(folder)
        with pytest.raises(CheckpointError, match="not empty"):
            engine.save(folder)
        before = engine.state_dict()
        data = next(f for f in folder.iterdir() if f.suffix == ".distcp")
        original = data.read_bytes()
        data.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
        with pytest.raises(CheckpointError, match="was altered"):
            engine.load(folder)
        data.unlink()
        with pytest.raises(CheckpointError, match="is missing"):
            engine.load(folder)
        data.write_bytes(original)
        manifest = json.loads((folder / "pipeflow.json").read_text())
        (folder / "pipeflow.json").unlink()
        with pytest.raises(CheckpointError, match="no checkpoint, or was not finished"):
            engine.load(folder)
        (folder / "pipeflow.json").write_text(json.dumps(manifest | {"format": "other"}))
        with pytest.raises(CheckpointError, match="not of format"):
            engine.load(folder)
        after = engine.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_another_models_checkpoint_is_refused(tmp_path: Path) -> None:
    graph, other = forked_graph(), bomb_graph("first", "never")
    with pf.Engine(graph, make_plan(graph, THREE_STAGES), sgd) as engine:
        engine.save(tmp_path / "saved")
    with (
        pf.Engine(other, bomb_plan(other, "gpipe"), sgd) as engine,
        pytest.raises(CheckpointError, match="build the graph"),
    ):
        engine.load(tmp_path / "saved")
