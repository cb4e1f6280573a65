"""Which layer of a stage it was whose backward failed.

Autograd does not tell. What forward made is let go of once it is sent, so forward is run again, on
an engine that is of no use any more; then each layer's backward, cut off from the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeflow.runtime.rank_state import RankState, StageState
from pipeflow.runtime.stage import LayerCall, Slots


def odd_output(stage: StageState, microbatch: int) -> str:
    """What a layer's forward gave that is no tensor, as the end of an error's text; "" where all are."""
    slots = stage.live[microbatch] or []
    for call in stage.compiled.calls if slots else ():
        for value in (slots[slot] for slot in call.writes):
            if value is not None and not isinstance(value, Tensor):
                return (
                    f"; {call.layer.name!r} gave a {type(value).__name__}, but a tensor while the graph was described"
                )
    return ""


def failed_backward(state: RankState, index: int, microbatch: int, error: BaseException) -> str | None:
    """The layer of stage `index` that raised the error during backward; None where it cannot be told."""
    stage = state.stages[index]
    for segment in stage.compiled.segments:
        if (name := segment.failed_layer(error)) is not None:
            return name
    try:
        slots = _filled(state, stage, microbatch)
    except Exception:  # a layer that now fails forward says nothing about backward
        return None
    if slots is None:
        return None
    return next((c.layer.name for c in reversed(stage.compiled.calls) if _fails(stage, c, slots)), None)


def _filled(state: RankState, stage: StageState, microbatch: int) -> Slots | None:
    """The slots of the micro-batch as they were when forward was done."""
    live, compiled = stage.live[microbatch], stage.compiled
    if live is None:
        return None
    slots: Slots = list(live)
    for name, slot in compiled.feeds:
        slots[slot] = state.feed[name][microbatch]
    for layer in stage.replica.random_layers:
        layer.first_sample = state.offsets[microbatch]
    for call in compiled.calls:
        call.run(slots)
    return slots


def _fails(stage: StageState, call: LayerCall, slots: Slots) -> bool:
    copy = [s.detach().requires_grad_(s.requires_grad) if isinstance(s, Tensor) else s for s in slots]
    sources = [s for s in copy if isinstance(s, Tensor) and s.requires_grad]
    try:
        call.run(copy)
        outputs = [copy[slot] for slot in call.writes]
        roots = [t for t in outputs if isinstance(t, Tensor) and t.grad_fn is not None]
        if roots:
            parameters = [p for p in stage.replica.working if p.requires_grad]
            ones = [torch.ones_like(t) for t in roots]
            torch.autograd.grad(roots, [*sources, *parameters], ones, allow_unused=True)
    except Exception:  # whatever it raises, it is this layer that does
        return True
    return False
