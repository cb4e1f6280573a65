"""Characters: a small decoder learns the text of Python's own help, and writes on, step by step.

The text is `pydoc_data.topics`, part of Python. Each batch is padded to its longest line, so its
length differs from batch to batch, and the loss is the mean over the characters that are no
padding. To write, the pipeline runs one character at a time: the keys and values of those before
stay on the stages.

    python examples/characters.py
    torchrun --nproc-per-node 2 examples/characters.py
    pipeflow train examples/characters.py
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import chain, count, islice
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn

import pipeflow as pf
from pipeflow.runtime.distributed import connect, is_launched, share_plan

BATCH_SIZE = 32
SHORTEST, LONGEST = 24, 64
NUM_CHARACTERS = 128  # ASCII; 0 is padding
WIDTH, NUM_HEADS = 64, 4
PROMPTS = ("The following ", "If the object ", "The statement ")


class Place(nn.Module):
    """Adds an embedding of each position. Its state is how many characters came before."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4 * LONGEST, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(None, x)[0]

    def decode(self, state: int | None, x: Tensor) -> tuple[Tensor, int]:
        first = state or 0
        places: Tensor = self.table(torch.arange(first, first + x.shape[1], device=x.device))
        return x + places, first + x.shape[1]


class Attention(nn.Module):
    """Causal attention, added to its input. Its state is the keys and values so far."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mix = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(None, x)[0]

    def decode(self, state: tuple[Tensor, Tensor] | None, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        heads = self.mix(self.norm(x)).unflatten(-1, (3, NUM_HEADS, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = heads.unbind(0)
        if state is not None:
            key, value = torch.cat([state[0], key], 2), torch.cat([state[1], value], 2)
        num_new, num_all = query.shape[2], key.shape[2]
        seen = torch.ones(num_new, num_all, dtype=torch.bool, device=x.device).tril(num_all - num_new)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen)
        result: Tensor = x + self.out(mixed.transpose(1, 2).flatten(2))
        return result, (key, value)


def masked_cross_entropy(logits: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """The mean over the characters that the mask counts; logits (B, T, C), the others (B, T)."""
    each = nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
    return (each * mask.flatten()).sum() / mask.sum()


def decoder() -> pf.LayerGraph:
    """Characters (B, time) to scores of the next one (B, time, 128): two blocks with a skip around each half."""
    graph = pf.LayerGraph("characters")
    text, target = (graph.input(name, ("B", "time"), dtype="int64") for name in ("text", "target"))
    mask = graph.input("mask", ("B", "time"))
    x = graph.add("place", pf.lazy(Place), graph.add("embed", pf.lazy(nn.Embedding, NUM_CHARACTERS, WIDTH), text))
    for i in range(2):
        x = graph.add(f"attend{i}", pf.lazy(Attention), x)
        norm, wide = pf.lazy(nn.LayerNorm, WIDTH), pf.lazy(nn.Linear, WIDTH, 2 * WIDTH)
        narrow = pf.lazy(nn.Linear, 2 * WIDTH, WIDTH)
        x = graph.add(
            f"add{i}",
            torch.add,
            x,
            graph.add(f"think{i}", pf.lazy(nn.Sequential, norm, wide, pf.lazy(nn.GELU), narrow), x),
        )
    scores = graph.add("scores", pf.lazy(nn.Linear, WIDTH, NUM_CHARACTERS), x)
    graph.loss("loss", masked_cross_entropy, scores, target, mask, count=mask)
    return graph


@cache
def lines() -> tuple[str, ...]:
    """The lines of the text that are neither too short nor too long."""
    every = (line.strip() for text in topics.values() for line in text.splitlines())
    return tuple(dict.fromkeys(line for line in every if SHORTEST <= len(line) <= LONGEST and line.isascii()))


def padded(chosen: Sequence[str]) -> dict[str, Tensor]:
    """A batch of lines: each character, the one after it, and which of these are no padding."""
    rows = [torch.tensor([ord(c) for c in line]) for line in chosen]
    codes = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return {"text": codes[:, :-1], "target": codes[:, 1:], "mask": (codes[:, 1:] > 0).float()}


def train_batches(epoch: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Nine lines of ten, once, those of a batch about equally long; in an order of its own for each (seed, epoch)."""
    shuffled = random.Random(1000 * seed + epoch)
    order = [line for i, line in enumerate(lines()) if i % 10]
    shuffled.shuffle(order)
    order.sort(key=len)
    batches = [order[first : first + BATCH_SIZE] for first in range(0, len(order), BATCH_SIZE)]
    shuffled.shuffle(batches)
    yield from map(padded, batches)


def test_batches() -> Iterator[dict[str, Tensor]]:
    """The lines that training never sees."""
    held_out = lines()[::10]
    for first in range(0, len(held_out), BATCH_SIZE):
        yield padded(held_out[first : first + BATCH_SIZE])


def optimizer(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=3e-3)


def write_on(engine: pf.Engine, prompts: Sequence[str], num_characters: int) -> list[str]:
    """The prompts, which are equally long, with the likeliest characters after them, one after the other."""
    written = torch.tensor([[ord(c) for c in prompt] for prompt in prompts])
    with engine.decode(batch_size=len(prompts)) as session:
        new = written
        for _ in range(num_characters):
            new = session.step({"text": new})["scores"][:, -1:].argmax(-1)
            written = torch.cat([written, new], 1)
    return ["".join(map(chr, row)) for row in written.tolist()]


def plan_for(graph: pf.LayerGraph) -> pf.Plan:
    """Two stages, one device each; every rank has the plan of the first."""
    batch = padded([max(lines(), key=len)] * BATCH_SIZE)
    if is_launched():
        connect()
        if torch.distributed.get_rank():
            return share_plan(None)
    costs = pf.profile(graph, {name: value[:8] for name, value in batch.items()}, num_repeats=3)
    plan = pf.plan(graph, costs, pf.Cluster.local(2), batch_size=BATCH_SIZE, num_stages=2, num_microbatches=4)
    return share_plan(plan) if is_launched() else plan


def main(num_steps: int = 400) -> list[str]:
    """Trains for some steps and writes on. Returns what it wrote."""
    graph = decoder()
    batches = chain.from_iterable(train_batches(epoch, 0) for epoch in count())
    with pf.Engine(graph, plan_for(graph), optimizer) as engine:
        for step, batch in enumerate(islice(batches, num_steps)):
            loss = engine.step(batch).loss
            if step % 50 == 0:
                print(f"step {step:4}  length {batch['text'].shape[1]:3}  loss {loss:.3f}")
        written = write_on(engine, PROMPTS, 40)
    print(*written, sep="\n")
    return written


def recipe() -> pf.Recipe:
    """The model, its data and its layout, for `pipeflow train`."""
    return pf.Recipe(
        name="characters",
        graph=decoder,
        train_batches=train_batches,
        test_batches=test_batches,
        optimizer=optimizer,
        batch_size=BATCH_SIZE,
        num_devices=2,
        num_stages=2,
        num_microbatches=4,
    )


if __name__ == "__main__":
    main()
