"""Hypothesis strategies for layer graphs that run, and batches that fit them.

Drawn graphs are small (widths 4 to 8, a few layers), but have what makes cutting hard: skips,
branches, tensors with several readers, layers with several outputs, one tensor read twice by a
layer, tensors without gradient among those with, several inputs and several losses that enter and
leave anywhere, and what `pipeflow.testing.drawn_structures` adds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from hypothesis import strategies as st
from torch import nn

from pipeflow.graphs.layer import Handle, lazy
from pipeflow.graphs.layer_graph import LayerGraph
from pipeflow.graphs.nesting import flatten
from pipeflow.graphs.randomness import isolated
from pipeflow.graphs.tensor_spec import TensorSpec, normalise_dtype
from pipeflow.testing import drawn_structures

_WIDTHS = (4, 6, 8)
_WIDEST = 16


def concatenate(*tensors: torch.Tensor) -> torch.Tensor:
    """All tensors side by side: (B, w1), (B, w2), ... to (B, w1 + w2 + ...)."""
    return torch.cat(tensors, dim=1)


def gate(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The positive part, and where it is positive; the second has no gradient."""
    return torch.relu(x), (x > 0).to(x.dtype)


def mean_square(x: torch.Tensor) -> torch.Tensor:
    """A loss without a target: the mean over samples and features of the squares."""
    return x.square().mean()


