"""A checkpoint that one plan wrote goes on under another as if nothing had been."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import pipeflow as pf
from pipeflow.errors import CheckpointError, EngineError
from pipeflow.runtime.manifest import NAME
from pipeflow.runtime.replica import OptimizerFactory
from pipeflow.testing import run_ranks
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


def resealed(folder: Path, **changes: Any) -> None:
    """Somebody edits the manifest, and knows how it is sealed."""
    document = json.loads((folder / NAME).read_text()) | changes | {"sha256": ""}
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"))
    (folder / NAME).write_text(json.dumps(document | {"sha256": hashlib.sha256(canonical.encode()).hexdigest()}))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    graph = forked_graph()
    with pf.Engine(graph, make_plan(graph, THREE_STAGES), sgd) as engine:
        engine.step(forked_batch(8))
        engine.save(tmp_path / "saved")
    return tmp_path / "saved"


def refuses(folder: Path, words: str) -> None:
    """Loading is refused, and nothing has changed."""
    graph = forked_graph()
    with pf.Engine(graph, make_plan(graph, THREE_STAGES), sgd, num_threads=1) as engine:
        engine.step(forked_batch(8, seed=7))
        before = engine.state_dict()
        with pytest.raises(CheckpointError, match=words):
            engine.load(folder)
        assert engine.num_steps == 1
        assert all(torch.equal(before[name], value) for name, value in engine.state_dict().items())


@pytest.mark.parametrize("key", ["graph", "step", "calls", "loss_scale", "tensors", "trained", "schedulers", "files"])
def test_a_manifest_without_one_of_its_keys_is_refused(key: str, saved: Path) -> None:
    document = json.loads((saved / NAME).read_text())
    del document[key]
    (saved / NAME).write_text(json.dumps(document))
    refuses(saved, f"{key}: field required")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"step": "x"}, "step: 'x'; input should be a valid integer"),
        ({"step": -1}, "step: -1"),
        ({"loss_scale": {"scale": 1.0}}, "it needs"),
        ({"tensors": {"model.a.weight": {"shape": [8, 8], "dtype": "save"}}}, "'save' is no dtype"),
        ({"tensors": {}}, "'a.weight' is not there"),
        ({"files": {}}, r"does not list \.metadata"),
        ({"files": {"../x": "0"}}, r"does not list \.metadata"),
        ({"more": 1}, "more: 1; extra"),
    ],
)
def test_a_manifest_that_says_what_none_says_is_refused(changes: dict[str, Any], words: str, saved: Path) -> None:
    resealed(saved, **changes)
    refuses(saved, words)


def test_a_manifest_that_was_altered_is_refused(saved: Path) -> None:
    """A learning rate of another training would be taken without a word."""
    (saved / NAME).write_text((saved / NAME).read_text().replace('"lr": 0.05', '"lr": 0.5'))
    refuses(saved, r"pipeflow\.json was altered")


def test_only_files_of_the_manifest_are_opened(saved: Path) -> None:
    """torch's reader unpickles its index: nothing that was not compared with the manifest may come to it."""
    files = json.loads((saved / NAME).read_text())["files"]
    data = next(name for name in files if name.endswith(".distcp"))
    resealed(saved, files={name: digest for name, digest in files.items() if name != data})
    refuses(saved, "is not in the manifest")
    resealed(saved, files=files | {"../elsewhere": "0"})
    refuses(saved, "not a file of the folder")


