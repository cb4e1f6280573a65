"""Handwritten digits: a small CNN with a skip, on real scans of 8 by 8 pixels.

The data set is scikit-learn's `digits` (1,797 scans, part of that package); a fifth of it is held
out for the test. Run it as a pipeline on three devices of this process, or of three processes:

    pipeflow train examples/digits.py
    torchrun --nproc-per-node 3 -m pipeflow train examples/digits.py
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from functools import cache

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

import pipeflow as pf
from pipeflow.graphs.zoo import digits_cnn

BATCH_SIZE = 128
NUM_EPOCHS = 10
LEARNING_RATE = 3e-3  # the highest, a third of the way


@cache
def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, then those of the test. Images are float32 in [0, 1]."""
    digits = load_digits()
    parts = train_test_split(digits.images / 16, digits.target, test_size=0.2, stratify=digits.target, random_state=0)
    train_images, test_images, train_labels, test_labels = (torch.from_numpy(part) for part in parts)
    return train_images.float()[:, None], train_labels, test_images.float()[:, None], test_labels


def train_batches(epoch: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Every training sample once, in an order of its own for each (seed, epoch). The last batch is smaller."""
    images, labels, _, _ = data()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1000 * seed + epoch))
    for first in range(0, len(order), BATCH_SIZE):
        chosen = order[first : first + BATCH_SIZE]
        yield {"image": images[chosen], "label": labels[chosen]}


def test_batches() -> Iterator[dict[str, Tensor]]:
    """The samples that training never sees."""
    _, _, images, labels = data()
    for first in range(0, len(labels), BATCH_SIZE):
        yield {"image": images[first : first + BATCH_SIZE], "label": labels[first : first + BATCH_SIZE]}


def accuracy(predictions: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> float:
    """The share of the batch's digits that are named rightly."""
    return (predictions["logits"].argmax(1) == batch["label"]).float().mean().item()


def optimizer(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=LEARNING_RATE)


def lr_scheduler(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """Up and down again, once, over all steps of the run."""
    num_steps = NUM_EPOCHS * math.ceil(len(data()[1]) / BATCH_SIZE)
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LEARNING_RATE, total_steps=num_steps)


def recipe() -> pf.Recipe:
    """The model, its data and its layout: two stages on three devices, the first stage on two of them."""
    return pf.Recipe(
        name="digits",
        graph=digits_cnn,
        train_batches=train_batches,
        test_batches=test_batches,
        optimizer=optimizer,
        lr_scheduler=lr_scheduler,
        batch_size=BATCH_SIZE,
        num_epochs=NUM_EPOCHS,
        metric=accuracy,
        metric_name="accuracy",
        metric_goal=0.97,
        num_devices=3,
        replicas=(2, 1),
        num_microbatches=8,
    )
