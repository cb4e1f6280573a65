"""Which optimizers and schedulers can be had stage by stage.

An optimizer is made for each stage alone, so its step must be a function of each parameter and
its gradient. A scheduler is stepped beside it; one that follows a metric is given the loss, which
all ranks know after the step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from pipeflow.errors import EngineError


def check_optimizer(optimizer: torch.optim.Optimizer, trained: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer itself, if it can be one stage's.

    Raises:
        EngineError: it is none; needs a closure, a graph of its own steps or sparse gradients; or was not
            given all of `trained`.
    """
    if not all(hasattr(optimizer, name) for name in ("param_groups", "state", "defaults", "step")):
        raise EngineError(
            f"the optimizer factory gave a {type(optimizer).__name__}; it must give an optimizer as torch's are, made "
            "for the parameters it is given"
        )
    if isinstance(optimizer, torch.optim.SparseAdam):
        raise EngineError(
            "optimizer SparseAdam takes sparse gradients alone, and stages add up and send dense ones; use Adam, which "
            "takes the same step where every row has a gradient"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise EngineError(
            "optimizer LBFGS needs a closure over the whole model, which no stage has; use one whose step "
            "is a function of each parameter and its gradient, such as SGD or AdamW"
        )
    if any(group.get("differentiable") for group in optimizer.param_groups):
        raise EngineError(
            f"{type(optimizer).__name__}(differentiable=True) records its steps for a backward through them, which "
            "no step of an engine does; leave the option out"
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if missing := [name for name, p in trained.items() if id(p) not in held]:
        raise EngineError(
            f"the optimizer factory left out {missing[0]!r} ({len(missing)} parameters); give all it is "
            "given to the optimizer, and freeze others with requires_grad=False before"
        )
    return optimizer


def check_scheduler(scheduler: Any) -> Any:
    """The scheduler itself. Raises EngineError where a factory gave none."""
    if not (hasattr(scheduler, "step") and hasattr(scheduler, "state_dict")):
        raise EngineError(
            f"the lr_scheduler factory gave a {type(scheduler).__name__}; it must give a scheduler as torch's are, "
            "made for the optimizer it is given"
        )
    return scheduler


def follows_loss(scheduler: Any) -> bool:
    """Whether the scheduler's step takes a metric."""
    return isinstance(scheduler, ReduceLROnPlateau)


def restore_scheduler(scheduler: Any, saved: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Gives a scheduler its state back, as another plan may have saved it.

    Its lists are by parameter group, and another plan has others of them on a stage; and JSON has
    no numbers for keys. Those that it was made with stay.
    """
    own = _made_with(scheduler, len(optimizer.param_groups))
    # A copy: some schedulers take out of the mapping what they read.
    scheduler.load_state_dict(_copied(saved))
    for part, values in own:
        vars(part).update(values)
        if hasattr(part, "base_lrs"):
            part.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
        if hasattr(part, "_last_lr"):
            part._last_lr = [group["lr"] for group in optimizer.param_groups]


def _made_with(scheduler: Any, num_groups: int) -> list[tuple[Any, dict[str, Any]]]:
    """The lists by parameter group and the counters of a scheduler, and of those that it is made of."""
    parts = getattr(scheduler, "_schedulers", [])
    own = {
        key: value
        for key, value in vars(scheduler).items()
        if isinstance(value, Counter) or (isinstance(value, list) and value is not parts and len(value) == num_groups)
    }
    return [(scheduler, own), *(pair for part in parts for pair in _made_with(part, num_groups))]


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _copied(v) for k, v in value.items()}
    return [_copied(v) for v in value] if isinstance(value, list) else value
