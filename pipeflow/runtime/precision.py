"""In which types a model is trained, as one value.

Decides what goes together. What each choice does lies where it is done: autocast and casts in
`pipeflow.graphs.numerics`, the scale of losses in `pipeflow.runtime.loss_scale`, master weights
in `pipeflow.runtime.masters`, sums over replicas in `pipeflow.runtime.binding`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator

from pipeflow.errors import EngineError
from pipeflow.graphs.numerics import Numerics
from pipeflow.graphs.tensor_spec import TensorSpec
from pipeflow.values import Count, Value

HalfType = Literal["bfloat16", "float16"]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class LossScale(Value):
    """Dynamic loss scaling, by the rule and with the defaults of `torch.amp.GradScaler`.

    Losses are multiplied by a scale before backward, so that small gradients do not vanish in
    float16, and gradients divided by it before anything looks at them. Where a gradient is not
    finite, no rank takes the step and the scale is lowered.

    Attributes:
        initial: the scale to begin with.
        growth_factor: what the scale is multiplied by after `growth_interval` good steps.
        backoff_factor: what it is multiplied by after a step that was left out.
        growth_interval: good steps in a row, until it grows.

    Raises:
        EngineError: factors that do not grow, or do not lower.
    """

    initial: Positive = 2.0**16
    growth_factor: Positive = 2.0
    backoff_factor: Positive = 0.5
    growth_interval: Count = 2000

    @model_validator(mode="after")
    def _check(self) -> LossScale:
        if self.growth_factor <= 1:
            raise EngineError(f"growth_factor={self.growth_factor}; the scale grows by a factor above 1")
        if self.backoff_factor >= 1:
            raise EngineError(f"backoff_factor={self.backoff_factor}; the scale is lowered by a factor below 1")
        return self


class Precision(Value):
    """The types of a training, for `pipeflow.Engine` and `pipeflow.Reference`.

    >>> Precision(autocast="bfloat16")                                       # doctest: +SKIP
    >>> Precision(autocast="float16", loss_scale=LossScale())                # doctest: +SKIP
    >>> Precision(parameters="bfloat16", reduce="bfloat16")                  # doctest: +SKIP

    Attributes:
        autocast: run every forward under `torch.autocast` with this type.
        loss_scale: scale losses, for float16.
        parameters: keep the parameters and buffers that layers compute with in this type, and
            cast what such layers are given; the optimizer works on float32 masters.
        accumulate: where `parameters` is set, whether the gradients of several micro-batches add
            up in "float32" or in the type of the "parameters", which takes half the memory.
        reduce: the type in which gradients travel between replicas and are added; None for the
            type that they have.

    Raises:
        EngineError: choices that contradict each other.
    """

    autocast: HalfType | None = None
    loss_scale: LossScale | None = None
    parameters: HalfType | None = None
    accumulate: Literal["float32", "parameters"] = "float32"
    reduce: HalfType | Literal["float32", "float64"] | None = None

    @model_validator(mode="after")
    def _check(self) -> Precision:
        if self.accumulate == "parameters" and self.parameters is None:
            raise EngineError(
                "accumulate='parameters' without parameters=: gradients add up in the type of the parameters as it "
                "is; leave it out, or give parameters='bfloat16'"
            )
        if self.autocast and self.parameters and self.autocast != self.parameters:
            raise EngineError(
                f"autocast={self.autocast!r} with parameters={self.parameters!r}: operations of both half types meet, "
                "which autocast has no rule for; give both the same type"
            )
        return self

    def numerics(self, device: str) -> Numerics:
        """The types of computation on a kind of device."""
        return Numerics(device, self.autocast, self.parameters)

    def numerics_on(self, devices: Iterable[torch.device]) -> Numerics:
        """The types of computation on all of a plan's devices.

        Raises:
            EngineError: they are of several kinds, and autocast has other rules on each.
        """
        kinds = sorted({device.type for device in devices})
        if self.autocast is not None and len(kinds) > 1:
            raise EngineError(
                f"autocast={self.autocast!r} on devices of the kinds {' and '.join(kinds)}: its rules differ, so the "
                "same layer would give other types in other places; plan for devices of one kind, or use parameters="
            )
        return self.numerics(kinds[0])

    @property
    def reduced(self) -> torch.dtype | None:
        """The type in which gradients travel; None for their own."""
        return None if self.reduce is None else getattr(torch, self.reduce)

    def check_surroundings(self) -> None:
        """Refuses an autocast of the caller's around a call of the engine.

        Raises:
            EngineError: there is one.
        """
        if any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")):
            raise EngineError(
                "autocast is on around this call; ranks in threads or other processes would not see it, and backward "
                "should not: leave its block, and pass precision=pf.Precision(autocast=...)"
            )

    def stored(self, spec: TensorSpec) -> torch.dtype:
        """The type in which a parameter or buffer is saved: as declared, or float32 for masters of half types."""
        dtype: torch.dtype = getattr(torch, spec.dtype)
        if self.parameters is None or not dtype.is_floating_point:
            return dtype
        return torch.promote_types(dtype, torch.float32)
