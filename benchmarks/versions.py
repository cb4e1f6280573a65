"""This version beside an earlier commit, in one run: `make bench`.

Both train the same blocks with the same split, micro-batches, optimizer and schedule, one thread
a rank. The earlier one is checked out into a temporary folder; each has processes of its own, which
take their steps in turn (first one, then the other first), and medians are quoted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, Self

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
WORKER = ROOT / "benchmarks" / "version_worker.py"
BEFORE_THE_IRREGULAR_CASE = "23088bc"

SMALL = {"model": "chain", "width": 64, "samples": 4, "num_blocks": 8, "num_stages": 2, "num_microbatches": 8}
LARGE = SMALL | {"width": 512, "samples": 16}
ALONE = {"num_blocks": 4, "num_stages": 4, "num_microbatches": 16, "schedule": "gpipe", "alone": True}
TWO = {"schedule": "1f1b", "alone": False}
CASES: dict[str, dict[str, Any]] = {
    "executor alone, small": SMALL | ALONE | {"transport": "threads"},
    "executor alone, large": LARGE | ALONE | {"transport": "threads"},
    "two threads, small": SMALL | TWO | {"transport": "threads"},
    "two threads, large": LARGE | TWO | {"transport": "threads"},
    "two processes, small": SMALL | TWO | {"transport": "processes"},
    "two processes, large": LARGE | TWO | {"transport": "processes"},
    "two processes, two long skips, small": SMALL | TWO | {"model": "skips", "transport": "processes"},
}


class Version:
    """The processes of one version that train one case.

    Args:
        root: of its checkout.
        case: what to train.
        store: a file that is not there yet, for the ranks to meet.
    """

    def __init__(self, root: Path, case: dict[str, Any], store: Path) -> None:
        num_processes = case["num_stages"] if case["transport"] == "processes" else 1
        environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        self._ranks = [
            subprocess.Popen(
                [sys.executable, "-P", str(WORKER), str(root), str(rank), str(store), json.dumps(case)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
                cwd=root,
            )
            for rank in range(num_processes)
        ]
        self.loss = self._answer()

    def step(self) -> float:
        """Seconds of one more step, as rank 0 sees them; all ranks end before this returns."""
        for rank in self._ranks:
            _end(rank.stdin).write("step\n")
            _end(rank.stdin).flush()
        return self._answer()

    def _answer(self) -> float:
        lines = [_end(rank.stdout).readline() for rank in self._ranks]
        if not all(lines):
            raise SystemExit("a worker died; what it wrote is above")
        return float(lines[0])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for rank in self._ranks:
            _end(rank.stdin).close()
        for rank in self._ranks:
            rank.wait(timeout=30)


def _end(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


@contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """A worktree of the commit in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "earlier"
        done = subprocess.run(
            ["git", "worktree", "add", "--detach", str(path), commit], cwd=ROOT, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"commit {commit} cannot be checked out: {done.stderr.strip()}; give one with --commit")
        try:
            yield path
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(path)], cwd=ROOT, check=True)


def measure(name: str, earlier: Path, num_steps: int, warmup: int = 5) -> dict[str, Any]:
    """One row: seconds of the counted steps of both versions, in turn."""
    case, seconds = CASES[name], {"earlier": list[float](), "now": list[float]()}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        roots = {"earlier": earlier, "now": ROOT}
        versions = {k: stack.enter_context(Version(root, case, Path(folder) / k)) for k, root in roots.items()}
        losses = {k: version.loss for k, version in versions.items()}
        if abs(losses["now"] - losses["earlier"]) > 1e-4 * abs(losses["earlier"]):
            raise SystemExit(f"{name}: the versions' losses differ: {losses}")
        for turn in range(warmup + num_steps):
            for version in (("earlier", "now"), ("now", "earlier"))[turn % 2]:
                taken = versions[version].step()
                if turn >= warmup:
                    seconds[version].append(taken)
    return {"name": name, "case": case, "median_seconds": {k: statistics.median(v) for k, v in seconds.items()}}


def table(rows: list[dict[str, Any]], commit: str) -> str:
    """The rows as Markdown: milliseconds, and the throughput of this version over the earlier one's."""
    lines = [f"| case | ms a step at {commit} | ms a step now | throughput over it |", "|---|---:|---:|---:|"]
    for row in rows:
        earlier, now = row["median_seconds"]["earlier"], row["median_seconds"]["now"]
        lines.append(f"| {row['name']} | {earlier * 1e3:.2f} | {now * 1e3:.2f} | {earlier / now:.3f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs the rows, prints the table and writes it to benchmarks/results/."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", default=BEFORE_THE_IRREGULAR_CASE, help="the earlier version")
    parser.add_argument("--steps", type=int, default=60, help="counted steps of each version")
    parser.add_argument("--only", default="", help="rows whose name contains this; nothing is written then")
    options = parser.parse_args()
    with checked_out(options.commit) as earlier:
        rows = [measure(name, earlier, options.steps) for name in CASES if options.only in name]
    text = table(rows, options.commit)
    sys.stdout.write(text)
    if options.only:
        return
    RESULTS.mkdir(exist_ok=True)
    record = {"command": "make bench", "commit": options.commit, "steps": options.steps, "rows": rows}
    (RESULTS / "versions.json").write_text(json.dumps(record, indent=1) + "\n")
    heading = f"Printed by `make bench`: medians of {options.steps} steps in turn, {os.cpu_count()} cores, one thread "
    (RESULTS / "versions.md").write_text(f"{heading}a rank.\n\n{text}")


if __name__ == "__main__":
    main()
