"""Models that the runtime's tests share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import pipeflow as pf
from pipeflow.testing import unit_costs

Stages = Sequence[tuple[Sequence[str], Sequence[int]]]


def forked_graph() -> pf.LayerGraph:
    """Seven layers; `a` has readers that end up on three stages."""
    graph = pf.LayerGraph("forked")
    x = graph.input("x", ("B", 8))
    y = graph.input("y", ("B",), dtype="int64")
    a = graph.add("a", pf.lazy(nn.Linear, 8, 8), x)
    b = graph.add("b", torch.tanh, a)
    c = graph.add("c", pf.lazy(nn.Linear, 8, 8), b)
    d = graph.add("d", torch.add, c, a)
    e = graph.add("e", pf.lazy(nn.Linear, 8, 4), d)
    p = graph.add("p", pf.lazy(nn.Linear, 8, 4), a)
    s = graph.add("s", torch.add, e, p)
    graph.loss("loss", nn.functional.cross_entropy, s, y)
    return graph


def forked_batch(num_samples: int, *, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(num_samples, 8, generator=generator),
        "y": torch.randint(0, 4, (num_samples,), generator=generator),
    }


def make_plan(
    graph: pf.LayerGraph,
    stages: Stages,
    *,
    num_microbatches: int = 4,
    schedule: str = "1f1b",
) -> pf.Plan:
    """A plan from stages given as (layers, ranks)."""
    return pf.Plan(
        costs=unit_costs(graph),
        graph_digest=graph.digest,
        cluster=pf.Cluster.uniform(1 + max(rank for _, ranks in stages for rank in ranks)),
        stages=tuple(pf.Stage.replicated(tuple(layers), tuple(ranks)) for layers, ranks in stages),
        certificate=pf.Certificate(partitioner="by hand", objective=1.0, lower_bound=0.0),
        schedule=schedule,
        num_microbatches=num_microbatches,
        batch_size=8,
    )


THREE_STAGES: Stages = [(["a", "b"], (0,)), (["c", "d"], (1,)), (["e", "p", "s", "loss"], (2,))]


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


class _Explosive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, explode: bool) -> Tensor:
        ctx.explode = explode
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        if ctx.explode:
            raise ZeroDivisionError("backward went wrong")
        return gradient, None


class Bomb(nn.Module):
    """Raises on a sample whose first feature is beyond 100, in forward or in backward."""

    def __init__(self, phase: str) -> None:
        super().__init__()
        self.phase = phase
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        # A fake tensor of shape inference has no values to look at.
        armed = type(x) is Tensor and bool(x.abs().max() > 100)
        if armed and self.phase == "forward":
            raise ZeroDivisionError("forward went wrong")
        result: Tensor = _Explosive.apply(x * self.weight, armed and self.phase == "backward")  # type: ignore[no-untyped-call]
        return result


def bomb_graph(layer: str, phase: str) -> pf.LayerGraph:
    """Three layers on three stages, one of them a bomb. The first passes its input on unchanged."""
    graph = pf.LayerGraph("bomb")
    h: Any = graph.input("x", ("B", 4))
    for name in ("first", "second", "third"):
        h = graph.add(name, pf.lazy(Bomb, phase if name == layer else "never"), h)
    graph.loss("loss", mean_square, h)
    return graph


def mean_square(x: Tensor) -> Tensor:
    return x.square().mean()


def bomb_plan(graph: pf.LayerGraph, schedule: str) -> pf.Plan:
    stages = [(["first"], (0,)), (["second"], (1,)), (["third", "loss"], (2,))]
    return make_plan(graph, stages, num_microbatches=4, schedule=schedule)


def bomb_batch(microbatch: int | None) -> dict[str, Tensor]:
    """Eight samples in four micro-batches, one of which sets the bomb off."""
    x = torch.ones(8, 4)
    if microbatch is not None:
        x[2 * microbatch] = 1000.0
    return {"x": x}
