"""The scale of losses over a training: what every rank knows and none decides alone.

The rule is torch's: `torch.amp.GradScaler` holds the scale. Where the gradients lie (on which
stages, in how many replicas) it must not know; it is told one thing a step, whether a gradient
was not finite, by a ballot of one parameter. All ranks tell theirs the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from pipeflow.runtime.precision import LossScale


class LossScaler:
    """The scale, and how it follows from what became of the steps.

    Args:
        settings: where it begins and how it moves.
    """

    def __init__(self, settings: LossScale) -> None:
        self._scaler = torch.amp.GradScaler(
            "cpu",
            init_scale=settings.initial,
            growth_factor=settings.growth_factor,
            backoff_factor=settings.backoff_factor,
            growth_interval=settings.growth_interval,
        )
        self._ballot = nn.Parameter(torch.zeros(()))
        self._box = torch.optim.SGD([self._ballot], lr=0.0)
        self._scaler.scale(torch.zeros(()))  # it makes its scale on first use

    @property
    def scale(self) -> float:
        """What losses are multiplied by in the next step."""
        return self._scaler.get_scale()

    def update(self, *, overflow: bool) -> None:
        """A step is over; a gradient in it was not finite, or none was."""
        self._ballot.grad = torch.full((), float("inf") if overflow else 0.0)
        self._scaler.unscale_(self._box)
        self._scaler.update()

    def state_dict(self) -> dict[str, Any]:
        """What `torch.amp.GradScaler` saves."""
        return self._scaler.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where the state was saved, by the factors that it was saved with, as torch does."""
        self._scaler.load_state_dict(dict(state))


def unscale(parameters: Iterable[nn.Parameter], scale: float) -> None:
    """Divides gradients by the scale, in place."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if gradients:
        torch._foreach_mul_(gradients, 1.0 / scale)
