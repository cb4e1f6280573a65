"""Running statistics of norms on replicated stages: recorded on each micro-batch, replayed alike.

A micro-batch runs whole on one replica, so it is normalised as on one device; what one device
would not do is to update the running statistics with every R-th micro-batch alone. So a replica
keeps what its norms saw instead of updating [1], the replicas tell each other everything in one
sum [2], in which each number stands once beside zeros, and each replays all updates in the order
of one device: by micro-batch, then by call [3]. All replicas end with the same bits.

The statistics are those that torch's kernel gives when it is told to forget what it had (a
momentum of 1, from 0), rounded to the buffers' dtype: exact in float64; in float32 the kernel's
own update has more digits of them, so replicas differ from one device in the last bit at most.

As in torch, a forward has updated the statistics whatever becomes of its gradients: those of
`accumulate`, and of a step that is not finite and is skipped or stopped, count like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeflow.errors import EngineError
from pipeflow.graphs.layer import Layer
from pipeflow.graphs.norms import Norm
from pipeflow.runtime.transport import Transport

Statistics = tuple[Tensor, Tensor]
"""Mean and unbiased variance of each channel, over samples and positions."""


class RunningStatistics:
    """The norms of one stage replica, told to record.

    Args:
        layers: of the stage, in the order in which they run.
        modules: of the layers that are modules. Their norms no longer update in training; `replay` does.
    """

    def __init__(self, layers: Iterable[Layer], modules: Mapping[str, nn.Module]) -> None:
        self._every: list[tuple[str, Norm]] = []
        for layer in layers:
            for path in layer.norm_calls:
                norm = modules[layer.name].get_submodule(path)
                assert isinstance(norm, Norm)
                self._every.append((layer.name, norm))
        self.calls = self._every
        for norm in {id(norm): norm for _, norm in self._every}.values():
            self._record(norm)
        self._seen: dict[int, list[tuple[Norm, Statistics]]] = {}
        self._current: list[tuple[Norm, Statistics]] | None = None

    def __bool__(self) -> bool:
        return bool(self._every)

    def _record(self, norm: Norm) -> None:
        forward = norm.forward

        def record(input: Tensor) -> Tensor:
            if not norm.training:
                return forward(input)
            with _forgetful(norm) as statistics:
                output = forward(input)
            if self._current is not None:  # a forward that is computed again has been seen
                self._current.append((norm, statistics))
            return output

        norm.forward = record  # type: ignore[method-assign]  # torch calls what the instance has

    def begin(self, layers: Container[str]) -> None:
        """A batch starts, of which these layers run."""
        self.calls = [(name, norm) for name, norm in self._every if name in layers]
        self._seen.clear()

    @contextmanager
    def microbatch(self, index: int) -> Iterator[None]:
        """What norms see meanwhile is of this micro-batch.

        Raises:
            EngineError: other norms were called than when the graph was described.
        """
        self._current = self._seen[index] = []
        try:
            yield
        finally:
            self._current = None
        if [norm for norm, _ in self._seen[index]] != [norm for _, norm in self.calls]:
            raise EngineError(
                f"the norms of layers {', '.join(dict.fromkeys(name for name, _ in self.calls))} were called "
                f"{len(self._seen[index])} times in a micro-batch, and {len(self.calls)} times or in another order "
                "while the graph was described; replicas need the same calls each time: give the stage one replica"
            )

    def start_exchange(self, transport: Transport, stage: int, sizes: Sequence[int]) -> Callable[[], None]:
        """[2] Starts to tell the other replicas; the result waits, and replays all updates."""
        if not self.calls:
            return lambda: None
        width = sum(2 * _width(norm) for _, norm in self.calls)
        device = _mean(self.calls[0][1]).device
        rows = []
        for m in range(len(sizes)):
            seen = [part.double() for _, pair in self._seen.get(m, ()) for part in pair]
            rows.append(torch.cat(seen) if seen else torch.zeros(width, dtype=torch.float64, device=device))
        present = [m for m, size in enumerate(sizes) if size]
        wait = transport.start_reduce(stage, torch.cat(rows))

        def finish() -> None:
            table = wait().view(len(rows), width)
            for m in present:
                self._replay(table[m])

        return finish

    def _replay(self, row: Tensor) -> None:
        """[3] The updates of one micro-batch."""
        parts = iter(torch.split(row, [_width(norm) for _, norm in self.calls for _ in range(2)]))
        for _, norm in self.calls:
            update(norm, (next(parts), next(parts)))


def update(norm: Norm, statistics: Statistics) -> None:
    """Moves a norm's running statistics as torch does when it sees a batch with these.

    Args:
        statistics: float64, of the norm's channels.
    """
    factor = norm.momentum or 0.0
    if isinstance(norm, _BatchNorm) and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            factor = 1.0 / float(norm.num_batches_tracked)
    with torch.no_grad():
        for running, seen in zip((norm.running_mean, norm.running_var), statistics, strict=True):
            assert running is not None
            running.copy_(factor * seen + (1 - factor) * running.double())


@contextmanager
def _forgetful(norm: Norm) -> Iterator[Statistics]:
    """[1] While it is open, a call leaves the norm as it is and its statistics in what is given."""
    mean, var = torch.zeros_like(_mean(norm)), torch.zeros_like(_mean(norm))
    other: dict[str, Any] = {"running_mean": mean, "running_var": var, "num_batches_tracked": None, "momentum": 1.0}
    own = {name: getattr(norm, name) for name in other}
    try:
        for name, value in other.items():
            setattr(norm, name, value)
        yield mean, var
    finally:
        for name, value in own.items():
            setattr(norm, name, value)


def _mean(norm: Norm) -> Tensor:
    assert norm.running_mean is not None
    return norm.running_mean


def _width(norm: Norm) -> int:
    return _mean(norm).numel()
