"""Drawn layers whose arguments and results are more than a few tensors of one kind.

Structures of tensors with None and constants among them, tensors by keyword, masks and indices
between layers, views, tensors that are given twice, custom autograd functions, inputs that enter
late. Layers here are importable, so that drawn graphs can be saved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from hypothesis import strategies as st
from torch import nn

from pipeflow.graphs.layer import Handle, lazy

if TYPE_CHECKING:
    from pipeflow.testing.graphs import Builder


def blend(parts: dict[str, Any], scale: float = 1.0, *, shift: torch.Tensor | None = None) -> torch.Tensor:
    """`{"first": x, "rest": [y, (z, None)]}`: each place counts another weight, so none can be mistaken."""
    second, (third, _) = parts["rest"]
    result: torch.Tensor = scale * parts["first"] - 0.5 * second + 0.25 * third
    if shift is not None:
        result = result + 0.125 * shift
    return result


class Tangle(nn.Module):
    """A dict: a linear map, states in a list of tuples with None, a mask and an index without gradient."""

    def __init__(self, width: int, other: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.linear = nn.Linear(width, other, dtype=dtype)
        self.scale = nn.Parameter(torch.full((width,), 0.5, dtype=dtype))

    def forward(self, x: torch.Tensor, *, memory: tuple[torch.Tensor, None] | None = None) -> dict[str, Any]:
        kept = x * self.scale
        if memory is not None:
            kept = kept + memory[0]
        return {
            "hidden": self.linear(x),
            "states": [(kept, None), (kept.tanh(),)],
            "mask": x > 0,
            "best": x.argmax(dim=1, keepdim=True),
            "num_states": 2,
        }


class _Damped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        scaled: torch.Tensor = gradient * 2 / (1 + x * x)
        return scaled


def damped(x: torch.Tensor) -> torch.Tensor:
    """Twice `x`, with a gradient of its own that falls off where `x` is large."""
    result: torch.Tensor = _Damped.apply(x)  # type: ignore[no-untyped-call]
    return result


def spread_first(x: torch.Tensor) -> torch.Tensor:
    """The first feature in the place of all: a view in which elements share memory."""
    first = x[:, :1]
    return first.expand(-1, x.shape[1])


def turned(x: torch.Tensor) -> torch.Tensor:
    """The same numbers, laid out feature by feature."""
    return x.t().contiguous().t()


def given_twice(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What it was given, and one new tensor in two places."""
    doubled = 2 * x
    return x, doubled, doubled


def keep(x: torch.Tensor, other: torch.Tensor, *, mask: torch.Tensor) -> torch.Tensor:
    """`x` where the mask holds, `other` elsewhere."""
    return torch.where(mask, x, other)


def shift_by(x: torch.Tensor, *, index: torch.Tensor) -> torch.Tensor:
    """`x` plus, in each row, its feature of that index (modulo the width)."""
    return x + x.gather(1, index % x.shape[1])


def _nested_arguments(b: Builder) -> None:
    x = b.pick()
    y, z = b.pick_like(x), b.pick_like(x)
    shift = b.pick_like(x) if b.draw(st.booleans(), label="shift") else None
    b.add("blend", blend, {"first": x, "rest": [y, (z, None)]}, 0.75, shift=shift)


def _nested_results(b: Builder) -> None:
    x = b.pick()
    memory = (b.pick_like(x), None) if b.draw(st.booleans(), label="memory") else None
    b.add("tangle", lazy(Tangle, b.width_of(x), b.width(), dtype=b.dtype), x, memory=memory)


def _cell(b: Builder) -> None:
    x, h = b.pick(), b.pick()
    state = (h, b.pick_like(h)) if b.draw(st.booleans(), label="state") else None
    b.add("cell", lazy(nn.LSTMCell, b.width_of(x), b.width_of(h), dtype=b.dtype), x, state)


def _function(b: Builder) -> None:
    functions: tuple[Callable[..., Any], ...] = (damped, spread_first, turned, given_twice)
    b.add("own", b.draw(st.sampled_from(functions)), b.pick())


def _late_input(b: Builder) -> None:
    x = b.pick()
    b.add("enter", torch.add, x, b.graph.input(f"late{b.num_layers}", ("B", b.width_of(x)), b.dtype), alpha=0.5)


def _tokens(b: Builder) -> None:
    tokens = b.graph.input(f"tokens{b.num_layers}", ("B",), "int64")
    b.add("embed", lazy(nn.Embedding, 4, b.width(), dtype=b.dtype), tokens)


def _masked(b: Builder) -> None:
    """Where there is no mask or index yet, one is made."""
    x = b.pick()
    fits: list[Handle] = [h for h in b.side if b.width_of(h) in (1, b.width_of(x))]
    if not fits:
        b.add("tangle", lazy(Tangle, b.width_of(x), b.width(), dtype=b.dtype), x)
        return
    handle = b.draw(st.sampled_from(fits[::-1]))
    if handle.spec.dtype == "bool":
        b.add("keep", keep, x, b.pick_like(x), mask=handle)
    else:
        b.add("shift", shift_by, x, index=handle)


STEPS: tuple[Callable[[Builder], None], ...] = (
    _nested_arguments,
    _nested_results,
    _cell,
    _function,
    _late_input,
    _tokens,
    _masked,
)
"""Each adds one layer to the graph being drawn."""
