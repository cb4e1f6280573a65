"""What a step gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property


class StepResult:
    """The losses of one batch, the same on every rank.

    They may still be on their way when the step returns; reading them waits.

    Attributes:
        num_samples: samples in the batch.
    """

    def __init__(self, num_samples: int, weights: Mapping[str, float], wait: Callable[[], Mapping[str, float]]) -> None:
        self.num_samples = num_samples
        self._weights = weights
        self._wait = wait

    @cached_property
    def losses(self) -> Mapping[str, float]:
        """Each loss over the whole batch, without its weight."""
        return self._wait()

    @cached_property
    def loss(self) -> float:
        """The sum of the losses times their weights."""
        total = 0.0
        for name, weight in self._weights.items():
            total += weight * self.losses[name]
        return total

    def __repr__(self) -> str:
        return f"StepResult(loss={self.loss!r}, num_samples={self.num_samples})"
