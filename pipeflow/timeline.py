"""What happened when, on every rank: simulated, or measured in the same form.

Knows how to show itself as text and as a trace file; not where it comes from.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pipeflow.program import (
    Action,
    Compute,
    Fetch,
    Kind,
    Mode,
    Offload,
    Placement,
    Receive,
    Reduce,
    ReduceShared,
    Send,
    Step,
)
from pipeflow.units import format_bytes, format_seconds


class Event(NamedTuple):
    """One action on its rank.

    `start` and `end`, in seconds, are: of a compute, its work; of a send, the message on its link
    until it arrives; of a receive, a step or an offload, the wait; of a reduction, the collective; of
    a fetch, the copy.
    """

    rank: int
    action: Action
    start: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass(frozen=True)
class Timeline:
    """When every action of a program happens, and what follows from it.

    Attributes:
        mode, num_microbatches, placement: of the program.
        events: by rank, in the order of each rank's program.
        makespan: seconds until the last rank is done.
        busy_seconds_by_rank: spent in computes.
        peak_bytes_by_rank: by the memory model (`pipeflow.memory`).
        wait_seconds: how long a rank stood waiting, by (rank, the rank it waited for). Of a
            reduction that is the replica that came to it last, of a copy to or from the host the rank itself.
    """

    mode: Mode
    num_microbatches: int
    placement: Placement
    events: tuple[Event, ...]
    makespan: float
    busy_seconds_by_rank: tuple[float, ...]
    peak_bytes_by_rank: tuple[int, ...]
    wait_seconds: Mapping[tuple[int, int], float]

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that hold a stage."""
        return tuple(sorted({rank for ranks in self.placement for rank in ranks}))

    @property
    def bubble(self) -> float:
        """The share of the devices' time, from start to makespan, in which they compute nothing."""
        available = self.makespan * len(self.ranks)
        return 1.0 - math.fsum(self.busy_seconds_by_rank) / available if available else 0.0

    def text(self, width: int = 100) -> str:
        """The computes as lines of characters, one line per rank, time from left to right.

        A forward of micro-batch m is the digit m mod 10, a backward the letter a to j for it, its
        weight half (where backward is split) the capital. Each character shows what runs in the
        middle of its share of the time.

        Args:
            width: of a line, in characters.
        """
        labels = {rank: f"rank {rank} |" for rank in self.ranks}
        indent = max(map(len, labels.values()))
        ends = {
            rank: f"| {self._busy_share(rank):4.0%} {format_bytes(self.peak_bytes_by_rank[rank])}" for rank in labels
        }
        num_cells = max(1, width - indent - max(map(len, ends.values())))
        rows = {rank: ["."] * num_cells for rank in labels}
        for rank, action, start, end in self.events:
            if isinstance(action, Compute) and self.makespan:
                first = math.ceil(start / self.makespan * num_cells - 0.5)
                stop = math.ceil(end / self.makespan * num_cells - 0.5)
                rows[rank][first:stop] = [_mark(action)] * (stop - first)
        legend = "digits: forward" + (", letters: backward (a is 0)" if self.mode is Mode.TRAIN else "")
        return "\n".join(
            [
                f"{format_seconds(self.makespan)}, {self.num_microbatches} micro-batches, bubble {self.bubble:.0%}; "
                f"{legend}; busy share and peak bytes at the right",
                *(f"{labels[rank]:>{indent}}{''.join(rows[rank])}{ends[rank]}" for rank in labels),
            ]
        )

    def _busy_share(self, rank: int) -> float:
        return self.busy_seconds_by_rank[rank] / self.makespan if self.makespan else 0.0

    def to_chrome(self, path: str | os.PathLike[str]) -> None:
        """Writes a trace that chrome://tracing and Perfetto open: ranks, links and reductions."""
        Path(path).write_text(json.dumps({"traceEvents": list(self._trace()), "displayTimeUnit": "ms"}) + "\n")

    def _trace(self) -> Iterator[dict[str, Any]]:
        processes = ("ranks", "links", "reductions", "host copies")
        for pid, name in enumerate(processes):
            yield {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}}
        threads: dict[tuple[int, str], int] = {}
        for rank in self.ranks:
            threads[0, f"rank {rank}"] = rank
        spans = []
        for rank, action, start, end in self.events:
            if end <= start:
                continue
            pid, thread = _lane(rank, action)
            tid = threads.setdefault((pid, thread), len(threads))
            span = {"ph": "X", "name": str(action), "cat": _category(action), "pid": pid, "tid": tid}
            spans.append({**span, "ts": start * 1e6, "dur": (end - start) * 1e6})
        for (pid, name), tid in threads.items():
            yield {"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": name}}
        yield from spans


def _mark(compute: Compute) -> str:
    digit = compute.microbatch % 10
    if compute.kind is Kind.FORWARD:
        return str(digit)
    return ("ABCDEFGHIJ" if compute.kind is Kind.BACKWARD_WEIGHT else "abcdefghij")[digit]


def _lane(rank: int, action: Action) -> tuple[int, str]:
    if isinstance(action, Send):
        return 1, f"rank {rank} to {action.peer}"
    if isinstance(action, Reduce | ReduceShared):
        return 2, f"rank {rank}"
    if isinstance(action, Fetch):
        return 3, f"rank {rank}"
    return 0, f"rank {rank}"


def _category(action: Action) -> str:
    if isinstance(action, Compute):
        return action.kind.name.lower()
    if isinstance(action, Receive | Step | Offload):
        return "wait"
    return "reduce" if isinstance(action, ReduceShared) else type(action).__name__.lower()