@pytest.mark.parametrize("key", ["model.a.weight", "optimizer.a.weight.momentum_buffer"])
def test_shapes_that_are_not_those_of_the_data_are_refused(key: str, saved: Path) -> None:
    tensors = json.loads((saved / NAME).read_text())["tensors"]
    resealed(saved, tensors=tensors | {key: {"shape": [9, 8], "dtype": "float32"}})
    refuses(saved, r"'a\.weight' is float32 of \(9, 8\)" if "model" in key else "cannot be read")


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    graph = forked_graph()
    (tmp_path / "file").write_text("")
    refuses(tmp_path / "nowhere", "not there; give the folder")
    refuses(tmp_path / "file", "is a file; give the folder")
    with pf.Engine(graph, make_plan(graph, THREE_STAGES), sgd) as engine:
        with pytest.raises(CheckpointError, match="is a file; save to a new folder"):
            engine.save(tmp_path / "file")
        with pytest.raises(CheckpointError, match="cannot be written"):
            engine.save(tmp_path / "file" / "below")


def chained(*gammas: float) -> Callable[[torch.optim.Optimizer], Any]:
    rates = torch.optim.lr_scheduler
    return lambda o: rates.ChainedScheduler([rates.ExponentialLR(o, gamma) for gamma in gammas])


def cosine(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ({"optimizer": adam}, {"optimizer": sgd}, "has AdamW for parameter 'a.weight', and this engine SGD"),
        ({"optimizer": torch.optim.RMSprop}, {"optimizer": adam}, "has RMSprop .* and this engine AdamW"),
        ({"optimizer": None}, {"optimizer": sgd}, "has no optimizer for parameter 'a.weight'"),
        ({"lr_scheduler": decay}, {}, "has ExponentialLR for 'optimizer', and this engine none"),
        ({}, {"lr_scheduler": decay}, "has no scheduler for 'optimizer', and this engine ExponentialLR"),
        ({"lr_scheduler": decay}, {"lr_scheduler": cosine}, "has ExponentialLR .* and this engine CosineAnnealingLR"),
        (
            {"lr_scheduler": chained(0.5)},
            {"lr_scheduler": chained(0.5, 0.9)},
            r"this engine ChainedScheduler\(ExponentialLR, ExponentialLR\)",
        ),
    ],
)
def test_another_optimizer_or_scheduler_is_refused(
    before: dict[str, Any], after: dict[str, Any], words: str, tmp_path: Path
) -> None:
    graph = forked_graph()
    plan = make_plan(graph, THREE_STAGES)
    with pf.Engine(graph, plan, **{"optimizer": sgd, **before}) as engine:
        if engine._setup.optimizers:
            engine.step(forked_batch(8))
        engine.save(tmp_path / "saved")
        state = engine.state_dict()
    with pf.Engine(graph, plan, **{"optimizer": sgd, **after}) as engine:
        fresh = engine.state_dict()
        with pytest.raises(CheckpointError, match=f"{words}.*state_dict"):
            engine.load(tmp_path / "saved")
        assert all(torch.equal(value, fresh[name]) for name, value in engine.state_dict().items())
        # The remedy that the message gives.
        with pf.Engine(graph, plan) as plain:
            plain.load(tmp_path / "saved")
            engine.load_state_dict(plain.state_dict())
        assert all(torch.equal(value, state[name]) for name, value in engine.state_dict().items())
        engine.step(forked_batch(8))


GROUPS = {"*.bias": {"weight_decay": 0.5, "lr": 0.0}}


def test_options_of_each_parameter_are_kept_under_any_plan(tmp_path: Path) -> None:
    graph = forked_graph()
    with pf.Engine(graph, make_plan(graph, PLANS["one"]), sgd, parameter_groups=GROUPS) as engine:
        engine.save(tmp_path / "saved")
    with pf.Engine(graph, make_plan(graph, THREE_STAGES), sgd, parameter_groups=GROUPS) as engine:
        engine.load(tmp_path / "saved")
        before = engine.state_dict()
        engine.step(forked_batch(8))
        for name, value in engine.state_dict().items():
            assert torch.equal(value, before[name]) == name.endswith("bias")
    with (
        pf.Engine(graph, make_plan(graph, THREE_STAGES), sgd) as engine,
        pytest.raises(CheckpointError, match=r"lr=0\.05 for .*'a\.weight' and 0\.0 for 'a\.bias'.*parameter_groups"),
    ):
        engine.load(tmp_path / "saved")