class Fork(nn.Module):
    """Two outputs from one input: a linear map of it, and the input scaled by a weight."""

    def __init__(self, width: int, other: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.linear = nn.Linear(width, other, dtype=dtype)
        self.scale = nn.Parameter(torch.full((width,), 0.5, dtype=dtype))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.linear(x), x * self.scale


class RunningShift(nn.Module):
    """Takes a running mean of what it saw off its input; changes a buffer when training."""

    mean: torch.Tensor

    def __init__(self, width: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shift = self.mean.clone()
        if self.training:
            with torch.no_grad():
                self.mean.lerp_(x.detach().mean(0), 0.1)
        return x - shift


class NormedFeatures(nn.Module):
    """Batch-norm over samples and features together, so that one sample is enough."""

    def __init__(self, momentum: float | None, affine: bool, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        # A large eps: features that are nearly alike must not blow up rounding.
        self.norm = nn.BatchNorm1d(1, eps=0.01, momentum=momentum, affine=affine, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.norm(x.unsqueeze(1)).squeeze(1))


class Builder:
    """A graph being drawn: its tensors of shape (B, width) so far, and masks and indices beside them."""

    def __init__(self, draw: st.DrawFn, dtype: str) -> None:
        self.draw = draw
        self.dtype = cast(torch.dtype, getattr(torch, dtype))
        self.graph = LayerGraph("drawn")
        self.pool: list[Handle] = []
        self.read: set[str] = set()
        self.side: list[Handle] = []
        self.shared: dict[int, nn.Linear] = {}
        self.num_layers = 0

    def input(self, name: str, width: int) -> Handle:
        handle = self.graph.input(name, ("B", width), self.dtype)
        self.pool.append(handle)
        return handle

    def add(self, prefix: str, layer: object, *args: Any, **kwargs: Any) -> None:
        name = f"{prefix}{self.num_layers}"
        given, _ = flatten(self.graph.add(name, layer, *args, **kwargs), lambda value: isinstance(value, Handle))
        self.num_layers += 1
        self.read.update(self.graph.layers[name].inputs)
        for handle in given:
            (self.pool if handle.spec.dtype == normalise_dtype(self.dtype) else self.side).append(handle)

    def pick(self, label: str = "reads") -> Handle:
        """A tensor; the latest is the simplest choice."""
        return self.draw(st.sampled_from(self.pool[::-1]), label=label)

    def pick_like(self, handle: Handle) -> Handle:
        """A tensor as wide as `handle`, perhaps itself."""
        alike = [h for h in reversed(self.pool) if _width(h) == _width(handle) and h is not handle]
        return self.draw(st.sampled_from([*alike, handle]))

    def width_of(self, handle: Handle) -> int:
        return _width(handle)

    def width(self) -> int:
        return self.draw(st.sampled_from(_WIDTHS), label="width")

    @property
    def unread(self) -> list[Handle]:
        return [handle for handle in self.pool if handle.name not in self.read]


def _width(handle: Handle) -> int:
    return int(handle.spec.shape[1])


def _linear(b: Builder) -> None:
    x = b.pick()
    b.add("linear", lazy(nn.Linear, _width(x), b.width(), dtype=b.dtype), x)


def _instance(b: Builder) -> None:
    x = b.pick()
    with isolated(b.num_layers):
        module = nn.Linear(_width(x), b.width(), dtype=b.dtype)
    if b.draw(st.booleans(), label="frozen bias"):
        module.bias.requires_grad_(False)
    b.add("given", module, x)


def _shared(b: Builder) -> None:
    x = b.pick()
    with isolated(_width(x)):
        module = b.shared.setdefault(_width(x), nn.Linear(_width(x), _width(x), dtype=b.dtype))
    b.add("shared", module, x)


def _mlp(b: Builder) -> None:
    x = b.pick()
    norm, linear = lazy(nn.LayerNorm, _width(x), dtype=b.dtype), lazy(nn.Linear, _width(x), b.width(), dtype=b.dtype)
    b.add("mlp", lazy(nn.Sequential, norm, linear, lazy(nn.GELU)), x)


def _activation(b: Builder) -> None:
    b.add("act", b.draw(st.sampled_from([torch.tanh, nn.functional.gelu, torch.sigmoid])), b.pick())


def _join(b: Builder) -> None:
    x = b.pick()
    b.add("join", b.draw(st.sampled_from([torch.add, torch.mul])), x, b.pick_like(x))


def _cat(b: Builder) -> None:
    parts = [b.pick() for _ in range(b.draw(st.integers(2, 3)))]
    while sum(map(_width, parts)) > _WIDEST:
        parts.pop()
    b.add("cat", concatenate, *parts)


def _bilinear(b: Builder) -> None:
    x, y = b.pick(), b.pick()
    b.add("bilinear", lazy(nn.Bilinear, _width(x), _width(y), b.width(), dtype=b.dtype), x, y)


def _chunk(b: Builder) -> None:
    b.add("chunk", torch.chunk, b.pick(), chunks=2, dim=1)


def _fork(b: Builder) -> None:
    x = b.pick()
    b.add("fork", lazy(Fork, _width(x), b.width(), dtype=b.dtype), x)


def _gate(b: Builder) -> None:
    b.add("gate", gate, b.pick())


def _stop(b: Builder) -> None:
    b.add("stop", torch.detach, b.pick())


def _dropout(b: Builder) -> None:
    b.add("dropout", lazy(nn.Dropout, 0.5), b.pick())


def _running(b: Builder) -> None:
    x = b.pick()
    b.add("running", lazy(RunningShift, _width(x), dtype=b.dtype), x)


def _batch_norm(b: Builder) -> None:
    x = b.pick()
    if _width(x) > 1:
        momentum = b.draw(st.sampled_from([0.1, None, 1.0]), label="momentum")
        b.add("norm", lazy(NormedFeatures, momentum, b.draw(st.booleans(), label="affine"), dtype=b.dtype), x)


_STEPS: tuple[Callable[[Builder], None], ...] = (
    _linear,
    _mlp,
    _activation,
    _join,
    _cat,
    _bilinear,
    _chunk,
    _fork,
    _gate,
    _stop,
)


@st.composite
def layer_graphs(
    draw: st.DrawFn,
    *,
    max_layers: int = 10,
    dtype: object = "float32",
    allow_random: bool = False,
    allow_shared: bool = False,
    allow_buffers: bool = False,
    allow_instances: bool = True,
) -> LayerGraph:
    """Layer graphs that pass `LayerGraph.check` and run for any batch of at least one sample.

    Args:
        max_layers: losses included; at least 3.
        dtype: of inputs and parameters, "float32" or "float64".
        allow_random: layers that draw random numbers.
        allow_shared: layers that share their parameters.
        allow_buffers: layers that change a buffer when training: batch-norm, and one that replicas refuse.
        allow_instances: modules given as they are; without them and shared ones a graph can be saved.
    """
    if max_layers < 3:
        raise ValueError(f"max_layers={max_layers}: a drawn graph has at least 3 layers")
    optional = (
        (_instance, allow_instances),
        (_shared, allow_shared),
        (_dropout, allow_random),
        (_running, allow_buffers),
        (_batch_norm, allow_buffers),
    )
    steps = [*_STEPS, *drawn_structures.STEPS, *(step for step, allowed in optional if allowed)]
    b = Builder(draw, normalise_dtype(dtype))
    for i in range(draw(st.integers(1, 2), label="inputs")):
        b.input(f"x{i}", b.width())
    num_losses = draw(st.integers(1, 2 if max_layers >= 6 else 1), label="losses")
    most = max_layers - 2 * num_losses - 1
    num_steps = draw(st.integers(min(2, most), most), label="steps")
    # A second loss may leave the graph in its middle.
    early = draw(st.integers(0, num_steps), label="early loss") if num_losses > 1 else num_steps
    for step in range(num_steps):
        if step and step == early:
            num_losses -= 1
            _loss(b, num_losses, b.pick())
        draw(st.sampled_from(steps))(b)
    # Every input must be read; other tensors may be left as ends of the graph.
    ends = [h for h in b.unread if h.name in b.graph.inputs or not draw(st.booleans(), label="dead end")]
    if len(ends) > 1:
        b.add("cat", concatenate, *ends)
        ends = [b.pool[-1]]
    for i in range(num_losses):
        _loss(b, i, ends[0] if ends and i == 0 else b.pick())
    return b.graph.check()


def _loss(b: Builder, index: int, x: Handle) -> None:
    """A head with weights of its own and a loss on it."""
    width = b.width()
    b.read.add(x.name)
    head = b.graph.add(f"head{index}", lazy(nn.Linear, _width(x), width, dtype=b.dtype), x)
    weight = b.draw(st.sampled_from([1.0, 0.5, 2.0]), label="weight")
    name = f"loss{index}"
    match b.draw(st.sampled_from(["mse", "cross_entropy", "mean_square", "sum"]), label="loss"):
        case "cross_entropy":
            label = b.graph.input(f"label{index}", ("B",), "int64")
            b.graph.loss(name, nn.functional.cross_entropy, head, label, weight=weight)
        case "mean_square":
            b.graph.loss(name, mean_square, head, weight=weight)
        case kind:
            target = b.graph.input(f"target{index}", ("B", width), b.dtype)
            b.graph.loss(
                name, nn.functional.mse_loss, head, target, weight=weight, reduction="sum" if kind == "sum" else "mean"
            )


def sample_batch(
    graph: LayerGraph, num_samples: int, *, seed: int = 0, lengths: Mapping[str, int] | None = None
) -> dict[str, torch.Tensor]:
    """A batch of random numbers that fits the graph.

    Integers are below the number of classes, where they are read together with scores of that
    many; floats are normally distributed.

    Args:
        graph: for its inputs.
        num_samples: at least 1.
        seed: of the numbers.
        lengths: by name, where inputs have some; by default any that fit.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = graph.example_lengths if lengths is None else lengths
    return {
        name: _tensor(graph, name, spec, spec.shape_at(num_samples, sizes), generator)
        for name, spec in graph.inputs.items()
    }


def _tensor(
    graph: LayerGraph, name: str, spec: TensorSpec, shape: tuple[int, ...], generator: torch.Generator
) -> torch.Tensor:
    dtype = cast(torch.dtype, getattr(torch, spec.dtype))
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape, dtype=dtype, generator=generator)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    classes = [
        size
        for layer in graph.layers.values()
        if name in layer.inputs
        for other in layer.inputs
        if other != name and len(graph.specs[other].shape) > 1 and isinstance(size := graph.specs[other].shape[1], int)
    ]
    return torch.randint(0, min(classes, default=2), shape, dtype=dtype, generator=generator)


def batches(graph: LayerGraph, num_samples: int | st.SearchStrategy[int]) -> st.SearchStrategy[dict[str, torch.Tensor]]:
    """Batches that fit the graph; see `sample_batch`.

    Args:
        graph: for its inputs.
        num_samples: a number of samples, or a strategy for it.
    """
    counts = st.just(num_samples) if isinstance(num_samples, int) else num_samples
    return st.builds(lambda n, seed: sample_batch(graph, n, seed=seed), counts, st.integers(0, 2**16))
