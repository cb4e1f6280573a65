"""Models of sequences and of graphs, whose batches differ in length, and batches for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import pipeflow as pf
from tests.runtime.models import Stages

WIDTH = 8
NUM_TOKENS = 11


class Attention(nn.Module):
    """Causal self-attention with one head."""

    def __init__(self, width: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.mix = nn.Linear(width, 3 * width, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.mix(x).chunk(3, dim=-1)
        mixed: Tensor = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + mixed


def masked_cross_entropy(logits: Tensor, label: Tensor, mask: Tensor) -> Tensor:
    """The mean over the tokens that the mask counts; logits (B, T, C), the others (B, T)."""
    each = nn.functional.cross_entropy(logits.flatten(0, 1), label.flatten(), reduction="none")
    return (each * mask.flatten()).sum() / mask.sum().clamp(min=1)


def language_model(dtype: torch.dtype = torch.float32) -> pf.LayerGraph:
    """Tokens of any length; a skip from the embedding to the head, dropout, padding masked out."""
    graph = pf.LayerGraph("language")
    tokens = graph.input("tokens", ("B", "time"), dtype="int64")
    label = graph.input("label", ("B", "time"), dtype="int64")
    mask = graph.input("mask", ("B", "time"), dtype=dtype)
    embed = graph.add("embed", pf.lazy(nn.Embedding, NUM_TOKENS, WIDTH, dtype=dtype), tokens)
    first = graph.add("first", pf.lazy(Attention, WIDTH, dtype), embed)
    drop = graph.add("drop", pf.lazy(nn.Dropout, 0.25), first)
    second = graph.add("second", pf.lazy(Attention, WIDTH, dtype), drop)
    joined = graph.add("join", torch.add, second, embed)
    logits = graph.add("head", pf.lazy(nn.Linear, WIDTH, NUM_TOKENS, dtype=dtype), joined)
    graph.loss("loss", masked_cross_entropy, logits, label, mask, count=mask)
    return graph


THREE_STAGES: Stages = [
    (["embed", "first"], (0,)),
    (["drop", "second"], (1,)),
    (["join", "head", "loss"], (2,)),
]
REPLICAS: Stages = [
    (["embed", "first"], (0, 1)),
    (["drop", "second"], (1, 2, 0)),
    (["join", "head", "loss"], (2,)),
]


def tokens_batch(
    num_samples: int, time: int, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Random tokens, a random tail of each sample padded."""
    generator = torch.Generator().manual_seed(1000 * num_samples + 10 * time + seed)
    tokens, label = torch.randint(0, NUM_TOKENS, (2, num_samples, time), generator=generator)
    length = torch.randint(0, time + 1, (num_samples, 1), generator=generator)
    mask = (torch.arange(time) < length).to(dtype)
    mask[:1, :1] = 1  # some token counts
    return {"tokens": tokens, "label": label, "mask": mask}


def spread(x: Tensor, edges: Tensor) -> Tensor:
    """Each node's features with those of the nodes from which an edge leads to it."""
    return x + torch.zeros_like(x).index_add(0, edges[1], x[edges[0]])


def pool(x: Tensor, owner: Tensor, label: Tensor) -> Tensor:
    """The sum over the nodes of each graph; `label` tells how many graphs there are."""
    return x.new_zeros(label.shape[0], x.shape[1]).index_add(0, owner, x)


def molecule_model(dtype: torch.dtype = torch.float32) -> pf.LayerGraph:
    """Graphs of any numbers of nodes and edges, a label for each."""
    graph = pf.LayerGraph("molecules")
    x: Any = graph.input("x", ("nodes", 4), dtype=dtype)
    edges = graph.input("edges", (2, "edges"), dtype="int64")
    owner = graph.input("owner", ("nodes",), dtype="int64")
    label = graph.input("label", ("B",), dtype="int64")
    for i, (before, after) in enumerate([(4, 8), (8, 8)]):
        x = graph.add(
            f"spread{i}", spread, graph.add(f"linear{i}", pf.lazy(nn.Linear, before, after, dtype=dtype), x), edges
        )
        x = graph.add(f"act{i}", torch.tanh, x)
    graph.add("each", pf.lazy(nn.Linear, 8, 2, dtype=dtype), x)
    logits = graph.add("head", pf.lazy(nn.Linear, 8, 3, dtype=dtype), graph.add("pool", pool, x, owner, label))
    graph.loss("loss", nn.functional.cross_entropy, logits, label)
    return graph


MOLECULE_STAGES: Stages = [
    (["linear0", "spread0", "act0"], (0,)),
    (["linear1", "spread1", "act1", "each"], (1,)),
    (["pool", "head", "loss"], (2,)),
]
MOLECULE_REPLICAS: Stages = [
    (["linear0", "spread0", "act0"], (0, 2)),
    (["linear1", "spread1", "act1", "each"], (1,)),
    (["pool", "head", "loss"], (0, 1, 2)),
]


def molecules(num_graphs: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Graphs of 1 to 4 nodes each, laid side by side."""
    generator = torch.Generator().manual_seed(seed)
    num_nodes = torch.randint(1, 5, (num_graphs,), generator=generator)
    total = int(num_nodes.sum())
    edges = torch.randint(0, max(total, 1), (2, 2 * total), generator=generator)
    return {
        "x": torch.randn(total, 4, generator=generator, dtype=dtype),
        "edges": edges,
        "owner": torch.repeat_interleave(torch.arange(num_graphs), num_nodes),
        "label": torch.randint(0, 3, (num_graphs,), generator=generator),
    }
