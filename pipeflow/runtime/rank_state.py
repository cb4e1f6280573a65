"""What one rank holds while a step runs: rows indexed by micro-batch.

Nothing here decides what happens when; the bound actions (`pipeflow.runtime.binding`) read and
write these rows, the executor starts a step on them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeflow.graphs.layer_graph import LayerGraph
from pipeflow.runtime.gradients import Verdict
from pipeflow.runtime.microbatch import loss_factor, split
from pipeflow.runtime.replica import StageReplica
from pipeflow.runtime.stage import CompiledStage, Slots


@dataclass
class StageState:
    """One stage of the rank.

    Attributes:
        compiled: its layers as calls.
        replica: its weights.
        arrivals: by micro-batch, activations from other stages by tensor name.
        gradients: by micro-batch, gradients from other stages by part name.
        live: by micro-batch, the slots between its forward and its `Free`.
        finish_reduce: waits for the running sum of gradients, if one was started.
    """

    compiled: CompiledStage
    replica: StageReplica
    arrivals: list[dict[str, Tensor]] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    live: list[Slots | None] = field(default_factory=list)
    finish_reduce: Callable[[], None] | None = None

    def wait_reduce(self) -> None:
        """Puts the summed gradients in place, if a sum was started."""
        if self.finish_reduce is not None:
            self.finish_reduce()
            self.finish_reduce = None


class RankState:
    """The stages of a rank and the batch at hand.

    Args:
        graph: the layer graph.
        stages: by index.
        num_microbatches: rows to hold.
        device: where the batch goes.

    Attributes:
        sizes: samples of each micro-batch.
        offsets: the first sample of each.
        feed: the micro-batches of each input that is read here.
        seeds: for each loss here, the gradient of the batch's loss by each micro-batch's.
        losses: for each loss here, its value on each micro-batch that ran here.
        outputs: tensors to keep, by name and micro-batch.
        verdict: what all ranks do with the gradients of this step.
    """

    def __init__(
        self, graph: LayerGraph, stages: Mapping[int, StageState], num_microbatches: int, device: torch.device
    ) -> None:
        self.graph = graph
        self.stages = stages
        self.device = device
        self.num_microbatches = num_microbatches
        self.required_inputs = frozenset(name for s in stages.values() for name, _ in s.compiled.feeds)
        self.sizes = [0] * num_microbatches
        self.offsets = [0] * num_microbatches
        self.feed: dict[str, tuple[Tensor, ...]] = {}
        self.seeds: dict[str, list[Tensor]] = {}
        self.losses: dict[str, list[Tensor | None]] = {}
        self.outputs: dict[str, dict[int, Tensor]] = {}
        self.verdict = Verdict()
        self._seeds_sizes: tuple[int, ...] = ()
        self.clear()

    def clear(self) -> None:
        """Lets go of all micro-batches."""
        self.feed.clear()
        self.outputs = {}
        for stage in self.stages.values():
            stage.arrivals = [{} for _ in range(self.num_microbatches)]
            stage.gradients = [{} for _ in range(self.num_microbatches)]
            stage.live = [None] * self.num_microbatches
            stage.finish_reduce = None

    def begin(self, batch: Mapping[str, Tensor], sizes: Sequence[int], step: int) -> None:
        """Takes a batch that `check_batch` has passed, cut into `sizes`."""
        offset = 0
        for m, size in enumerate(sizes):
            self.sizes[m] = size
            self.offsets[m] = offset
            offset += size
        cut = tuple(sizes)
        for name in self.required_inputs:
            self.feed[name] = split(batch[name].to(self.device, non_blocking=True), cut)
        if cut != self._seeds_sizes:
            self._seeds_sizes = cut
            self._make_seeds(cut, offset)
        self.outputs = {}
        self.verdict = Verdict()
        for stage in self.stages.values():
            for name, _ in stage.compiled.loss_slots:
                self.losses[name] = [None] * self.num_microbatches
            for layer in stage.replica.random_layers:
                layer.step = step

    def _make_seeds(self, sizes: tuple[int, ...], num_samples: int) -> None:
        for stage in self.stages.values():
            for name, _ in stage.compiled.loss_slots:
                layer = self.graph.layers[name]
                dtype = getattr(torch, self.graph.specs[layer.outputs[0]].dtype)
                factors = [layer.weight * loss_factor(layer.reduction, size, num_samples) for size in sizes]
                self.seeds[name] = [torch.tensor(f, dtype=dtype, device=self.device) for f in factors]
