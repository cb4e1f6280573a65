from __future__ import annotations

from pathlib import Path

import pytest

from pipeflow.execution_plan import Plan
from pipeflow.graphs.costs import GraphCosts, LayerCosts, TensorCosts
from pipeflow.partitioners.cluster import Cluster
from pipeflow.partitioners.partition import Certificate, Stage

MEMORY = 10_000


def chain_costs(num_layers: int) -> GraphCosts:
    """A chain of equal layers: 1 ms forward, 2 ms backward, 100 bytes of weights, 200 saved."""
    return GraphCosts(
        name="chain",
        inputs=(TensorCosts(name="x", bytes=64),),
        layers=tuple(
            LayerCosts(
                name=f"l{i}",
                inputs=(f"l{i - 1}" if i else "x",),
                outputs=(TensorCosts(name=f"l{i}", bytes=64, gradient_bytes=64),),
                forward_seconds=0.001,
                backward_input_seconds=0.001,
                backward_weight_seconds=0.001,
                parameter_bytes=100,
                saved_bytes=200,
            )
            for i in range(num_layers)
        ),
    )


def chain_plan(*, memory: int = MEMORY) -> Plan:
    """Four layers on three devices: the first stage has two replicas."""
    return Plan(
        costs=chain_costs(4),
        cluster=Cluster.uniform(3, memory_bytes=memory, bandwidth=1e9, latency=1e-6),
        stages=(Stage.replicated(["l0", "l1"], [0, 1]), Stage.replicated(["l2", "l3"], [2])),
        certificate=Certificate(partitioner="by hand", objective=0.006, lower_bound=0.003),
        schedule="1f1b",
        num_microbatches=4,
        batch_size=8,
    )


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    chain_plan().save(path)
    return path


@pytest.fixture
def tight_plan_file(tmp_path: Path) -> Path:
    """A plan whose devices hold less than the plan needs."""
    path = tmp_path / "tight.json"
    chain_plan(memory=1000).save(path)
    return path


@pytest.fixture
def costs_file(tmp_path: Path) -> Path:
    path = tmp_path / "costs.json"
    path.write_text(chain_costs(6).model_dump_json())
    return path