def test_a_state_is_taken_whole_or_not_at_all() -> None:
    """The wrong tensor is the last stage's; the first stage's were copied before it was looked at."""
    graph = forked_graph()
    for engine in (pf.Engine(graph, make_plan(graph, THREE_STAGES), sgd), pf.Reference(graph, sgd)):
        before = engine.state_dict()
        wrong: dict[str, Any] = {name: value + 1 for name, value in before.items()}
        for last in (torch.zeros(3), torch.zeros(4).double(), torch.zeros(4, device="meta"), [0.0]):
            with pytest.raises(CheckpointError, match=r"'p\.bias' as"):
                engine.load_state_dict(wrong | {"p.bias": last})
            assert all(torch.equal(value, before[name]) for name, value in engine.state_dict().items())


@pytest.mark.parametrize("way", ["load", "load_state_dict"])
def test_gradients_that_waited_are_of_weights_that_are_no_more(way: str, tmp_path: Path) -> None:
    graph = forked_graph()
    plan = make_plan(graph, THREE_STAGES)
    reference = pf.Reference(graph, sgd, num_microbatches=4)
    with pf.Engine(graph, plan, sgd, num_threads=1) as engine, pf.Engine(graph, plan, sgd, num_threads=1) as clean:
        engine.save(tmp_path / "saved")
        state = engine.state_dict()
        for trained in (engine, reference):
            trained.accumulate(forked_batch(8, seed=3))
        reference.load_state_dict(state)
        clean.step(forked_batch(8, seed=5))  # both draw from the second call on
        clean.load(tmp_path / "saved")
        if way == "load":
            engine.load(tmp_path / "saved")
        else:
            engine.load_state_dict(state)
        expected = clean.step(forked_batch(8))
        assert engine.step(forked_batch(8)) == reference.step(forked_batch(8)) == expected
        for name, value in clean.state_dict().items():
            assert torch.equal(engine.state_dict()[name], value)
            assert torch.equal(reference.state_dict()[name], value)


def test_no_phase_is_open_after_a_checkpoint(tmp_path: Path) -> None:
    graph = forked_graph()
    graph.phase("left", losses=["loss"], trains=["a.*"])
    graph.phase("right", losses=["loss"], trains=["e.*"])
    with pf.Engine(graph, make_plan(graph, THREE_STAGES), sgd) as engine:
        engine.save(tmp_path / "saved")
        engine.accumulate(forked_batch(8), phase="left")
        with pytest.raises(EngineError, match="wait for their step"):
            engine.step(forked_batch(8), phase="right")
        engine.load(tmp_path / "saved")
        before = engine.state_dict()
        engine.step(forked_batch(8), phase="right")
        changed = {name for name, value in engine.state_dict().items() if not torch.equal(value, before[name])}
        assert changed == {"e.weight", "e.bias"}


def load_with_other_groups(rank: int, folder: str) -> tuple[str, bool]:
    """Only the last rank's stage has parameters of two groups that were one option."""
    graph = forked_graph()
    with pf.Engine(graph, make_plan(graph, THREE_STAGES), sgd, parameter_groups={"p.*": {"lr": 0.5}}) as engine:
        engine.save(folder)
    with pf.Engine(graph, make_plan(graph, THREE_STAGES), sgd) as engine:
        before = engine.state_dict()
        with pytest.raises(CheckpointError) as caught:
            engine.load(folder)
        same = all(torch.equal(value, before[name]) for name, value in engine.state_dict().items())
        return str(caught.value), same


def test_what_one_process_refuses_all_refuse(tmp_path: Path) -> None:
    results = run_ranks(load_with_other_groups, 3, str(tmp_path / "saved"))
    for result in results:
        assert result.error is None, result.trace
        assert result.value[1]
        assert "lr=0.05 for parameter 'e.weight' and 0.5 for 'p.weight'" in result.value[0]
