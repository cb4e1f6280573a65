"""Runs of layers that keep nothing for backward and are computed again for it.

Decides how a run of calls over slots becomes one call that `torch.utils.checkpoint` can repeat:

    slots     in ─┐            ┌─► out                 forward: the run works on slots of its own,
    own           └► a ─► b ─► c                       each let go of after its last reader

Backward meets the run's last node, finds nothing saved, and the run is computed again from what
entered it; then backward goes on through the nodes of the first forward, so sums of gradients keep
their order. What a second forward must not do twice or otherwise than the first:

    random layers     draw by (step, layer, first sample), which the bound backward sets again;
    buffers           are as they were before the first forward of that micro-batch, in copies that
                      the layer is lent meanwhile; what it writes there is dropped.

Knows nothing of ranks, schedules or transports.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import groupby
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeflow.flows import Flow
from pipeflow.graphs.layer import Layer
from pipeflow.runtime.fresh_buffers import Places, copied, places_of
from pipeflow.runtime.stage import CompiledStage, LayerCall, Slots

_RAISED_IN = "_pipeflow_raised_in"
"""Under this name an error carries the recomputed layer that raised it."""


class Segment:
    """A run of recomputed layers as one call over the stage's slots.

    Args:
        calls: of the run, in order.
        outputs: slots that others read or that something is done with after forward.
        num_slots: of the stage.
        modules: of the layers, for their buffers.
    """

    def __init__(
        self,
        calls: Sequence[LayerCall],
        outputs: Sequence[int],
        num_slots: int,
        modules: Mapping[str, nn.Module],
    ) -> None:
        self.layers = frozenset(call.layer.name for call in calls)
        written = {slot for c in calls for slot in c.writes}
        self._inputs = tuple(dict.fromkeys(slot for c in calls for slot in c.reads if slot not in written))
        self._outputs = tuple(outputs)
        self._num_slots = num_slots
        last = {slot: position for position, c in enumerate(calls) for slot in (*c.reads, *c.writes)}
        self._calls = [
            (c, tuple(s for s, at in last.items() if at == position and s not in outputs), _buffers(c.layer, modules))
            for position, c in enumerate(calls)
        ]

    def __call__(self, slots: Slots) -> None:
        first = _Buffers()
        values = checkpoint(
            lambda *inputs: self._run(first, inputs),
            *[slots[i] for i in self._inputs],
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for slot, value in zip(self._outputs, values, strict=True):
            slots[slot] = value

    def _run(self, buffers: _Buffers, inputs: Sequence[Any]) -> tuple[Any, ...]:
        """Forward; the first time that `buffers` are given it notes them, then it lends copies."""
        own: Slots = [None] * self._num_slots
        for slot, value in zip(self._inputs, inputs, strict=True):
            own[slot] = value
        for position, (call, dropped, places) in enumerate(self._calls):
            try:
                with buffers.lent(position, places) if places else nullcontext():
                    call.run(own)
            except Exception as error:
                # Not kept here: with the error, all that its frames hold would stay.
                error.__dict__.setdefault(_RAISED_IN, call.layer.name)
                raise
            for slot in dropped:
                own[slot] = None
        buffers.are_noted = True
        return tuple(own[i] for i in self._outputs)

    def failed_layer(self, error: BaseException) -> str | None:
        """The layer of the run that raised the error, in either forward."""
        name: str | None = error.__dict__.get(_RAISED_IN)
        return name if name in self.layers else None


class _Buffers:
    """The buffers that a run's first forward changed, as they were before, by position in the run."""

    def __init__(self) -> None:
        self._before: dict[int, list[Tensor]] = {}
        self.are_noted = False

    @contextmanager
    def lent(self, position: int, places: Places) -> Iterator[None]:
        """Notes the buffers; if they are noted already, puts copies of those in their places meanwhile."""
        current = [getattr(module, name) for module, name in places]
        if not self.are_noted:
            self._before[position] = copied(current)
            yield
            return
        try:
            for (module, name), copy in zip(places, copied(self._before[position]), strict=True):
                setattr(module, name, copy)
            yield
        finally:
            for (module, name), buffer in zip(places, current, strict=True):
                setattr(module, name, buffer)


def _buffers(layer: Layer, modules: Mapping[str, nn.Module]) -> Places:
    """Where the buffers are that the layer's forward changes."""
    return places_of(modules[layer.name], layer.mutated_buffers) if layer.mutated_buffers else ()


def fuse_runs(
    compiled: CompiledStage,
    recompute: Collection[str],
    flow_by_tensor: Mapping[str, Flow],
    modules: Mapping[str, nn.Module],
) -> None:
    """Makes each run of recomputed layers one call of the compiled stage.

    Args:
        compiled: for training; its `work` and `segments` are changed.
        recompute: names of layers.
        flow_by_tensor: of all tensors.
        modules: of the stage's layers.
    """
    wanted = {root.slot for root in compiled.roots} | {slot for _, slot in compiled.loss_slots}
    wanted |= {slot for t, slot in compiled.slot_by_tensor.items() if t in flow_by_tensor and flow_by_tensor[t].targets}
    compiled.work, compiled.segments = [], []
    for again, group in groupby(compiled.calls, key=lambda call: call.layer.name in recompute):
        run = list(group)
        if not again:
            compiled.work += [call.run for call in run]
            continue
        inside = {id(call) for call in run}
        read = {slot for call in compiled.calls if id(call) not in inside for slot in call.reads}
        outputs = [slot for call in run for slot in call.writes if slot in read or slot in wanted]
        compiled.segments.append(Segment(run, outputs, compiled.num_slots, modules))
        compiled.work.append(compiled.segments[-1])
