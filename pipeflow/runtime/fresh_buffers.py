"""Buffers that a layer changes in forward, apart for each micro-batch.

A layer may add to a buffer and multiply by it: backward needs the buffer as that forward left it.
On one device backward follows at once; in a pipeline other micro-batches have changed it by then,
which autograd refuses. So a forward works on copies, which are its own for good, and what it made of
them is written back:

    buffer ──copy──► lent ──forward──► changed ──write──► buffer

torch's norms are spared: they save their running statistics for no backward of training.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeflow.graphs.layer import Layer

Places = Sequence[tuple[nn.Module, str]]
"""Where buffers are: (module, name)."""


def places_of(module: nn.Module, paths: Collection[str]) -> Places:
    """Where some buffers of a module are, under all the names that they have; not those yet to be made."""
    wanted = {id(buffer) for path, buffer in module.named_buffers(remove_duplicate=False) if path in paths}
    return [
        (part, name)
        for part in module.modules()
        for name, buffer in part.named_buffers(recurse=False, remove_duplicate=False)
        if id(buffer) in wanted
    ]


def copied(buffers: Sequence[Tensor]) -> list[Tensor]:
    """A copy of each; one that stands twice has one copy."""
    by_identity = {id(buffer): buffer for buffer in buffers}
    copies = {key: buffer.detach().clone() for key, buffer in by_identity.items()}
    return [copies[id(buffer)] for buffer in buffers]


def with_fresh_buffers(layer: Layer, module: nn.Module) -> Callable[..., Any]:
    """The module; or, where its forward changes buffers of its own kind, a call of it that works on copies."""
    return _FreshBuffers(module, places_of(module, layer.own_buffers)) if layer.own_buffers else module


class _FreshBuffers:
    """A module that is called with copies of some of its buffers."""

    def __init__(self, module: nn.Module, places: Places) -> None:
        self._module = module
        self._places = places

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._module(*args, **kwargs)
        before = [getattr(owner, name) for owner, name in self._places]
        lent = copied(before)
        for (owner, name), copy in zip(self._places, lent, strict=True):
            setattr(owner, name, copy)
        try:
            return self._module(*args, **kwargs)
        finally:
            for (owner, name), buffer, copy in zip(self._places, before, lent, strict=True):
                if getattr(owner, name) is copy:  # else it was replaced, and nothing of before has changed
                    with torch.no_grad():
                        buffer.copy_(copy)
                    setattr(owner, name, buffer)
