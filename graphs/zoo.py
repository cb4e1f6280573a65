"""Small models that examples, benchmarks and tests share. None of them knows any data."""

from __future__ import annotations

import torch
from torch import nn

from pipeflow.errors import GraphError
from pipeflow.graphs.layer import Lazy, lazy
from pipeflow.graphs.layer_graph import LayerGraph
from pipeflow.graphs.tensor_spec import normalise_dtype


def digits_cnn(width: int = 32) -> LayerGraph:
    """A CNN with a skip, for grey digits of 8 by 8 pixels.

    Inputs are "image", float32 ("B", 1, 8, 8), and "label", int64 ("B",) below 10; the loss is
    cross-entropy and the prediction "logits", float32 ("B", 10). Nothing in it depends on how a
    batch is cut: it normalises by groups of channels. It is smooth (GELU, average pooling), so that
    training does not blow up the last bits in which two orders of a sum differ.

        image -> stem -> widen -> conv1 -> conv2 -> add -> pool -> deepen -> flatten -> logits -> loss
                           |                         |
                           +---------- skip ---------+

    Args:
        width: channels of the middle, a multiple of 8.
    """
    if width < 8 or width % 8:
        raise GraphError(f"digits_cnn of width {width}: give a positive multiple of 8, since channels form groups")
    graph = LayerGraph("digits_cnn")
    image = graph.input("image", ("B", 1, 8, 8))
    label = graph.input("label", ("B",), dtype="int64")
    hidden = graph.add("stem", _conv(1, width // 2), image)
    skip = graph.add("widen", _conv(width // 2, width), hidden)
    hidden = graph.add("conv1", _conv(width, width), skip)
    hidden = graph.add("conv2", _conv(width, width), hidden)
    hidden = graph.add("add", torch.add, hidden, skip)
    hidden = graph.add("pool", lazy(nn.AvgPool2d, 2), hidden)
    hidden = graph.add("deepen", _conv(width, 2 * width), hidden)
    hidden = graph.add("flatten", torch.flatten, hidden, start_dim=1)
    logits = graph.add("logits", lazy(nn.Linear, 2 * width * 16, 10), hidden)
    graph.loss("loss", nn.functional.cross_entropy, logits, label)
    return graph


def _conv(num_inputs: int, num_outputs: int) -> Lazy:
    return lazy(
        nn.Sequential,
        lazy(nn.Conv2d, num_inputs, num_outputs, 3, padding=1, bias=False),
        lazy(nn.GroupNorm, num_outputs // 4, num_outputs),
        lazy(nn.GELU),
    )


class MlpBlock(nn.Module):
    """A residual block: x + Linear(GELU(Linear(LayerNorm(x)))).

    Args:
        width: of input and output.
        ratio: how many times wider the middle is.
        dtype: of the parameters.
    """

    def __init__(self, width: int, ratio: int = 4, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, dtype=dtype)
        self.widen = nn.Linear(width, ratio * width, dtype=dtype)
        self.act = nn.GELU()
        self.narrow = nn.Linear(ratio * width, width, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.narrow(self.act(self.widen(self.norm(x))))
        return x + y


def mlp_chain(depth: int = 8, width: int = 64, *, ratio: int = 4, dtype: object = "float32") -> LayerGraph:
    """A chain of residual MLP blocks `block0`, `block1`, ... and a mean square loss.

    Inputs are "x" and "target", both ("B", width).

    Args:
        depth: number of blocks.
        width: of every tensor between blocks.
        ratio: how many times wider a block is inside.
        dtype: of inputs and parameters.
    """
    graph, hidden = LayerGraph("mlp_chain"), "x"
    _mlp_inputs(graph, depth, width, dtype)
    for i in range(depth):
        hidden = graph.add(f"block{i}", _mlp_block(width, ratio, dtype), hidden).name
    graph.loss("loss", nn.functional.mse_loss, hidden, "target")
    return graph


def two_long_skips(depth: int = 8, width: int = 64, *, ratio: int = 4, dtype: object = "float32") -> LayerGraph:
    """`mlp_chain` with two long skips: what blocks 0 and 1 give is added again near the end.

    The outputs of `block0` and `block1` join before the last block and after it: `join1` and `join0`.

    Args:
        depth: number of blocks, at least 4.
        width, ratio, dtype: as for `mlp_chain`.
    """
    if depth < 4:
        raise GraphError(f"two_long_skips of {depth} blocks; it needs at least 4 for its skips to pass something")
    graph, hidden = LayerGraph("two_long_skips"), "x"
    _mlp_inputs(graph, depth, width, dtype)
    for i in range(depth):
        hidden = graph.add(f"block{i}", _mlp_block(width, ratio, dtype), hidden).name
        if i == depth - 2:
            hidden = graph.add("join1", torch.add, hidden, "block1").name
    hidden = graph.add("join0", torch.add, hidden, "block0").name
    graph.loss("loss", nn.functional.mse_loss, hidden, "target")
    return graph


def _mlp_inputs(graph: LayerGraph, depth: int, width: int, dtype: object) -> None:
    if depth < 1:
        raise GraphError(f"{graph.name} of {depth} blocks; it needs at least 1")
    graph.input("x", ("B", width), dtype=dtype)
    graph.input("target", ("B", width), dtype=dtype)


def _mlp_block(width: int, ratio: int, dtype: object) -> Lazy:
    return lazy(MlpBlock, width, ratio, dtype=getattr(torch, normalise_dtype(dtype)))
