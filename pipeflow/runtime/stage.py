"""The layers of one stage, compiled to calls over numbered slots.

Decides where each tensor of a micro-batch lies while a stage works on it, and through which
views its readers read it. Knows nothing of ranks, schedules or transports.

Every value has a slot in a plain list. A tensor from another stage enters as a detached leaf;
its gradient is the leaf's `.grad`. Gradients of a tensor with several readers add up in the
order that `pipeflow.flows` fixes:

    natural flow        y ──view── reader 1            autograd adds: outside, reader 2, reader 1
                        └──view── reader 2

    any other flow      y ── Fan ┬─ part 0 ── reader 1     `Fan` adds the parts from last to first;
                                 ├─ part 1 ── (sent)       a sent part is a root whose seed is the
                                 └─ part 2 ── reader 3     gradient that comes back
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from pipeflow.flows import Flow
from pipeflow.graphs.calling import flat_call, is_tensor
from pipeflow.graphs.layer import Layer
from pipeflow.graphs.layer_graph import LayerGraph
from pipeflow.graphs.nesting import describe
from pipeflow.runtime.strides import packed, straight

Slots = list[Any]
Call = Callable[[Slots], None]


class Fan(torch.autograd.Function):
    """One view per part; backward adds the parts' gradients from the last to the first."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, num_parts: int) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(value.view_as(value) for _ in range(num_parts))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None]:
        total: Tensor | None = None
        for gradient in reversed(gradients):
            if gradient is not None:
                total = gradient if total is None else total + gradient
        return total, None


@dataclass(frozen=True, slots=True)
class Leaf:
    """A tensor from another stage, as one part of the readers here sees it."""

    tensor: str
    part: str
    slot: int
    needs_gradient: bool


@dataclass(frozen=True, slots=True)
class Root:
    """Where backward starts: the slot, and the parts whose gradients add up to its seed."""

    slot: int
    parts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LayerCall:
    """One call, and the slots that it reads and writes."""

    run: Call
    layer: Layer
    reads: tuple[int, ...]
    writes: tuple[int, ...]


class Run(Protocol):
    """Several calls as one, of which it can be told which layer raised an error."""

    layers: frozenset[str]

    def __call__(self, slots: Slots) -> None: ...

    def failed_layer(self, error: BaseException) -> str | None: ...


@dataclass
class CompiledStage:
    """What to do for one micro-batch of one stage.

    Attributes:
        num_slots: length of the slot list.
        feeds: (graph input, slot) of every input of the graph that is read here.
        leaves: what comes from other stages.
        calls: the layers one by one, in order.
        work: what forward does: the calls, or runs of them as one.
        segments: such runs (`pipeflow.runtime.recompute`).
        slot_by_tensor: where each tensor that is computed here lies.
        roots: where backward starts, losses apart.
        loss_slots: (loss, slot) of every loss here.
    """

    num_slots: int = 0
    feeds: list[tuple[str, int]] = field(default_factory=list)
    leaves: list[Leaf] = field(default_factory=list)
    calls: list[LayerCall] = field(default_factory=list)
    work: list[Call] = field(default_factory=list)
    segments: list[Run] = field(default_factory=list)
    slot_by_tensor: dict[str, int] = field(default_factory=dict)
    roots: list[Root] = field(default_factory=list)
    loss_slots: list[tuple[str, int]] = field(default_factory=list)

    def new_slot(self) -> int:
        self.num_slots += 1
        return self.num_slots - 1

    def add(self, call: LayerCall) -> None:
        self.calls.append(call)
        self.work.append(call.run)

    def failed_layer(self, slots: Slots, error: BaseException) -> str | None:
        """The layer whose forward raised the error: in a run, or the first that gave no tensor."""
        in_run = (name for segment in self.segments if (name := segment.failed_layer(error)) is not None)
        if (name := next(in_run, None)) is not None:
            return name
        runs = frozenset().union(*(segment.layers for segment in self.segments))
        alone = (call for call in self.calls if call.layer.name not in runs)
        return next((c.layer.name for c in alone if not all(isinstance(slots[i], Tensor) for i in c.writes)), None)


def compile_stage(
    graph: LayerGraph,
    stage: int,
    layers: Collection[str],
    flow_by_tensor: Mapping[str, Flow],
    function_by_layer: Mapping[str, Callable[..., Any]],
    *,
    train: bool,
) -> CompiledStage:
    """Compiles the layers of a stage.

    Args:
        graph: the layer graph.
        stage: index of the stage in the flows.
        layers: names of the layers to run, a subset of the stage's.
        flow_by_tensor: of all tensors (`pipeflow.flows.flows`).
        function_by_layer: what to call for each.
        train: with leaves, views and roots for backward; without, tensors are passed as they are.
    """
    compiled = CompiledStage()
    read_slots: dict[tuple[str, str], int] = {}
    for name, layer in graph.layers.items():
        if name not in layers:
            continue
        reads = tuple(
            _read(compiled, graph, stage, name, t, flow_by_tensor, read_slots, train=train) for t in layer.inputs
        )
        outputs = tuple(compiled.new_slot() for _ in layer.outputs)
        run = _call(layer, function_by_layer[name], reads, outputs)
        compiled.add(LayerCall(run, layer, tuple(slot for slot, _ in reads), outputs))
        for tensor, slot in zip(layer.outputs, outputs, strict=True):
            compiled.slot_by_tensor[tensor] = slot
            if train and tensor in flow_by_tensor:
                _start_backward(compiled, stage, flow_by_tensor[tensor], slot, layer, read_slots)
        if layer.is_loss:
            compiled.loss_slots.append((name, outputs[0]))
    return compiled


