"""pipeflow beside torch.distributed.pipelining: `make bench`.

Contenders of a row train the same blocks with the same split, micro-batches, optimizer and
schedule, one thread a worker; they take their steps in turn in one run, and medians are quoted.

    loop      the same detached stages in a loop written by hand, without an engine
    peer      torch.distributed.pipelining
    floor     all layers' seconds over the devices, plus the schedule's own bubble
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import pipeflow as pf
from benchmarks.contenders import MODELS, HandLoop, Peer, make_batch, make_plan, sgd
from pipeflow.testing import run_ranks

RESULTS = Path(__file__).parent / "results"
Step = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Case:
    """One row: what is trained, and how it is cut. `samples` are of one micro-batch."""

    name: str
    model: str
    width: int
    samples: int
    num_blocks: int
    num_stages: int
    num_microbatches: int
    schedule: str
    alone: bool

    @property
    def batch_size(self) -> int:
        return self.samples * self.num_microbatches


CASES = [
    Case("executor alone, small", "chain", 64, 4, 4, 4, 16, "gpipe", True),
    Case("executor alone, large", "chain", 512, 16, 4, 4, 16, "gpipe", True),
    Case("two ranks, small", "chain", 64, 4, 8, 2, 8, "1f1b", False),
    Case("two ranks, large", "chain", 512, 16, 8, 2, 8, "1f1b", False),
    Case("two ranks, two long skips, small", "skips", 64, 4, 8, 2, 8, "1f1b", False),
    Case("two ranks, two long skips, large", "skips", 512, 16, 8, 2, 8, "1f1b", False),
]


def run_case(rank: int, case: Case, num_steps: int) -> dict[str, list[float]]:
    """Seconds of every counted step of every contender, as this rank sees them."""
    torch.set_num_threads(1)
    graph = MODELS[case.model](case.num_blocks, case.width)
    batch = make_batch(case.width, case.batch_size)
    ranks = [0] * case.num_stages if case.alone else [0, 1]
    plan = make_plan(graph, ranks, case.num_microbatches, case.schedule)
    peer = Peer(graph, case.num_stages, case.num_microbatches, batch, rank=rank, alone=case.alone)
    steps: dict[str, Step] = {"peer": peer.step}
    engines = []
    if case.alone:
        steps["loop"] = HandLoop(graph, case.num_stages, case.num_microbatches, batch).step
    else:
        engines.append(pf.Engine(graph, plan, sgd, transport="distributed"))
        steps["processes"] = lambda: engines[0].step(batch).loss
    if rank == 0:
        threads = pf.Engine(graph, plan, sgd, transport="threads", num_threads=1)
        engines.append(threads)
        steps["threads"] = lambda: threads.step(batch).loss
    else:
        steps["threads"] = lambda: 0.0  # rank 1 waits at the next barrier
    first = {name: step() for name, step in steps.items()}
    _check_same({name: loss for name, loss in first.items() if loss})
    seconds = _interleave(steps, num_steps)
    for engine in engines:
        engine.close()
    return seconds


def _interleave(steps: Mapping[str, Step], num_steps: int, warmup: int = 5) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(warmup + num_steps):
        for name, step in steps.items():
            dist.barrier()
            start = time.perf_counter()
            step()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _check_same(losses: Mapping[str, float]) -> None:
    """A contender that trains something else has no place in the table."""
    first = next(iter(losses.values()))
    if any(abs(loss - first) > 1e-4 * abs(first) for loss in losses.values()):
        raise SystemExit(f"the contenders' losses differ: {dict(losses)}")


def floor_seconds(rank: int, case: Case) -> float:
    """What no pipeline of these layers can beat, from their profile.

    All layers of all micro-batches, divided evenly over the devices, times (M + S - 1) / M for a
    synchronous pipeline over S devices.
    """
    torch.set_num_threads(1)
    graph = MODELS[case.model](case.num_blocks, case.width)
    costs = pf.profile(graph, make_batch(case.width, case.samples))
    devices = 1 if case.alone else case.num_stages
    busy = sum(layer.seconds for layer in costs.layers) * case.num_microbatches / devices
    return busy * (case.num_microbatches + devices - 1) / case.num_microbatches


def measure(case: Case, num_steps: int) -> dict[str, Any]:
    """One row of the table. A step is over when it is over on rank 0, which ends last."""
    num_ranks = 1 if case.alone else case.num_stages
    results = run_ranks(run_case, num_ranks, case, num_steps, timeout=900)
    if failed := [r for r in results if r.error is not None]:
        raise SystemExit(f"{case.name} failed:\n{failed[0].trace}")
    seconds = results[0].value
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    [floor] = run_ranks(floor_seconds, 1, case)
    return {"case": asdict(case), "median_seconds": medians, "floor_seconds": floor.value}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown: milliseconds, and how many times faster than the peer."""
    lines = [
        "| case | contender | ms a step | peer's time over it | time over floor |",
        "|---|---|---:|---:|---:|",
    ]
    for row in rows:
        medians, floor = row["median_seconds"], row["floor_seconds"]
        for name, seconds in medians.items():
            label = {"peer": "torch.distributed.pipelining", "loop": "loop by hand"}.get(name, f"pipeflow, {name}")
            ratio = medians["peer"] / seconds
            lines.append(
                f"| {row['case']['name']} | {label} | {seconds * 1e3:.2f} | {ratio:.3f} | {seconds / floor:.3f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs the rows, prints the table and writes it to benchmarks/results/."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="counted steps of each contender")
    parser.add_argument("--only", default="", help="rows whose name contains this; nothing is written then")
    options = parser.parse_args()
    rows = [measure(case, options.steps) for case in CASES if options.only in case.name]
    text = table(rows)
    sys.stdout.write(text)
    if options.only:
        return
    RESULTS.mkdir(exist_ok=True)
    machine = {"cores": os.cpu_count(), "torch": torch.__version__}
    record = {"command": "make bench", "machine": machine, "steps": options.steps, "rows": rows}
    (RESULTS / "runtime.json").write_text(json.dumps(record, indent=1) + "\n")
    heading = f"Printed by `make bench`: medians of {options.steps} steps in turn, {machine['cores']} cores, "
    (RESULTS / "runtime.md").write_text(f"{heading}torch {machine['torch']}, one thread a worker.\n\n{text}")


if __name__ == "__main__":
    main()
