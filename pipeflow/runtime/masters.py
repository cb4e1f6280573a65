"""Float32 masters of parameters that layers compute with in a half type.

    working parameter (half) ── layers ── loss
             │ gradient (half)              ▲
             ▼ add                          │ copy
    master's gradient (float32) ──► optimizer ──► master (float32)

Everything between the last backward and the next forward (sums over replicas, clipping, the
optimizer, checkpoints) sees masters alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn


class Masters:
    """Pairs of what is stored and what layers compute with, by name.

    Args:
        stored: parameters as they were built, kept in float32 or wider.
        working: their casts, which modules hold now.
        accumulate: "float32" to add each micro-batch's gradients to the masters', "parameters" to
            let them add up in their own type first.

    Attributes:
        parameters: the masters.
        buffers: copies of the buffers in the type in which they are saved.
    """

    def __init__(
        self,
        stored: Mapping[str, nn.Parameter],
        working: Mapping[str, nn.Parameter],
        buffers: Mapping[str, Tensor],
        buffer_dtypes: Mapping[str, torch.dtype],
        *,
        accumulate: str,
    ) -> None:
        self._working = dict(working)
        self._working_buffers = dict(buffers)
        self.parameters = {name: _master(p, working[name]) for name, p in stored.items()}
        self.buffers = {name: b.detach().to(buffer_dtypes[name], copy=True) for name, b in buffers.items()}
        if accumulate == "float32":
            for name, parameter in self._working.items():
                if parameter.requires_grad and parameter is not self.parameters[name]:
                    add = _adder(self.parameters[name])
                    parameter.register_post_accumulate_grad_hook(add)  # type: ignore[no-untyped-call]  # torch's

    def collect(self) -> None:
        """Gives the masters what gradients the working parameters still hold."""
        for name, parameter in self._working.items():
            if parameter.grad is not None and parameter is not self.parameters[name]:
                _adder(self.parameters[name])(parameter)

    def freeze_alike(self) -> None:
        """Lets the layers compute gradients for those parameters whose masters are trained."""
        for name, parameter in self._working.items():
            parameter.requires_grad_(self.parameters[name].requires_grad)

    def drop_gradients(self) -> None:
        for parameter in self._working.values():
            parameter.grad = None

    @torch.no_grad()
    def save_buffers(self) -> None:
        """Brings `buffers` up to what the layers have made of theirs."""
        for name, buffer in self.buffers.items():
            buffer.copy_(self._working_buffers[name])

    @torch.no_grad()
    def refresh(self, *, buffers: bool = False) -> None:
        """Copies masters to the layers, after a step; after loading, buffers too."""
        for name, parameter in self._working.items():
            parameter.copy_(self.parameters[name])
        if buffers:
            for name, buffer in self.buffers.items():
                self._working_buffers[name].copy_(buffer)


def _master(stored: nn.Parameter, working: nn.Parameter) -> nn.Parameter:
    """The stored parameter in float32, or wider where it is; itself where layers use it as it is."""
    if stored is working:
        return stored
    dtype = torch.promote_types(stored.dtype, torch.float32)
    return nn.Parameter(stored.detach().to(dtype), stored.requires_grad)


def _adder(master: nn.Parameter) -> Callable[[Tensor], None]:
    """Moves a working parameter's gradient to its master's, in the master's type."""

    def add(parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        if master.grad is None:
            master.grad = gradient.to(master.dtype)
        else:
            master.grad.add_(gradient)

    return add
