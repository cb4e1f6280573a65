"""A GAN on handwritten digits: one graph, two phases, each with its own optimizer.

The discriminator stands in the graph twice, for real and for made digits, with the same weights; so its
layers come in pairs, and a pair shares a stage. Nothing is detached by hand: in the
discriminator's phase the generator is frozen, so no gradient is sent back to its stage.

    pipeflow train examples/gan.py
    torchrun --nproc-per-node 2 -m pipeflow train examples/gan.py
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

import pipeflow as pf

BATCH_SIZE = 128
NUM_EPOCHS = 2
NOISE, HIDDEN, PIXELS = 16, 64, 64


def judged(logits: Tensor, truth: float) -> Tensor:
    """How wrong the discriminator is if all of these are real (1) or made (0)."""
    return functional.binary_cross_entropy_with_logits(logits, torch.full_like(logits, truth))


def gan() -> pf.LayerGraph:
    """Noise (B, 16) and digits (B, 64) to three losses."""
    graph = pf.LayerGraph("digits_gan")
    noise, digit = graph.input("noise", ("B", NOISE)), graph.input("digit", ("B", PIXELS))
    hidden = graph.add("generator.hidden", pf.lazy(nn.Linear, NOISE, HIDDEN), noise)
    drawn = graph.add(
        "generator.draw", pf.lazy(nn.Linear, HIDDEN, PIXELS), graph.add("generator.act", torch.relu, hidden)
    )
    made = graph.add("generator.made", torch.sigmoid, drawn)
    with torch.random.fork_rng(devices=[]):  # the same weights each time this is called
        torch.manual_seed(0)
        first, last = nn.Linear(PIXELS, HIDDEN), nn.Linear(HIDDEN, 1)
    logits = {}
    for kind, x in (("real", digit), ("made", made)):
        seen = graph.add(f"discriminator.{kind}.act", torch.relu, graph.add(f"discriminator.{kind}", first, x))
        logits[kind] = graph.add(f"discriminator.{kind}.logit", last, seen)
    graph.loss("takes_real_for_made", judged, logits["real"], truth=1.0)
    graph.loss("takes_made_for_real", judged, logits["made"], truth=0.0)
    graph.loss("is_not_fooled", judged, logits["made"], truth=1.0)
    graph.phase("discriminator", losses=["takes_real_for_made", "takes_made_for_real"], trains=["discriminator.*"])
    graph.phase("generator", losses=["is_not_fooled"], trains=["generator.*"])
    return graph


@cache
def digits() -> Tensor:
    """1,797 scans of 8 by 8 pixels, in [0, 1]."""
    return torch.from_numpy(load_digits().data / 16).float()


def train_batches(epoch: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Every digit once, with fresh noise."""
    random = torch.Generator().manual_seed(1000 * seed + epoch)
    for chosen in torch.split(torch.randperm(len(digits()), generator=random), BATCH_SIZE):
        yield {"digit": digits()[chosen], "noise": torch.randn(len(chosen), NOISE, generator=random)}


def test_batches() -> Iterator[dict[str, Tensor]]:
    """Digits with noise that training never saw."""
    yield next(train_batches(10_000, 0))


def adam(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=2e-3, betas=(0.5, 0.999))


def recipe() -> pf.Recipe:
    """What `pipeflow train` runs."""
    return pf.Recipe(
        name="digits GAN",
        graph=gan,
        train_batches=train_batches,
        test_batches=test_batches,
        optimizer={"discriminator": adam, "generator": adam},
        batch_size=BATCH_SIZE,
        num_epochs=NUM_EPOCHS,
        num_devices=2,
        num_stages=2,
        num_microbatches=4,
    )
