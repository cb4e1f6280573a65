"""The models that are timed, and who trains them beside pipeflow: a loop by hand, and the peer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.pipelining.schedules import ScheduleLoopedBFS

import pipeflow as pf
from pipeflow.graphs.zoo import mlp_chain, two_long_skips
from pipeflow.testing import unit_costs

MODELS = {"chain": mlp_chain, "skips": two_long_skips}


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-3)


def make_batch(width: int, num_samples: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(num_samples, width, generator=generator) for name in ("x", "target")}


def split_evenly(graph: pf.LayerGraph, num_stages: int) -> list[list[str]]:
    """The same number of blocks on each stage; joins and the loss stay with the block before them."""
    blocks = [i for i, name in enumerate(graph.layers) if name.startswith("block")]
    starts = [0, *(blocks[len(blocks) * s // num_stages] for s in range(1, num_stages)), len(graph.layers)]
    names = list(graph.layers)
    return [names[a:b] for a, b in pairwise(starts)]


def make_plan(graph: pf.LayerGraph, ranks: Sequence[int], num_microbatches: int, schedule: str) -> pf.Plan:
    """A plan with one stage per entry of `ranks`, cut evenly."""
    stages = zip(split_evenly(graph, len(ranks)), ranks, strict=True)
    return pf.Plan(
        costs=unit_costs(graph),
        graph_digest=graph.digest,
        cluster=pf.Cluster.uniform(1 + max(ranks)),
        stages=tuple(pf.Stage.replicated(layers, [rank]) for layers, rank in stages),
        certificate=pf.Certificate(partitioner="even", objective=1.0, lower_bound=0.0),
        schedule=schedule,
        num_microbatches=num_microbatches,
        batch_size=num_microbatches,
    )


class StageModule(nn.Module):
    """A stage as one module, for those who know no graph: tensors in, tensors out.

    Skips of `two_long_skips` travel beside the hidden state, as the peer's users write them.
    """

    def __init__(self, graph: pf.LayerGraph, layers: Sequence[str]) -> None:
        super().__init__()
        functions = graph.build(layers)
        blocks = [name for name in layers if name.startswith("block")]
        self.blocks = nn.ModuleList(cast(nn.Module, functions[name]) for name in blocks)
        self.keep = [
            i for i, name in enumerate(blocks) if graph.name == "two_long_skips" and name in ("block0", "block1")
        ]
        self.join1 = len(blocks) - 2 if "join1" in layers else None
        self.join0 = "join0" in layers

    def forward(self, hidden: Tensor, *skips: Tensor) -> Tensor | tuple[Tensor, ...]:
        kept = list(skips)
        for i, block in enumerate(self.blocks):
            hidden = block(hidden)
            if i in self.keep:
                kept.append(hidden)
            if i == self.join1:
                hidden = hidden + kept[1]
        if self.join0:
            return hidden + kept[0]
        return (hidden, *kept) if kept else hidden


class HandLoop:
    """All stages of a chain on one device, each detached from the next: GPipe without an engine."""

    def __init__(self, graph: pf.LayerGraph, num_stages: int, num_microbatches: int, batch: dict[str, Tensor]) -> None:
        self._stages = [StageModule(graph, layers) for layers in split_evenly(graph, num_stages)]
        self._optimizers = [sgd(list(stage.parameters())) for stage in self._stages]
        self._count = num_microbatches
        self._batch = batch

    def step(self) -> float:
        inputs, targets = self._batch["x"].chunk(self._count), self._batch["target"].chunk(self._count)
        last = len(self._stages) - 1
        entries: list[list[Tensor]] = []
        exits: list[list[Tensor]] = []
        losses: list[Tensor] = []
        for s, stage in enumerate(self._stages):
            entries.append([])
            exits.append([])
            for m in range(self._count):
                entry = exits[s - 1][m].detach().requires_grad_() if s else inputs[m]
                value = cast(Tensor, stage(entry))
                if s == last:
                    value = nn.functional.mse_loss(value, targets[m]) / self._count
                    losses.append(value.detach())
                entries[s].append(entry)
                exits[s].append(value)
        for s in range(last, -1, -1):
            for m in range(self._count):
                torch.autograd.backward(exits[s][m], None if s == last else entries[s + 1][m].grad)
        for optimizer in self._optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return sum(float(loss) for loss in losses)


class Peer:
    """torch.distributed.pipelining: one rank with all stages, or one stage on each of two ranks.

    Needs a process group.
    """

    def __init__(
        self,
        graph: pf.LayerGraph,
        num_stages: int,
        num_microbatches: int,
        batch: dict[str, Tensor],
        *,
        rank: int,
        alone: bool,
    ) -> None:
        mine = range(num_stages) if alone else [rank]
        modules = {
            s: StageModule(graph, layers) for s, layers in enumerate(split_evenly(graph, num_stages)) if s in mine
        }
        self._optimizers = [sgd(list(module.parameters())) for module in modules.values()]
        stages = [PipelineStage(module, s, num_stages, torch.device("cpu")) for s, module in modules.items()]
        loss = nn.functional.mse_loss
        self._schedule = (
            ScheduleLoopedBFS(stages, num_microbatches, loss_fn=loss)  # type: ignore[arg-type]
            if alone
            else Schedule1F1B(stages[0], num_microbatches, loss_fn=loss)
        )
        self._first, self._last = 0 in mine, num_stages - 1 in mine
        self._batch = batch
        self._count = num_microbatches

    def step(self) -> float:
        """The loss, or 0 on a rank that does not know it: the peer tells the last rank alone."""
        losses: list[Tensor] = []
        arguments = [self._batch["x"]] if self._first else []
        if self._last:
            self._schedule.step(*arguments, target=self._batch["target"], losses=losses)
        else:
            self._schedule.step(*arguments)
        for optimizer in self._optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return sum(float(loss.detach()) for loss in losses) / self._count
