"""Options of an engine that are none, or say nothing without another: refused before anything is built."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any, Literal, get_args

import torch

from pipeflow.errors import EngineError
from pipeflow.graphs.layer_graph import LayerGraph

TransportKind = Literal["auto", "threads", "distributed"]


def check_transport(transport: TransportKind) -> TransportKind:
    """The transport itself. Raises EngineError where there is none of this name."""
    if transport not in get_args(TransportKind):
        raise EngineError(
            f"transport={transport!r}; it is 'threads' for all ranks in this process, 'distributed' for one rank of a "
            "job, or 'auto'"
        )
    return transport


def check_num_threads(num_threads: int | None) -> int | None:
    """The number itself. Raises EngineError where no thread could run."""
    if num_threads is not None and (not _is(Integral, num_threads) or num_threads < 1):
        raise EngineError(
            f"num_threads={num_threads!r}; it is how many threads torch may use in each rank, a whole number of at "
            "least 1, or None for a share of the process's"
        )
    return num_threads


def check_seed(seed: int) -> int:
    """The seed itself. Raises EngineError where torch takes no such seed."""
    if not _is(Integral, seed) or not 0 <= seed < 1 << 63:
        raise EngineError(f"seed={seed!r}; it is a whole number from 0 to 2**63 - 1")
    return seed


def check_positive(name: str, value: float | None, what: str) -> None:
    """Refuses what is no number above 0; one may be infinite. Raises EngineError.

    Args:
        what: the value is, for the message.
    """
    if value is not None and not (_is(Real, value) and value > 0):
        raise EngineError(f"{name}={value!r}; it must be positive, {what}; or None to leave it out")


def _is(kind: type, value: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def check_factory(given: Any, what: str) -> None:
    """Refuses what makes nothing: an optimizer or scheduler, made already. Raises EngineError.

    Args:
        what: the name of the option.
    """
    if callable(given):
        return
    example = (
        "optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1)"
        if what == "optimizer"
        else "lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 10)"
    )
    raise EngineError(
        f"{what} is a {type(given).__name__}; every stage replica has one of its own, so give what makes one, for "
        f"example {example}"
    )


def check_trains(optimizer: Any, options: Mapping[str, Any]) -> None:
    """Refuses options of training where there is no optimizer, and so no training.

    Args:
        options: by name, None for those that say nothing.

    Raises:
        EngineError: names the first of them.
    """
    said = [name for name, value in options.items() if value is not None]
    if optimizer is None and said:
        raise EngineError(
            f"{said[0]} is given and no optimizer, so nothing trains and it would say nothing; leave it out, or pass "
            "optimizer="
        )


def check_clip_value(clip_value: float | None, graph: LayerGraph) -> None:
    """Refuses to cut elements of complex gradients, which have no order. Raises EngineError."""
    complex_ones = [name for name, spec in graph.parameters.items() if getattr(torch, spec.dtype).is_complex]
    if clip_value is not None and complex_ones:
        raise EngineError(
            f"clip_value={clip_value} with the complex parameter {complex_ones[0]!r}: complex numbers have no order to "
            "cut by; pass clip_norm instead"
        )
