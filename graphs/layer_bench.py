"""Layers run one by one on a device: on what they really read, with what backward keeps, against the clock.

Takes samples; what they mean for planning is the profiler's business.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from pipeflow.errors import CostError, PipeflowError
from pipeflow.graphs.calling import flat_call
from pipeflow.graphs.layer import Layer
from pipeflow.graphs.layer_graph import LayerGraph
from pipeflow.graphs.layer_memory import LayerMemory, observe
from pipeflow.graphs.stopwatch import Call, calibrate, sample, spread

Tensors = Mapping[str, torch.Tensor]


@contextmanager
def _naming(layer: Layer) -> Iterator[None]:
    """What the layer raises meanwhile is raised with its name."""
    try:
        yield
    except PipeflowError:
        raise
    except Exception as error:
        raise CostError(
            f"layer {layer.name!r} cannot be measured: {type(error).__name__}: {error}; it must run on the micro-batch "
            "that it is profiled on, forward and backward"
        ) from error


class GraphRun:
    """One forward of the whole graph: what each layer reads, and the bytes that backward keeps of it."""

    def __init__(self, graph: LayerGraph, functions: Mapping[str, Callable[..., Any]], batch: Tensors) -> None:
        self._graph, self._functions = graph, functions
        self._values = dict(batch)
        self.saved_bytes: dict[str, int] = {}
        seen = {
            t.untyped_storage().data_ptr()
            for f in functions.values()
            if isinstance(f, nn.Module)
            for t in (*f.parameters(), *f.buffers())
        }
        kept: list[torch.Tensor] = []  # alive until all is counted, so that no address comes twice
        sizes: list[int] = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.nbytes() and storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                kept.append(tensor)
                sizes.append(storage.nbytes())
            return tensor

        for name, layer in graph.layers.items():
            sizes.clear()
            with _naming(layer), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                outputs = self.bench(layer).forward()
            self._values.update(zip(layer.outputs, (t.detach() for t in outputs), strict=True))
            kept += outputs
            self.saved_bytes[name] = sum(sizes)

    def observe(self, layer: Layer, device: torch.device) -> LayerMemory:
        """What the layer allocates and keeps."""
        bench = self.bench(layer)
        function = bench.function
        state = [*function.parameters(), *function.buffers()] if isinstance(function, nn.Module) else []
        with _naming(layer):
            return observe(layer, bench.forward, bench.inputs, state, device)

    def bench(self, layer: Layer) -> _Bench:
        """The layer by itself, with inputs cut off from what made them."""
        function = self._functions[layer.name]
        inputs = [
            self._values[t].detach().requires_grad_(t in self._graph.differentiable and layer.has_backward)
            for t in layer.inputs
        ]
        wanted = [i for i, t in enumerate(layer.outputs) if t in self._graph.differentiable]
        return _Bench(layer, function, inputs, wanted)


@dataclass(slots=True)
class _Bench:
    """A layer with its inputs, ready to run forward, and backward through what forward made."""

    layer: Layer
    function: Callable[..., Any]
    inputs: list[torch.Tensor]
    wanted: list[int]
    weights: list[nn.Parameter] = field(default_factory=list)
    sources: list[torch.Tensor] = field(default_factory=list)
    call: Callable[..., Any] = field(init=False)

    def __post_init__(self) -> None:
        self.call = flat_call(self.layer, self.function)
        if not self.layer.has_backward:
            return
        self.sources = [t for t in self.inputs if t.requires_grad]
        if isinstance(self.function, nn.Module):
            self.weights = [p for p in self.function.parameters() if p.requires_grad]

    def forward(self) -> tuple[torch.Tensor, ...]:
        result = self.call(*self.inputs)
        return (result,) if isinstance(result, torch.Tensor) else tuple(result)

    def backward(self, outputs: Sequence[torch.Tensor], *, inputs: bool, weights: bool) -> Callable[[], object] | None:
        """A call that runs backward for the inputs, the weights or both; None if there is nothing to do."""
        targets: list[torch.Tensor] = [*(self.sources if inputs else ()), *(self.weights if weights else ())]
        roots = [outputs[i] for i in self.wanted]
        if not targets:
            return None
        grads = [torch.ones_like(t) for t in roots]
        first = torch.autograd.grad(roots, targets, grads, retain_graph=True, allow_unused=True)
        targets = [t for t, g in zip(targets, first, strict=True) if g is not None]
        if not targets:
            return None
        # Weights' gradients are added to those of the micro-batches before.
        start = sum(1 for t in targets if not isinstance(t, nn.Parameter))
        sums = [torch.zeros_like(t) for t in targets[start:]]

        def call() -> None:
            fresh = torch.autograd.grad(roots, targets, grads, retain_graph=True)
            if sums:
                torch._foreach_add_(sums, fresh[start:])

        return call


@dataclass(frozen=True, slots=True)
class Times:
    forward: float
    backward_input: float
    backward_weight: float
    spread: float

    @property
    def total(self) -> float:
        return self.forward + self.backward_input + self.backward_weight


class TimedLayer:
    """A layer with the samples taken of it so far."""

    def __init__(self, bench: _Bench) -> None:
        self._bench = bench
        self._num_calls: dict[str, int] = {}
        self._seconds: dict[str, list[float]] = {}

    def measure(self, device: torch.device, warmup: int) -> None:
        """One more sample of forward, of each half of backward and of both."""
        with _naming(self._bench.layer):
            self._measure(device, warmup)

    def _measure(self, device: torch.device, warmup: int) -> None:
        bench = self._bench
        self._sample("forward", bench.forward, device, warmup)
        if not bench.layer.has_backward:
            return
        # Made anew each time: a forward in between may have changed buffers that backward reads.
        outputs = bench.forward()
        for part, inputs, weights in (("input", True, False), ("weight", False, True), ("both", True, True)):
            if call := bench.backward(outputs, inputs=inputs, weights=weights):
                self._sample(part, call, device, warmup)

    def _sample(self, part: str, call: Call, device: torch.device, warmup: int) -> None:
        if part not in self._num_calls:
            self._num_calls[part] = calibrate(call, device, warmup)
        self._seconds.setdefault(part, []).append(sample(call, self._num_calls[part], device))

    def times(self, overhead: float) -> Times:
        """Medians of the samples, the fixed cost of starting autograd taken off."""
        forward = self._seconds["forward"]
        backward = {
            part: [max(s - overhead, 0.1 * s) for s in self._seconds[part]] if part in self._seconds else [0.0]
            for part in ("input", "weight", "both")
        }
        median = {part: statistics.median(values) for part, values in backward.items()}
        halves = median["input"] + median["weight"]
        scale = median["both"] / halves if halves else 0.0
        whole = backward["both"] if len(backward["both"]) == len(forward) else [0.0] * len(forward)
        return Times(
            forward=statistics.median(forward),
            backward_input=median["input"] * scale,
            backward_weight=median["weight"] * scale,
            spread=spread([f + b for f, b in zip(forward, whole, strict=True)]),
        )
