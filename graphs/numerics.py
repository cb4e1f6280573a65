"""In which types layers compute, where these are not the ones that the graph declares.

Decides how a module is brought to another type and under which autocast a layer runs; not
which types a model should have (`pipeflow.runtime.precision`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map


@dataclass(frozen=True, slots=True)
class Numerics:
    """The types of computation on one kind of device.

    Attributes:
        device: where layers run, "cpu" or "cuda": autocast's rules are by kind of device.
        autocast: the type to which autocast takes the operations that gain by it, or None.
        parameters: the type of floating-point parameters and buffers, or None as declared.
    """

    device: str = "cpu"
    autocast: str | None = None
    parameters: str | None = None

    def context(self) -> AbstractContextManager[object]:
        """The autocast to run layers in, or none whatever is around; a thread's own, and not to be entered twice.

        Without autocast's cache of weights: it is one for all threads, and what it keeps depends
        on how layers are dealt to ranks. A weight that a layer reads twice is cast twice, and its
        gradients add up in its own type.
        """
        if self.autocast is None:
            return torch.autocast(self.device, enabled=False)
        return torch.autocast(self.device, dtype=getattr(torch, self.autocast), cache_enabled=False)

    def wrapped(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function under autocast; for one thread at a time."""
        if self.autocast is None:
            return function
        context = self.context()

        def call(*args: Any, **kwargs: Any) -> Any:
            with context:
                return function(*args, **kwargs)

        return call

    def cast(self, module: nn.Module, memo: dict[int, Tensor] | None = None) -> nn.Module:
        """The module itself, its parameters and buffers replaced by casts where a type is set.

        As `module.to(dtype)` does, but the parameters before stay whole. It then casts what it is
        given too, where it has any: layers without take what comes.

        Args:
            module: to be changed.
            memo: one for all modules that may share parameters, so that they go on to.
        """
        if self.parameters is None:
            return module
        dtype = getattr(torch, self.parameters)
        if _has_floats(module):
            module.register_forward_pre_hook(lambda _, args, kwargs: _to((args, kwargs), dtype), with_kwargs=True)
        return _replaced(
            module, lambda tensor: tensor.to(dtype, copy=True) if tensor.is_floating_point() else tensor, memo
        )

    def decoding(self, module: nn.Module, decode: Callable[..., Any]) -> Callable[..., Any]:
        """A module's `decode`, given its inputs as its forward is; the state is its own matter."""
        if self.parameters is None or not _has_floats(module):
            return decode
        dtype = getattr(torch, self.parameters)
        return lambda state, *args, **kwargs: decode(state, *_to(args, dtype), **_to(kwargs, dtype))

    def as_run(self, module: nn.Module) -> nn.Module:
        """The module itself, cast and on the device."""
        return self.cast(_replaced(module, lambda tensor: tensor.to(self.device)))


def _replaced(
    module: nn.Module, convert: Callable[[Tensor], Tensor], memo: dict[int, Tensor] | None = None
) -> nn.Module:
    """The module with other parameters and buffers; what is shared stays shared."""
    replaced = {} if memo is None else memo
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            if id(parameter) not in replaced:
                before = parameter.detach()
                value = convert(before)
                unchanged = value is before
                replaced[id(parameter)] = parameter if unchanged else nn.Parameter(value, parameter.requires_grad)
            setattr(part, name, replaced[id(parameter)])
        for name, buffer in list(part.named_buffers(recurse=False)):
            setattr(part, name, replaced.setdefault(id(buffer), convert(buffer)))
    return module


def _has_floats(module: nn.Module) -> bool:
    return any(t.is_floating_point() for t in (*module.parameters(), *module.buffers()))


def _to(structure: Any, dtype: torch.dtype) -> Any:
    """The structure with its floating-point tensors in another type."""
    return tree_map(lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, structure)
