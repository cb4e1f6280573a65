"""How long stages took, from the spans that executors record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from pipeflow.errors import EngineError
from pipeflow.execution_plan import Plan
from pipeflow.program import Action, Compute, Kind
from pipeflow.runtime.transport import Transport

Spans = Sequence[tuple[Action, float, float]]


@dataclass(frozen=True, slots=True)
class Measurement:
    """Medians over the steps so far.

    Attributes:
        forward_seconds: by stage, of one micro-batch.
        backward_seconds: the same for backward.
        iteration_seconds: of a whole step.
        num_steps: how many steps they come from.
        peak_bytes_by_rank: the most that each rank held during one step of the plan's batch size; empty
            while there was none after the first step.
        predicted_bytes_by_rank: what the simulator says of it.
    """

    forward_seconds: tuple[float, ...]
    backward_seconds: tuple[float, ...]
    iteration_seconds: float
    num_steps: int
    peak_bytes_by_rank: tuple[int, ...] = ()
    predicted_bytes_by_rank: tuple[int, ...] = ()


class Recorder:
    """Collects spans of training steps."""

    def __init__(self, plan: Plan, predicted_bytes_by_rank: Sequence[int]) -> None:
        self._plan = plan
        self._predicted = tuple(predicted_bytes_by_rank)
        self._peaks: dict[int, int] = {}
        self._seconds: dict[tuple[int, bool], list[float]] = {}
        self._iterations: list[float] = []

    def record(self, spans_by_rank: Mapping[int, Spans], seconds: float) -> None:
        """Takes the spans of one step and how long the step took."""
        self._iterations.append(seconds)
        for spans in spans_by_rank.values():
            for action, start, end in spans:
                if isinstance(action, Compute):
                    key = (action.stage, action.kind is Kind.FORWARD)
                    self._seconds.setdefault(key, []).append(end - start)

    @property
    def wants_peaks(self) -> bool:
        """Whether the next step should be watched: one is, after the first, which makes the optimizer's state."""
        return bool(self._iterations) and not self._peaks

    def record_peaks(self, peak_by_rank: Mapping[int, int]) -> None:
        """Takes what each local rank held at most during a step."""
        self._peaks = dict(peak_by_rank)

    def check(self) -> None:
        """Whether there is something to sum up. Raises EngineError."""
        if not self._iterations:
            raise EngineError("no step was measured; make the engine with measure=True and take steps first")

    def summary(self, transport: Transport | None) -> Measurement:
        """Medians; over several processes, the mean of the replicas' medians."""
        num_stages = len(self._plan.stages)
        values, counts = [0.0] * (2 * num_stages), [0.0] * (2 * num_stages)
        for (stage, forward), seconds in self._seconds.items():
            values[2 * stage + forward], counts[2 * stage + forward] = median(seconds), 1.0
        if transport is not None:
            table = torch.tensor([*values, *counts], dtype=torch.float64)
            shared = transport.start_share(table)().tolist()
            values, counts = shared[: 2 * num_stages], shared[2 * num_stages :]
        peaks = [float(self._peaks.get(rank, 0)) for rank in range(self._plan.num_ranks)]
        if transport is not None:
            peaks = transport.start_share(torch.tensor(peaks, dtype=torch.float64))().tolist()
        means = [v / n if n else 0.0 for v, n in zip(values, counts, strict=True)]
        return Measurement(
            forward_seconds=tuple(means[1::2]),
            backward_seconds=tuple(means[0::2]),
            iteration_seconds=median(self._iterations),
            num_steps=len(self._iterations),
            peak_bytes_by_rank=tuple(map(int, peaks)) if any(peaks) else (),
            predicted_bytes_by_rank=self._predicted,
        )
