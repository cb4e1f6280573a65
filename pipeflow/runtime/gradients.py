"""What happens to gradients between the last backward and the optimizer's step.

Decides from the norm of every parameter's gradient, which all ranks know by the same exact sum
(each entry is a number once and zero elsewhere), so all ranks and all layouts decide alike, to
the last bit: how far to clip, and whether to step at all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from pipeflow.errors import EngineError, NonFiniteError
from pipeflow.runtime.options import check_positive

NonFinite = Literal["ignore", "raise", "skip"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientPolicy:
    """What to do with the gradients of a step.

    Attributes:
        clip_norm: scale all gradients so that their norm together, each shared parameter and
            each replicated stage counted once, is at most this (as `torch.nn.utils.clip_grad_norm_`).
        clip_value: cut every element to this absolute value (as `clip_grad_value_`).
        nonfinite: where a loss or gradient is infinite or no number: "ignore" steps as torch
            would, "raise" ends the step on every rank with parameters untouched, "skip" leaves
            the step out on every rank and goes on.
        loss_scaled: losses are scaled (`pipeflow.runtime.loss_scale`): a step with a gradient that
            is not finite is left out, whatever `nonfinite` says, and "raise" is refused.

    Raises:
        EngineError: a limit that is not positive, or choices that contradict each other.
    """

    clip_norm: float | None = None
    clip_value: float | None = None
    nonfinite: NonFinite = "ignore"
    loss_scaled: bool = False

    def __post_init__(self) -> None:
        check_positive("clip_norm", self.clip_norm, "the most that the norm of all gradients may be")
        check_positive("clip_value", self.clip_value, "the most that an element of the gradients may be")
        if self.nonfinite not in ("ignore", "raise", "skip"):
            raise EngineError(f"nonfinite={self.nonfinite!r}; it is 'ignore', 'raise' or 'skip'")
        if self.loss_scaled and self.nonfinite == "raise":
            raise EngineError(
                "nonfinite='raise' with a loss scale: gradients that are not finite are how it finds out that it is "
                "too large; pass 'ignore', or 'skip' to leave out steps whose losses are not finite too"
            )

    @property
    def needs_norms(self) -> bool:
        """Whether ranks have to agree before they step."""
        return self.clip_norm is not None or self.nonfinite != "ignore" or self.loss_scaled


@dataclass(frozen=True, slots=True)
class Verdict:
    """What all ranks do with the gradients of one step.

    Attributes:
        scale: what to multiply them by; None for nothing.
        skip: whether to leave the step out.
        overflow: whether that is for a gradient of scaled losses, so that the scale is lowered.
        norm: of all gradients together before clipping; None where nobody asked.
    """

    scale: float | None = None
    skip: bool = False
    overflow: bool = False
    norm: float | None = None


def gradient_norms(parameters: Mapping[str, nn.Parameter], names: Sequence[str]) -> list[float]:
    """The norm of the gradient of each of `names`; 0 for those that are not among `parameters`."""
    present = [n for n in names if n in parameters and parameters[n].grad is not None]
    if not present:
        return [0.0] * len(names)
    norms = torch.stack([_norm(parameters[n]) for n in present]).tolist()
    # Squares of large finite numbers may not be finite in their own type.
    again = {
        n: float(_norm(parameters[n], torch.float64)) for n, v in zip(present, norms, strict=True) if v == math.inf
    }
    by_name = dict(zip(present, norms, strict=True)) | again
    return [by_name.get(n, 0.0) for n in names]


def _norm(parameter: nn.Parameter, at_least: torch.dtype = torch.float32) -> Tensor:
    assert parameter.grad is not None
    # A norm in a half type would soon be infinite, or coarse.
    dtype = torch.promote_types(parameter.grad.dtype, at_least)
    norm: Tensor = torch.linalg.vector_norm(parameter.grad, dtype=dtype)
    return norm.double()


def decide(
    policy: GradientPolicy, norms: Sequence[float], names: Sequence[str], losses: Mapping[str, float], step: int
) -> Verdict:
    """What to do, from the norms of all parameters and the losses.

    Raises:
        NonFiniteError: the policy says so; it names the losses and parameters.
    """
    norm = math.nan if any(map(math.isnan, norms)) else math.hypot(*norms)
    if policy.loss_scaled and not math.isfinite(norm):
        return Verdict(skip=True, overflow=True, norm=norm)
    finite = math.isfinite(norm) and all(map(math.isfinite, losses.values()))
    if not finite and policy.nonfinite != "ignore":
        if policy.nonfinite == "skip":
            return Verdict(skip=True, norm=norm)
        bad = [f"loss {n!r}" for n, value in losses.items() if not math.isfinite(value)]
        bad += [f"gradient of {n!r}" for n, value in zip(names, norms, strict=True) if not math.isfinite(value)]
        raise NonFiniteError(
            f"step {step} has {', '.join(bad[:5])}{' and more' if len(bad) > 5 else ''} infinite or no number; "
            "parameters are untouched. Lower the learning rate, clip, or pass nonfinite='skip'"
        )
    if policy.clip_norm is None:
        return Verdict(norm=norm)
    # torch's own rule, its small constant included: an infinite norm scales by 0, one that is no number by itself.
    return Verdict(scale=min(1.0, policy.clip_norm / (norm + 1e-6)) if norm == norm else math.nan, norm=norm)


def apply(policy: GradientPolicy, verdict: Verdict, parameters: Iterable[nn.Parameter]) -> None:
    """Clips the gradients in place."""
    for parameter in parameters:
        if parameter.grad is not None:
            if verdict.scale is not None:
                parameter.grad.mul_(verdict.scale)
            if policy.clip_value is not None:
                parameter.grad.clamp_(-policy.clip_value, policy.clip_value)
