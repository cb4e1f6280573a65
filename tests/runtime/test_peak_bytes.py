"""The bytes that a rank is counted to hold at most are those that the simulator says."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor, nn

import pipeflow as pf
from pipeflow.graphs import zoo
from pipeflow.graphs.live_bytes import LiveBytes
from pipeflow.runtime.distributed import share_plan
from pipeflow.testing import run_ranks

BATCHES = {
    "digits_cnn": {"image": torch.zeros(64, 1, 8, 8).normal_(), "label": torch.zeros(64, dtype=torch.int64)},
    "two_long_skips": {"x": torch.zeros(256, 64).normal_(), "target": torch.zeros(256, 64)},
    "transformer": {"x": torch.zeros(32, 16, 32).normal_(), "target": torch.zeros(32, 16, 32)},
}


def model(name: str) -> pf.LayerGraph:
    if name == "digits_cnn":
        return zoo.digits_cnn(16)
    if name == "two_long_skips":
        return zoo.two_long_skips(6, 64)
    graph = pf.LayerGraph("transformer")
    value, target = graph.input("x", ("B", 16, 32)), graph.input("target", ("B", 16, 32))
    for i in range(3):
        block = pf.lazy(nn.TransformerEncoderLayer, 32, 2, 64, dropout=0.1, batch_first=True)
        value = graph.add(f"block{i}", block, value)
    graph.loss("loss", nn.functional.mse_loss, value, target)
    return graph


def adam(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-3)


def ratios(
    name: str,
    schedule: str,
    recompute: str,
    replicas: tuple[int, ...] = (1, 1, 1),
    offload: Literal["never", "always"] = "never",
) -> list[float]:
    """Predicted over counted, by rank."""
    graph, batch = model(name), BATCHES[name]
    size = len(next(iter(batch.values())))
    costs = pf.profile(graph, {k: v[: size // 8] for k, v in batch.items()}, num_repeats=1, warmup=0)
    # Seconds are measured, and a test's plan must not depend on them.
    even = tuple(layer.model_copy(update={"forward_seconds": 1.0}) for layer in costs.layers)
    plan = pf.plan(
        graph,
        costs.model_copy(update={"layers": even}),
        pf.Cluster.uniform(sum(replicas)),
        batch_size=size,
        num_microbatches=8,
        replicas=replicas,
        schedule=schedule,
        recompute=recompute,
        offload=offload,
        partitioner="uniform",
    )
    if torch.distributed.is_initialized():
        plan = share_plan(plan)  # bytes alone would be the same everywhere, but seconds are in it
    with pf.Engine(graph, plan, adam, measure=True, num_threads=1) as engine:
        for _ in range(2):
            engine.step(batch)
        seen = engine.measured()
    return [a / b for a, b in zip(seen.predicted_bytes_by_rank, seen.peak_bytes_by_rank, strict=True)]


@pytest.mark.parametrize("recompute", ["never", "always"])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize("name", list(BATCHES))
def test_counted_peaks_are_within_a_tenth_of_the_predicted(name: str, schedule: str, recompute: str) -> None:
    assert ratios(name, schedule, recompute) == pytest.approx([1, 1, 1], abs=0.1)


@pytest.mark.parametrize("recompute", ["never", "always"])
@pytest.mark.parametrize("replicas", [(2, 1), (3, 1), (2, 2)])
@pytest.mark.parametrize("name", ["transformer", "two_long_skips"])
def test_and_on_replicas(name: str, replicas: tuple[int, ...], recompute: str) -> None:
    """Whoever comes to a sum of gradients last, which is another rank each time."""
    assert ratios(name, "1f1b", recompute, replicas) == pytest.approx([1] * sum(replicas), abs=0.1)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize("name", list(BATCHES))
def test_and_with_what_is_saved_on_the_host(name: str, schedule: str) -> None:
    assert ratios(name, schedule, "never", offload="always") == pytest.approx([1, 1, 1], abs=0.1)


def over_gloo(rank: int, name: str, schedule: str, recompute: str) -> list[float]:
    torch.set_num_threads(1)
    return ratios(name, schedule, recompute)


@pytest.mark.parametrize(("schedule", "recompute"), [("1f1b", "never"), ("gpipe", "always")])
def test_and_with_a_process_per_rank(schedule: str, recompute: str) -> None:
    for result in run_ranks(over_gloo, 3, "two_long_skips", schedule, recompute):
        assert result.error is None, result.trace
        assert result.value == pytest.approx([1, 1, 1], abs=0.1)


def test_live_bytes_count_each_storage_from_its_making_to_its_end() -> None:
    counter = LiveBytes()
    before = torch.zeros(10)
    counter.count(before)
    with counter:
        a = torch.zeros(100)
        b = a[:50].view(5, 10) + 0
        c = a.view(10, 10)
    assert counter.held == 40 + 400 + 200
    del a
    assert counter.held == 40 + 400 + 200  # c is a view of it
    del c
    assert counter.held == 40 + 200
    del b
    assert (counter.held, counter.peak) == (40, 640)
    del before
    assert counter.held == 0