def _read(
    compiled: CompiledStage,
    graph: LayerGraph,
    stage: int,
    reader: str,
    tensor: str,
    flow_by_tensor: Mapping[str, Flow],
    read_slots: dict[tuple[str, str], int],
    *,
    train: bool,
) -> tuple[int, bool]:
    """(slot, whether through a view of its own) from which a layer reads a tensor."""
    if tensor in graph.inputs:
        if (tensor, "") not in read_slots:
            read_slots[tensor, ""] = compiled.new_slot()
            compiled.feeds.append((tensor, read_slots[tensor, ""]))
        return read_slots[tensor, ""], False
    flow = flow_by_tensor[tensor]
    part = next((p for p in flow.parts if reader in p.readers), None) if train else None
    if flow.source == stage:
        if part is None:
            return compiled.slot_by_tensor[tensor], False
        num_readers = sum(len(p.readers) for p in flow.parts)
        if flow.is_natural:
            return compiled.slot_by_tensor[tensor], num_readers > 1
        return read_slots[tensor, part.name], len(part.readers) > 1
    key = "" if part is None else part.name
    if (tensor, key) not in read_slots:
        read_slots[tensor, key] = compiled.new_slot()
        compiled.leaves.append(Leaf(tensor, key, read_slots[tensor, key], part is not None))
    return read_slots[tensor, key], part is not None and len(part.readers) > 1


def _start_backward(
    compiled: CompiledStage,
    stage: int,
    flow: Flow,
    slot: int,
    layer: Layer,
    read_slots: dict[tuple[str, str], int],
) -> None:
    """Notes where gradients from other stages enter, with a `Fan` where the order needs one."""
    remote = tuple(part.name for part in flow.parts if part.stage != stage)
    if not remote:
        return
    if flow.is_natural:
        compiled.roots.append(Root(slot, remote))
        return
    fan = tuple(compiled.new_slot() for _ in flow.parts)
    compiled.add(LayerCall(_fan_call(slot, fan), layer, (slot,), fan))
    for part, part_slot in zip(flow.parts, fan, strict=True):
        if part.stage == stage:
            read_slots[flow.tensor, part.name] = part_slot
        else:
            compiled.roots.append(Root(part_slot, (part.name,)))


def _fan_call(source: int, targets: tuple[int, ...]) -> Call:
    first, last = targets[0], targets[-1] + 1

    def call(slots: Slots) -> None:
        slots[first:last] = Fan.apply(slots[source], last - first)  # type: ignore[no-untyped-call]

    return call


def _call(
    layer: Layer, function: Callable[..., Any], reads: tuple[tuple[int, bool], ...], outputs: tuple[int, ...]
) -> Call:
    """The call of one layer. The common shapes have closures of their own: they are the hot path."""
    sources = tuple(slot for slot, _ in reads)
    target, kwargs = outputs[0], dict(layer.kwargs)
    if layer.arguments is not None or layer.results is not None:
        function, kwargs = flat_call(layer, function), {}
    # One view for all the places in which a layer reads a tensor: their gradients add up first.
    passes = {slot: _view for slot, viewed in reads if viewed}
    passes |= {slot: straight for i, (slot, _) in enumerate(reads) if i in layer.strided_gradients}
    plain = not passes

    def arguments(slots: Slots) -> list[Any]:
        if plain:
            return [slots[i] for i in sources]
        seen = {slot: through(slots[slot]) for slot, through in passes.items()}
        return [seen[i] if i in seen else slots[i] for i in sources]

    if layer.outputs != (layer.name,):

        def call(slots: Slots) -> None:
            values = function(*arguments(slots), **kwargs)
            # A tensor has a length too, which may even be that number.
            if isinstance(values, Tensor) or len(values) != len(outputs):
                seen = describe(values, is_tensor)
                raise ValueError(f"gave {seen}, but {len(outputs)} tensors while the graph was described")
            for i, value in enumerate(values):
                slots[outputs[i]] = packed(value) if i in layer.strided_outputs else value

    elif layer.strided_outputs:

        def call(slots: Slots) -> None:
            slots[target] = packed(function(*arguments(slots), **kwargs))

    elif len(sources) == 1 and plain and not kwargs:
        source = sources[0]

        def call(slots: Slots) -> None:
            slots[target] = function(slots[source])

    else:

        def call(slots: Slots) -> None:
            slots[target] = function(*arguments(slots), **kwargs)

    return call


def _view(value: Tensor) -> Tensor:
    return value.view_as(value)
