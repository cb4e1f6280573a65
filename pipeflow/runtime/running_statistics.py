"""Running statistics of norms, recorded on each micro-batch: replayed alike by replicas, or once a batch.

A micro-batch runs whole on one replica, so it is normalised as on one device; what one device
would not do is to update the running statistics with every R-th micro-batch alone. So a replica
keeps what its norms saw instead of updating [1], the replicas tell each other everything in one
sum [2], in which each number stands once beside zeros, and each replays all updates in the order
of one device: by micro-batch, then by call [3]. All replicas end with the same bits.

The statistics are those that torch's kernel gives when it is told to forget what it had (a
momentum of 1, from 0), rounded to the buffers' dtype: exact in float64; in float32 the kernel's
own update has more digits of them, so replicas differ from one device in the last bit at most.

Deferred, the statistics of all micro-batches are joined first, and the running ones move once, as
torch's norm moves them that sees the whole batch [4]; that is so on one replica too. Every call of
a norm in a micro-batch is a norm of its own in this. After torchgpipe's DeferredBatchNorm (Kim et
al., 2020), which departs from torch where it takes the biased variance of the batch; this does not.

Synchronised, batch-norms divide by the statistics of a group of micro-batches, those that the
replicas run at the same time (`pipeflow.runtime.synchronised_norm`); all of a group have seen the
same, and the replay takes it in once [5]. Without replicas a group is one micro-batch.

As in torch, a forward has updated the statistics whatever becomes of its gradients: those of
`accumulate`, and of a step that is not finite and is skipped or stopped, count like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeflow.errors import EngineError, PlanError
from pipeflow.graphs.layer import Layer
from pipeflow.graphs.norms import Norm, tracking_norms
from pipeflow.runtime.synchronised_norm import Group, normalise
from pipeflow.runtime.transport import Transport

BatchNormChoice = Literal["microbatch", "deferred", "synchronised"]
"""What batch-norms divide by and when running statistics move: by each micro-batch, as on one device;
the same, but they move once for all of a batch; or by all micro-batches that replicas run at once."""

Statistics = tuple[Tensor, Tensor]
"""Mean and unbiased variance of each channel, over samples and positions."""


def check_choice(choice: BatchNormChoice) -> BatchNormChoice:
    """The choice itself.

    Raises:
        EngineError: it is none.
    """
    if choice not in get_args(BatchNormChoice):
        raise EngineError(
            f"batch_norm={choice!r}; running statistics move after each 'microbatch', or once a batch, 'deferred', or "
            "norms of a stage's replicas are 'synchronised'"
        )
    return choice


class _Seen(NamedTuple):
    """What one call of a norm saw: over how many values of a channel (or instances), and their statistics."""

    norm: Norm
    num_values: int
    statistics: Statistics


class RunningStatistics:
    """The norms of one stage replica, told to record.

    Args:
        layers: of the stage, in the order in which they run.
        modules: of the layers that are modules. Their norms no longer update in training; this does.
        deferred: whether running statistics move once a batch.
        num_replicas: of the stage; with several they exchange what they saw.
        synchronised: whether batch-norms divide by the statistics of all replicas.

    Raises:
        PlanError: a norm is to be deferred or synchronised that is not torch's, or has no running statistics.
    """

    def __init__(
        self,
        layers: Iterable[Layer],
        modules: Mapping[str, nn.Module],
        *,
        deferred: bool = False,
        num_replicas: int = 1,
        synchronised: bool = False,
    ) -> None:
        self.is_alone = num_replicas == 1
        self.is_synchronised = synchronised
        self._num_replicas = num_replicas
        self._deferred = deferred
        if deferred or synchronised:
            _check_known(modules, "synchronised" if synchronised else "deferred")
        self._every: list[tuple[str, Norm]] = []
        for layer in layers:
            for path in layer.norm_calls:
                norm = modules[layer.name].get_submodule(path)
                assert isinstance(norm, Norm)
                self._every.append((layer.name, norm))
        self.calls = self._every
        for norm in {id(norm): norm for _, norm in self._every}.values():
            self._record(norm)
        self._seen: dict[int, list[_Seen]] = {}
        self._current: list[_Seen] | None = None
        self._group: Group | None = None

    def __bool__(self) -> bool:
        return bool(self._every)

    def _record(self, norm: Norm) -> None:
        forward = norm.forward

        def record(input: Tensor) -> Tensor:
            if not norm.training:
                return forward(input)
            if self._group is not None and isinstance(norm, _BatchNorm):
                output, count, statistics = normalise(norm, input, self._group)
            else:
                count = _count(norm, input)
                with _forgetful(norm) as statistics:
                    output = forward(input)
            if self._current is not None:  # a forward that is computed again has been seen
                self._current.append(_Seen(norm, count, statistics))
            return output

        norm.forward = record  # type: ignore[method-assign]  # torch calls what the instance has

    def begin(self, layers: Container[str]) -> None:
        """A batch starts, of which these layers run."""
        self.calls = [(name, norm) for name, norm in self._every if name in layers]
        self._seen.clear()

    @contextmanager
    def synchronised(self, group: Group | None) -> Iterator[None]:
        """Norms that are called meanwhile divide by the statistics of the group, if there is one."""
        self._group = group
        try:
            yield
        finally:
            self._group = None

    @contextmanager
    def microbatch(self, index: int, group: Group | None = None) -> Iterator[None]:
        """What norms see meanwhile is of this micro-batch, and of the group that it is synchronised with.

        Raises:
            EngineError: other norms were called than when the graph was described.
        """
        self._current = self._seen[index] = []
        try:
            with self.synchronised(group):
                yield
        finally:
            self._current = None
        if [seen.norm for seen in self._seen[index]] != [norm for _, norm in self.calls]:
            raise EngineError(
                f"the norms of layers {', '.join(dict.fromkeys(name for name, _ in self.calls))} were called "
                f"{len(self._seen[index])} times in a micro-batch, and {len(self.calls)} times or in another order "
                "while the graph was described; replicas need the same calls each time: give the stage one replica"
            )

    def start_exchange(self, transport: Transport, stage: int, sizes: Sequence[int]) -> Callable[[], None]:
        """[2] Starts to tell the other replicas; the result waits, and takes all in."""
        if not self.calls:
            return lambda: None
        present = [m for m, size in enumerate(sizes) if size]
        wait = transport.start_reduce(stage, self._table(len(sizes)).view(-1))
        return lambda: self._take_in(wait().view(len(sizes), -1), present)

    def finish_alone(self, sizes: Sequence[int]) -> None:
        """Takes in what was seen here, where there is nobody to tell."""
        if self._seen and self.calls:
            self._take_in(self._table(len(sizes)), [m for m, size in enumerate(sizes) if size])

    def _table(self, num_microbatches: int) -> Tensor:
        """A row per micro-batch: mean, variance and count of each call; zeros for those that ran elsewhere."""
        device = _mean(self.calls[0][1]).device
        width = sum(2 * _width(norm) + 1 for _, norm in self.calls)
        table = torch.zeros(num_microbatches, width, dtype=torch.float64, device=device)
        for m, calls in self._seen.items():
            counts = [torch.tensor([seen.num_values], dtype=torch.float64, device=device) for seen in calls]
            parts = [
                part
                for seen, n in zip(calls, counts, strict=True)
                for part in (*(s.to(device, torch.float64) for s in seen.statistics), n)
            ]
            table[m] = torch.cat(parts)
        return table

    def _take_in(self, table: Tensor, present: Sequence[int]) -> None:
        """[3] The updates, of the micro-batches that have samples."""
        columns = torch.split(table, [n for _, norm in self.calls for n in (_width(norm), _width(norm), 1)], dim=1)
        triples = list(zip(columns[::3], columns[1::3], columns[2::3], strict=True))
        if self._deferred:
            for (_, norm), (means, variances, counts) in zip(self.calls, triples, strict=True):
                update(norm, join(norm, means[present], variances[present], counts[present]))
            return
        heads = self._first_of_groups(present)
        for m in present:
            for (_, norm), (means, variances, _) in zip(self.calls, triples, strict=True):
                if m in heads or not isinstance(norm, _BatchNorm):
                    update(norm, (means[m], variances[m]))

    def _first_of_groups(self, present: Sequence[int]) -> frozenset[int]:
        """[5] The micro-batches whose statistics batch-norms take in: of those that saw the same, the first."""
        if not self.is_synchronised:
            return frozenset(present)
        return frozenset({m // self._num_replicas: m for m in reversed(present)}.values())


def join(norm: Norm, means: Tensor, variances: Tensor, counts: Tensor) -> Statistics:
    """[4] The statistics of several micro-batches together.

    Those of a batch-norm are over all values; those of an instance-norm are means over instances.

    Args:
        means, variances: float64 of (micro-batches, channels); variances are unbiased.
        counts: (micro-batches, 1): of values in each channel, or of instances.
    """
    total = counts.sum()
    mean = (counts * means).sum(0) / total
    if not isinstance(norm, _BatchNorm):
        return mean, (counts * variances).sum(0) / total
    squares = ((counts - 1) * variances + counts * (means - mean).square()).sum(0)
    return mean, squares / (total - 1)


def _count(norm: Norm, input: Tensor) -> int:
    if isinstance(norm, _BatchNorm):
        return input.numel() // _width(norm)
    return 1 if input.dim() == norm._get_no_batch_dim() else len(input)  # type: ignore[no-untyped-call]  # torch's


def _check_known(modules: Mapping[str, nn.Module], choice: BatchNormChoice) -> None:
    for name, module in modules.items():
        known = set(tracking_norms(module).values())
        for norm in module.modules():
            if not isinstance(norm, Norm) or norm in known:
                continue
            if norm.track_running_stats or (choice == "synchronised" and isinstance(norm, _BatchNorm)):
                lacks = "with a forward of its own" if norm.track_running_stats else "without running statistics"
                raise PlanError(
                    f"layer {name!r} has a {type(norm).__name__} {lacks}, which cannot be {choice}; use torch's norm "
                    "with track_running_stats=True, or batch_norm='microbatch'"
                )


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
