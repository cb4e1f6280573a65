"""The same problem, the same partition, byte for byte: in any process, at any size, whatever the clock says."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import pipeflow.partitioners

SCRIPT = """
import random
from pipeflow.graphs.costs import GraphCosts, LayerCosts, TensorCosts
from pipeflow.partitioners.auto import search
from pipeflow.partitioners.cluster import Cluster
from pipeflow.partitioners.problem import PartitionProblem

draw, layers = random.Random(5), []
for i in range({layers}):
    back = [min(draw.choice((1, 1, 1, 2, 9)), i) for _ in range(draw.choice((1, 1, 2))) if i]
    inputs = dict.fromkeys(layers[-b].name for b in back)
    output = TensorCosts(name=f"n{{i}}", bytes=draw.choice((0, 1, 40)))
    seconds = draw.choice((0.1, 0.3, 1.0, 3.0)) * draw.random()
    layers.append(LayerCosts(name=f"n{{i}}", inputs=tuple(inputs), outputs=(output,), forward_seconds=seconds))
problem = PartitionProblem(
    costs=GraphCosts(layers=tuple(layers)), cluster=Cluster.uniform({devices}, bandwidth=100.0), max_replicas={replicas}
)
print(search(problem, use_solver={solver}, most_atoms={most_atoms}).model_dump_json())
"""


def planned(hash_seed: int, **problem: object) -> str:
    environment = os.environ | {"PYTHONHASHSEED": str(hash_seed)}
    script = SCRIPT.format(**problem)
    return subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True, env=environment
    ).stdout


@pytest.mark.parametrize(
    "problem",
    [
        pytest.param({"layers": 14, "devices": 3, "replicas": None, "most_atoms": 1000}, id="replicas"),
        pytest.param({"layers": 60, "devices": 4, "replicas": 1, "most_atoms": 1000}, id="exact"),
        pytest.param({"layers": 330, "devices": 24, "replicas": 1, "most_atoms": 1000}, id="filled"),
        pytest.param({"layers": 330, "devices": 8, "replicas": 1, "most_atoms": 120}, id="coarsened"),
    ],
)
def test_the_same_bytes_in_processes_with_other_hash_seeds(problem: dict[str, object]) -> None:
    first = planned(1, solver=False, **problem)
    assert first
    assert planned(2, solver=False, **problem) == first


def test_no_partitioner_reads_a_clock() -> None:
    """Budgets are counted in moves, rounds, ideals and the solver's own deterministic seconds."""
    for path in Path(pipeflow.partitioners.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {"time", "datetime", "timeit"} & set(names), f"{path.name} imports a clock"
            if isinstance(node, ast.Attribute):
                assert node.attr not in ("max_time_in_seconds", "time_limit"), f"{path.name} limits a solver by a clock"
