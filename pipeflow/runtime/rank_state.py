"""What one rank holds while a step runs: rows indexed by micro-batch.

Nothing here decides what happens when; the bound actions (`pipeflow.runtime.binding`) read and
write these rows, the executor starts a step on them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from pipeflow.graphs.layer import Layer
from pipeflow.graphs.layer_graph import LayerGraph
from pipeflow.runtime.cut import even_cut
from pipeflow.runtime.gradients import Verdict
from pipeflow.runtime.losses import loss_factors
from pipeflow.runtime.microbatch import MicroBatches
from pipeflow.runtime.offload import HostStore
from pipeflow.runtime.randomness import Keyed
from pipeflow.runtime.replica import StageReplica
from pipeflow.runtime.stage import CompiledStage, Slots


@dataclass
class StageState:
    """One stage of the rank.

    Attributes:
        compiled: its layers as calls.
        replica: its weights.
        arrivals: by micro-batch, activations from other stages by tensor name.
        gradients: by micro-batch, gradients from other stages by part name; None where backward gave none.
        outbox: by micro-batch, what is to be sent to each other stage; a send takes it out.
        live: by micro-batch, the slots between its forward and its `Free`. After forward, only what backward
            starts from or gives.
        finish_reduce: waits for the running sum of gradients, if one was started.
        finish_shared: the same for sums over several stages.
        keyed_layers: those to be told which call and samples they work on; by default the random ones.
        finish_statistics: waits for the replicas' statistics and takes them in, if they were sent.
        store: what its offloaded layers saved on the host; None where none is offloaded.
    """

    compiled: CompiledStage
    replica: StageReplica
    arrivals: list[dict[str, Tensor]] = field(default_factory=list)
    gradients: list[dict[str, Tensor | None]] = field(default_factory=list)
    outbox: list[dict[int, list[Tensor]]] = field(default_factory=list)
    live: list[Slots | None] = field(default_factory=list)
    finish_reduce: Callable[[], None] | None = None
    finish_shared: list[Callable[[], None]] = field(default_factory=list)
    finish_statistics: Callable[[], None] | None = None
    keyed_layers: Sequence[Keyed] = ()
    store: HostStore | None = None

    def __post_init__(self) -> None:
        self.keyed_layers = self.keyed_layers or self.replica.random_layers

    def wait_reduce(self) -> None:
        """Puts the summed gradients in place, where sums were started, or those of this replica alone."""
        while self.finish_shared:
            self.finish_shared.pop()()
        if self.finish_reduce is not None:
            self.finish_reduce()
            self.finish_reduce = None
        else:
            self.replica.collect_gradients()

    def wait_statistics(self) -> None:
        """Takes in the statistics of all replicas, if they were sent."""
        if self.finish_statistics is not None:
            self.finish_statistics()
            self.finish_statistics = None


class RankState:
    """The stages of a rank and the batch at hand.

    Args:
        graph: the layer graph.
        stages: by index.
        num_microbatches: rows to hold.
        device: where the batch goes.

    Attributes:
        cut: how large its micro-batches are.
        sizes: samples of each micro-batch.
        offsets: the first sample of each.
        feed: the micro-batches of each input that is read here.
        read_inputs: the inputs that layers here read.
        required_inputs: those that a batch must have here: also what losses are counted by.
        factors: for each loss here, what each micro-batch's counts in the batch's.
        seeds: the factors times the loss's weight, as gradients to start backward with.
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
        self._losses = [graph.layers[name] for s in stages.values() for name, _ in s.compiled.loss_slots]
        counts = [loss.count for loss in self._losses if loss.count is not None]
        self.read_inputs = frozenset(name for s in stages.values() for name, _ in s.compiled.feeds)
        self.required_inputs = self.read_inputs.union(counts)
        self.sizes = [0] * num_microbatches
        self.offsets = [0] * num_microbatches
        self.cut = even_cut(0, num_microbatches)
        self.feed: dict[str, Sequence[Tensor | None]] = {}
        self.factors: dict[str, Sequence[float]] = {}
        self.seeds: dict[str, list[Tensor]] = {}
        self.losses: dict[str, list[Tensor | float | None]] = {}
        self.outputs: dict[str, dict[int, Tensor]] = {}
        self.verdict = Verdict()
        self._seeded: dict[str, tuple[tuple[int, ...], float]] = {}
        self.clear()

    def clear(self) -> None:
        """Lets go of all micro-batches."""
        self.feed.clear()
        self.outputs = {}
        for stage in self.stages.values():
            stage.arrivals = [{} for _ in range(self.num_microbatches)]
            stage.gradients = [{} for _ in range(self.num_microbatches)]
            stage.outbox = [{} for _ in range(self.num_microbatches)]
            stage.live = [None] * self.num_microbatches
            stage.finish_reduce = stage.finish_statistics = None
            if stage.store is not None:
                stage.store.clear()
            stage.finish_shared = []

    def begin(self, batch: MicroBatches, *, share: float, draw: int) -> None:
        """Takes a batch.

        Args:
            share: what its gradients count among those of several batches.
            draw: which call this is, for random layers.
        """
        cut = batch.cut
        self.cut = cut
        self.sizes[:] = cut.sizes
        self.offsets[:] = cut.offsets
        for name in self.read_inputs:
            self.feed[name] = batch.parts(name, self.device)
        for loss in self._losses:
            if loss.name in batch.factors:
                self._make_seeds(loss, batch.factors[loss.name], share)
                self._seeded.pop(loss.name, None)
            elif self._seeded.get(loss.name) != (cut.sizes, share):
                self._make_seeds(loss, loss_factors(loss, cut.sizes), share)
                self._seeded[loss.name] = (cut.sizes, share)
        self.outputs = {}
        self.verdict = Verdict()
        for stage in self.stages.values():
            for name, _ in stage.compiled.loss_slots:
                self.losses[name] = [None] * self.num_microbatches
            for layer in stage.keyed_layers:
                layer.step = draw
            if stage.replica.statistics is not None:
                stage.replica.statistics.begin(self.graph.layers)
                if stage.replica.statistics.is_alone:
                    stage.finish_statistics = partial(stage.replica.statistics.finish_alone, cut.sizes)

    def _make_seeds(self, loss: Layer, factors: Sequence[float], share: float) -> None:
        dtype = getattr(torch, self.graph.specs[loss.outputs[0]].dtype)
        self.factors[loss.name] = factors
        self.seeds[loss.name] = [
            torch.tensor(loss.weight * f * share, dtype=dtype, device=self.device) for f in factors
        ]
