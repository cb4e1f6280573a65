"""Costs are kept for code: what an edit of a layer's code changes, and what it leaves alone."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipeflow.graphs import LayerGraph, lazy, profile
from pipeflow.graphs.code_digest import code_digest
from pipeflow.graphs.layer import source_of

MODEL = """
import torch
from torch import nn
import layers_shelf
from layers_shelf import smooth

WIDTH = 4

class Base(nn.Module):
    factor = 2
    def scale(self, x):
        return x * self.factor

class Inner(Base):
    @staticmethod
    def cut(x):
        return x[:, :WIDTH]
    def forward(self, x):
        return self.scale(smooth(self.cut(x)))

class Outer(nn.Module):
    def __init__(self, depth=1):
        super().__init__()
        self.depth = depth
        self.inner = Inner()
        self.linear = nn.Linear(4, 4)
    def forward(self, x):
        for _ in range(self.depth):
            x = self.inner(self.linear(x))
        return layers_shelf.rounded(x)

def function(x):
    return [smooth(y) for y in (x,)][0]
"""
SHELF = """
def smooth(x, by=0.5):
    if x.ndim in {1, 2, 3}:
        return x * by
    return x

def rounded(x):
    return x + 1

def unused(x):
    return x + 2
"""
EDITS = {
    "its own forward": ("return layers_shelf", "return 1 * layers_shelf"),
    "a submodule's forward": ("self.scale(smooth", "1 * self.scale(smooth"),
    "a base class": ("return x * self.factor", "return self.factor * x"),
    "a setting of a class": ("factor = 2", "factor = 3"),
    "a static method": ("x[:, :WIDTH]", "x[:, 0:WIDTH]"),
    "a constant of the module": ("WIDTH = 4", "WIDTH = 2"),
    "a function of another module": ("return x * by", "return x / by"),
    "its default": ("by=0.5", "by=0.25"),
    "a set": ("{1, 2, 3}", "{1, 2, 4}"),
    "what is reached through a module": ("return x + 1", "return x + 3"),
}
SAME = {
    "what is not used": ("return x + 2", "return x + 4"),
    "lines and comments": ("def smooth", "# a remark\n\n\ndef smooth"),
}


def digests(folder: Path, edit: tuple[str, str] = ("", "")) -> list[str]:
    """Of the layers as a module, as a recipe and as a function, in the code after an edit."""
    for name, text in (("layers_shelf", SHELF), ("layers_model", MODEL)):
        (folder / f"{name}.py").write_text(text.replace(*edit) if edit[0] else text)
        sys.modules.pop(name, None)
    importlib.invalidate_caches()
    model: Any = importlib.import_module("layers_model")
    things = (model.Outer(), lazy(model.Outer), lazy(nn.Sequential, lazy(model.Outer)), model.function)
    return [code_digest({"layer": source_of("layer", thing)}) for thing in things]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return tmp_path


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_of_what_a_layer_runs_changes_its_digest(name: str, folder: Path) -> None:
    before, after = digests(folder), digests(folder, EDITS[name])
    for a, b in zip(before[:3], after[:3], strict=True):
        assert a != b
    assert (before[3] != after[3]) == (EDITS[name][0] in SHELF and "x + 1" not in EDITS[name][0])


@pytest.mark.parametrize("name", SAME)
def test_an_edit_of_anything_else_does_not(name: str, folder: Path) -> None:
    assert digests(folder) == digests(folder, SAME[name])


def test_settings_of_an_instance_count(folder: Path) -> None:
    digests(folder)
    model: Any = importlib.import_module("layers_model")
    one, two = (code_digest({"layer": source_of("layer", model.Outer(depth))}) for depth in (1, 2))
    assert one != two


def test_every_process_finds_the_same(folder: Path) -> None:
    """Constants that are sets are in another order in each."""
    expected = digests(folder)[0]
    script = f"""
import sys
sys.path.insert(0, {str(folder)!r})
import layers_model
from pipeflow.graphs.code_digest import code_digest
from pipeflow.graphs.layer import source_of
print(code_digest({{"layer": source_of("layer", layers_model.Outer())}}))
"""
    for seed in "12":
        done = subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            timeout=120,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[2])},
        )
        assert done.stdout.strip() == expected, done.stderr


def once(x: torch.Tensor) -> torch.Tensor:
    return x + 1


def twice(x: torch.Tensor) -> torch.Tensor:
    return x + 1 + 1


def test_costs_of_edited_code_are_measured_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = LayerGraph("edited")
    graph.add("layer", once, graph.input("x", ("B", 4)))
    options: dict[str, Any] = {"cache": tmp_path / "costs.json", "num_repeats": 1, "warmup": 0}
    batch = {"x": torch.zeros(2, 4)}
    changes: list[dict[str, Any]] = [{}, {}, {"warmup": 1}, {"seed": 1}, {"num_repeats": 2}, {}]
    numbers = []
    for change in changes:
        profile(graph, batch, **{**options, **change})
        numbers.append(len(json.loads(options["cache"].read_text())["entries"]))
    assert numbers == [1, 1, 2, 3, 4, 4]
    monkeypatch.setattr(once, "__code__", twice.__code__)
    profile(graph, batch, **options)
    assert len(json.loads(options["cache"].read_text())["entries"]) == 5
