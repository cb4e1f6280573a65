"""The examples that are programs of their own; those that are recipes are run by `tests/cli/test_train.py`."""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path
from types import ModuleType

import torch

import pipeflow as pf
from pipeflow.testing import run_ranks

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def characters(rank: int) -> list[str]:
    """What the decoder writes after a few steps of training."""
    written: list[str] = load("characters").main(num_steps=3)
    return written


def test_characters_written_step_by_step_are_the_likeliest_of_the_whole_text() -> None:
    example = load("characters")
    graph = example.decoder()
    lengths = {batch["text"].shape[1] for batch in example.train_batches(0, 0)}
    assert len(lengths) > 20
    with pf.Engine(graph, example.plan_for(graph)) as engine:
        written = example.write_on(engine, example.PROMPTS, 6)
        for length in range(len(example.PROMPTS[0]), len(written[0])):
            text = torch.tensor([[ord(c) for c in line[:length]] for line in written])
            likeliest = engine.predict({"text": text})["scores"][:, -1].argmax(-1)
            assert likeliest.tolist() == [ord(line[length]) for line in written]


def test_characters_are_written_alike_by_processes() -> None:
    first, second = run_ranks(characters, 2)
    for result in (first, second):
        assert result.error is None, result.trace
    assert first.value == second.value
    assert [len(line) for line in first.value] == [54, 54, 54]


def test_a_partitioner_of_ones_own_is_short_and_the_laws_find_the_bug_planted_in_it() -> None:
    example = load("own_partitioner")
    lines = inspect.getsource(example.filled).splitlines() + inspect.getsource(example.fill).splitlines()
    assert len(lines) < 40
    right, wrong = example.main()
    assert right is None
    assert "not a bound" in wrong
