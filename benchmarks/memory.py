"""Bytes that every rank holds at most: what the simulator says beside what was counted in a step.

    python -m benchmarks.memory

Ranks are threads of this process; what crosses between them is copied, as on devices of their own.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

import pipeflow as pf
from pipeflow.graphs import zoo
from pipeflow.report.table import Table, plain
from pipeflow.units import format_bytes

RESULT = Path(__file__).parent / "results" / "memory.md"

HEADINGS = ("model", "schedule", "recompute", "offload", "optimizer", ">rank", ">predicted", ">counted", ">ratio")

Saved = tuple[Literal["never", "always"], Literal["never", "always"]]
SAVED: tuple[Saved, ...] = (("never", "never"), ("always", "never"), ("never", "always"))
"""What is recomputed, and what is kept on the host."""

Optimizer = Callable[[list[Tensor]], torch.optim.Optimizer]


@dataclass(frozen=True, slots=True)
class Model:
    """A graph, its batch and how many stages to cut it into."""

    graph: pf.LayerGraph
    batch: dict[str, Tensor]
    num_stages: int
    num_microbatches: int


def models() -> Iterator[Model]:
    """A CNN with a skip, MLPs with long skips, a chain of transformer blocks, a plain CNN."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def labels(count: int) -> Tensor:
        return torch.randint(10, (count,), generator=generator)

    yield Model(zoo.digits_cnn(32), {"image": noise(128, 1, 8, 8), "label": labels(128)}, 3, 8)
    yield Model(zoo.two_long_skips(8, 64), {"x": noise(512, 64), "target": noise(512, 64)}, 4, 8)
    yield Model(transformer(4, 64), {"x": noise(64, 32, 64), "target": noise(64, 32, 64)}, 4, 8)
    yield Model(plain_cnn(16), {"image": noise(64, 3, 16, 16), "label": labels(64)}, 3, 8)


def transformer(depth: int, width: int) -> pf.LayerGraph:
    graph = pf.LayerGraph("transformer")
    value = graph.input("x", ("B", 32, width))
    target = graph.input("target", ("B", 32, width))
    for i in range(depth):
        block = pf.lazy(nn.TransformerEncoderLayer, width, 4, 4 * width, dropout=0.1, batch_first=True)
        value = graph.add(f"block{i}", block, value)
    graph.loss("loss", nn.functional.mse_loss, value, target)
    return graph


def plain_cnn(width: int) -> pf.LayerGraph:
    graph = pf.LayerGraph("plain_cnn")
    value = graph.input("image", ("B", 3, 16, 16))
    label = graph.input("label", ("B",), dtype="int64")
    channels = 3
    for i, more in enumerate((width, width, 2 * width, 2 * width)):
        value = graph.add(f"conv{i}", pf.lazy(nn.Conv2d, channels, more, 3, padding=1), value)
        value = graph.add(f"relu{i}", nn.ReLU(), value)
        if i % 2:
            value = graph.add(f"pool{i}", nn.MaxPool2d(2), value)
        channels = more
    value = graph.add("flatten", torch.flatten, value, start_dim=1)
    value = graph.add("logits", pf.lazy(nn.Linear, 2 * width * 16, 10), value)
    graph.loss("loss", nn.functional.cross_entropy, value, label)
    return graph


def sgd(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-3)


def adam(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-3)


def measure(
    model: Model, costs: pf.GraphCosts, schedule: str, saved: Saved, optimizer: Optimizer, ratio: float
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(predicted, counted) peak bytes of every rank."""
    plan = pf.plan(
        model.graph,
        costs,
        pf.Cluster.uniform(model.num_stages),
        batch_size=len(next(iter(model.batch.values()))),
        num_stages=model.num_stages,
        num_microbatches=model.num_microbatches,
        max_replicas=1,
        schedule=schedule,
        recompute=saved[0],
        offload=saved[1],
        optimizer_ratio=ratio,
    )
    with pf.Engine(model.graph, plan, optimizer, measure=True, num_threads=1) as engine:
        for _ in range(2):
            engine.step(model.batch)
        result = engine.measured()
    return result.predicted_bytes_by_rank, result.peak_bytes_by_rank


def main() -> int:
    rows: list[tuple[str, ...]] = []
    worst = 0.0
    for model in models():
        size = len(next(iter(model.batch.values()))) // model.num_microbatches
        sample = {name: value[:size] for name, value in model.batch.items()}
        costs = pf.profile(model.graph, sample, num_repeats=1, warmup=1)
        cases = itertools.product(("gpipe", "1f1b"), SAVED, (("SGD", sgd, 0.0), ("Adam", adam, 2.0)))
        for schedule, saved, (name, optimizer, ratio) in cases:
            predicted, counted = measure(model, costs, schedule, saved, optimizer, ratio)
            for rank, (a, b) in enumerate(zip(predicted, counted, strict=True)):
                worst = max(worst, abs(a / b - 1))
                cells = (model.graph.name, schedule, *saved, name, str(rank))
                rows.append((*cells, format_bytes(a), format_bytes(b), f"{a / b:.3f}"))
    table = plain(Table("", HEADINGS, tuple(rows)))
    text = f"# Peak bytes by rank, predicted and counted\n\n```\n$ python -m benchmarks.memory\n{table}\n```\n\n"
    text += f"Largest deviation: {worst:.1%}.\n"
    RESULT.write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
