"""Hypothesis strategies for batches as users make them: whole or in micro-batches, of any lengths.

And for graphs of sequences, in which every tensor has a length that differs between batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from pipeflow.graphs.layer import Handle, lazy
from pipeflow.graphs.layer_graph import LayerGraph
from pipeflow.graphs.sizes import Length
from pipeflow.runtime.microbatch import Batch
from pipeflow.testing.graphs import sample_batch


@st.composite
def training_batches(
    draw: st.DrawFn, graph: LayerGraph, num_microbatches: int, *, max_samples: int = 12, max_steps: int = 3
) -> list[Batch]:
    """Batches for a few steps: most of them whole, some in micro-batches of sizes of their own, empty ones included.

    Args:
        graph: says what fits. Its lengths are drawn anew for each batch and micro-batch.
        num_microbatches: the most that a batch may come in.
        max_samples: of a batch, and of each micro-batch.
        max_steps: batches.
    """
    batches: list[Batch] = []
    for step in range(draw(st.integers(1, max_steps), label="steps")):
        if draw(st.integers(0, 2), label="own micro-batches") < 2:
            batches.append(_sample(draw, graph, draw(st.integers(1, max_samples), label="samples"), seed=step))
            continue
        sizes = draw(st.lists(st.integers(0, 4), min_size=1, max_size=num_microbatches).filter(any), label="sizes")
        batches.append([_sample(draw, graph, size, seed=10 * step + m) for m, size in enumerate(sizes)])
    return batches


def _sample(draw: st.DrawFn, graph: LayerGraph, num_samples: int, *, seed: int) -> dict[str, Tensor]:
    lengths = {}
    for name, length in graph.lengths.items():
        sizes = st.integers(length.low, min(length.high or length.low + 8, length.low + 8))
        lengths[name] = draw(sizes.filter(length.allows), label=name)
    batch = sample_batch(graph, num_samples, seed=seed, lengths=lengths)
    for layer in graph.layers.values():
        if layer.count is not None and num_samples:
            batch[layer.count].view(-1)[0] = 1  # something has to count
    return batch


class Mixer(nn.Module):
    """Causal self-attention with one head, (B, T, width) to the same."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.mix = nn.Linear(width, 3 * width, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.mix(x).chunk(3, dim=-1)
        mixed: Tensor = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return mixed


class Shorten(nn.Module):
    """A convolution over time that keeps every other step: no simple rule gives the new length."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width, 3, stride=2, padding=1, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.conv(x.transpose(1, 2)).transpose(1, 2)
        return result


def last_step(x: Tensor) -> Tensor:
    """(B, T, width) to (B, width)."""
    return x[:, -1]


def masked_mean_square(x: Tensor, mask: Tensor) -> Tensor:
    """The mean square over features and the steps that the mask counts; x is (B, T, width), the mask (B, T)."""
    return (x.square().mean(-1) * mask).sum() / mask.sum().clamp(min=1e-9)


@st.composite
def sequence_graphs(draw: st.DrawFn, *, max_layers: int = 8, dtype: object = "float32") -> LayerGraph:
    """Layer graphs over sequences of a length that differs between batches, with skips and joins.

    Some layers make lengths of their own. One loss is a mean over the steps that a mask counts, one
    (perhaps) a mean over samples.

    Args:
        max_layers: between inputs and heads.
        dtype: "float32" or "float64".
    """
    real: torch.dtype = getattr(torch, str(dtype).removeprefix("torch."))
    graph = LayerGraph("sequences")
    x = graph.input("x", ("B", Length("time", low=2), 4), real)
    mask = graph.input("mask", ("B", "time"), "bool")
    pool: list[Handle] = [x]

    def add(kind: str, layer: Any, *inputs: Handle, **kwargs: Any) -> None:
        pool.append(graph.add(f"{kind}{len(pool)}", layer, *inputs, **kwargs))

    def pick() -> Handle:
        return draw(st.sampled_from(pool[::-1]), label="reads")

    def join() -> None:
        first = pick()
        second = draw(st.sampled_from([h for h in pool if h.spec.shape == first.spec.shape]), label="joins")
        add("join", torch.add, first, second)

    steps: Sequence[Callable[[], None]] = (
        lambda: add("linear", lazy(nn.Linear, 4, 4, dtype=real), pick()),
        lambda: add("mixer", lazy(Mixer, 4, real), pick()),
        lambda: add("short", lazy(Shorten, 4, real), pick()),
        lambda: add("drop", lazy(nn.Dropout, 0.5), pick()),
        lambda: add("twice", torch.repeat_interleave, pick(), repeats=2, dim=1),
        join,
    )
    for _ in range(draw(st.integers(2, max_layers), label="layers")):
        draw(st.sampled_from(steps))()
    whole = [h for h in pool if h.spec.shape == x.spec.shape]
    head = graph.add("head", lazy(nn.Linear, 4, 3, dtype=real), whole[-1])
    counts = graph.add("counts", torch.Tensor.to, mask, dtype=real)
    graph.loss("masked", masked_mean_square, head, counts, count=mask)
    if draw(st.booleans(), label="second loss"):
        last = graph.add("last", lazy(nn.Linear, 4, 3, dtype=real), graph.add("take", last_step, pool[-1]))
        label = graph.input("label", ("B",), "int64")
        graph.loss("classes", nn.functional.cross_entropy, last, label, weight=0.5)
    return graph.check()
