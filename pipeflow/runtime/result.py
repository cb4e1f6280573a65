"""What a step gives back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepResult:
    """The losses of one batch, and what became of its gradients; the same on every rank.

    Attributes:
        num_samples: samples in the batch.
        losses: each loss over the whole batch, without its weight.
        gradient_norm: of all gradients together before clipping; None unless the engine clips by
            norm or looks for what is not finite.
        skipped: whether the optimizer's step was left out, since something was not finite.
        loss_scale: what losses were multiplied by before backward; None without loss scaling.
    """

    num_samples: int
    losses: Mapping[str, float]
    weights: Mapping[str, float]
    gradient_norm: float | None = None
    skipped: bool = False
    loss_scale: float | None = None

    @property
    def loss(self) -> float:
        """The sum of the losses times their weights."""
        total = 0.0
        for name, weight in self.weights.items():
            total += weight * self.losses[name]
        return total
