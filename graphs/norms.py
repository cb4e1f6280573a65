"""Which norms with running statistics a layer calls, in which order.

Replicas of a stage can agree on what such a norm saw, since torch's own keep nothing but a mean
and a variance; of any other buffer that a forward changes nothing is known. Only norms whose
forward is torch's own count: a subclass with another may do anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from pipeflow.errors import GraphError

Norm = _BatchNorm | _InstanceNorm


def tracking_norms(module: nn.Module) -> dict[str, Norm]:
    """The norms within a module (itself under "") that change running statistics, by path."""
    return {path: norm for path, norm in module.named_modules() if isinstance(norm, Norm) and _is_known(norm)}


def _is_known(norm: Norm) -> bool:
    own = _BatchNorm if isinstance(norm, _BatchNorm) else _InstanceNorm
    return norm.track_running_stats and norm.running_mean is not None and type(norm).forward is own.forward


def refuse_synchronised(name: str, function: Callable[..., Any]) -> None:
    """Refuses torch's SyncBatchNorm within a layer.

    Raises:
        GraphError: there is one. It would take its statistics from the samples of whatever ranks
            there are, other stages' included, and wait for them in each forward and backward.
    """
    if isinstance(function, nn.Module) and any(isinstance(m, nn.SyncBatchNorm) for m in function.modules()):
        raise GraphError(
            f"layer {name!r} has a SyncBatchNorm, which talks to every rank of the job, those of other stages too; use "
            "BatchNorm and give the engine batch_norm='synchronised', which does the same among the replicas of a stage"
        )


@contextmanager
def norm_calls(function: Callable[..., Any]) -> Iterator[list[str]]:
    """Lists the paths of the norms that are called while it is open, in order."""
    calls: list[str] = []
    norms = tracking_norms(function) if isinstance(function, nn.Module) else {}

    def hook(path: str) -> Any:
        def note(norm: nn.Module, inputs: object) -> None:
            if norm.training:  # a module may keep its norms in evaluation
                calls.append(path)

        return norms[path].register_forward_pre_hook(note)

    handles = [hook(path) for path in norms]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
