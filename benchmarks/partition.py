"""How good the cuts are: real cost graphs with known optima, next to the rules in use.

    make bench-partition          or: python benchmarks/partition.py [--data ../shared/data]

Every objective is recomputed by the data's own judge. Writes benchmarks/results/partition.md and
.json. The data are published workloads and no part of pipeflow; without them this says so and ends.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeflow.errors import Infeasible
from pipeflow.graphs.formats.dnn_partitioning import read
from pipeflow.partitioners import PARTITIONERS
from pipeflow.partitioners import auto as auto_module
from pipeflow.partitioners.partition import Partition
from pipeflow.partitioners.problem import PartitionProblem
from pipeflow.partitioning import problem_of

RESULTS = Path(__file__).parent / "results"
COUNTS = (2, 4, 6, 8)


def load_judge(data: Path) -> Callable[..., float]:
    spec = importlib.util.spec_from_file_location("judge", data / "judge.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    judged: Callable[..., float] = module.bottleneck
    return judged


def cases(optima: dict[str, Any]) -> Iterator[tuple[str, int, float, float | None]]:
    """(workload, devices, edge scale, optimum in ms or None where memory cannot suffice)."""
    for key, entry in optima.items():
        for scale, table in ((1.0, entry["contiguous"]), (1000.0, entry.get("edges_times_1000", {}))):
            for count, value in table.items():
                if int(count) in COUNTS:
                    optimum = value["optimum"]
                    yield key, int(count), scale, None if isinstance(optimum, str) else optimum


def without_solver(problem: PartitionProblem) -> Partition:
    """`auto` as it runs where OR-tools is not installed."""
    find_spec = auto_module.find_spec
    auto_module.find_spec = lambda name: None if name == "ortools" else find_spec(name)  # type: ignore[assignment]
    try:
        return PARTITIONERS["auto"](problem)
    finally:
        auto_module.find_spec = find_spec


def run_dnn_partitioning(data: Path) -> list[dict[str, Any]]:
    judge = load_judge(data)
    root = data / "dnn-partitioning"
    rows = []
    methods = {"auto": PARTITIONERS["auto"], "auto, no solver": without_solver}
    methods |= {name: PARTITIONERS[name] for name in ("uniform", "chain")}
    for key, count, scale, optimum in cases(json.loads((root / "optima.json").read_text())):
        path = root / f"{key}.json"
        workload = json.loads(path.read_text())
        row: dict[str, Any] = {"workload": key, "devices": count, "edges": scale, "optimum": optimum}
        for name, method in methods.items():
            problem = problem_of(read(path, edge_scale=scale), num_devices=count)
            begin = time.perf_counter()
            try:
                found = method(problem)
            except Infeasible as error:
                row[name] = {"infeasible": error.reasons[0], "seconds": time.perf_counter() - begin}
                continue
            seconds = time.perf_counter() - begin
            judged = judge(workload, [[int(n) for n in s.layers] for s in found.stages], scale)
            value = found.certificate.objective * 1e3
            if abs(judged - value) > 1e-9 * judged:
                raise AssertionError(f"{key} on {count}: objective {value}, but the judge says {judged}")
            row[name] = {
                "objective": value,
                "lower_bound": found.certificate.lower_bound * 1e3,
                "gap": found.certificate.gap,
                "above_optimum": value / optimum - 1 if optimum else None,
                "seconds": seconds,
                "partitioner": found.certificate.partitioner,
            }
        rows.append(row)
        shown = row["auto"]
        note = shown.get("infeasible") or f"gap {shown['gap']:.1e}, {shown['seconds']:.1f} s"
        print(f"{key:40} {count} x{scale:<6g} {note}", file=sys.stderr, flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| workload | devices | edges | optimum, ms | auto, ms | gap | s | no solver: above optimum | gap | s |"
        " chain above | uniform above |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        a, b = row["auto"], row["auto, no solver"]
        head = f"| {row['workload']} | {row['devices']} | x{row['edges']:g} |"
        if "infeasible" in a:
            lines.append(f"{head} infeasible | infeasible | | {a['seconds']:.1f} | | | {b['seconds']:.1f} | | |")
            continue
        others = [f"{row[n]['above_optimum']:.1%}" if "objective" in row[n] else "none" for n in ("chain", "uniform")]
        lines.append(
            f"{head} {row['optimum']:.6f} | {a['objective']:.6f} | {a['gap']:.1e} | {a['seconds']:.1f} "
            f"| {b['above_optimum']:.1e} | {b['gap']:.1e} | {b['seconds']:.1f} | {' | '.join(others)} |"
        )
    return "\n".join(lines)


def summary(rows: list[dict[str, Any]]) -> str:
    lines = []
    for name in ("auto", "auto, no solver", "chain", "uniform"):
        done = [r[name] for r in rows if "objective" in r[name]]
        ratio = math.exp(math.fsum(math.log1p(max(0.0, d["above_optimum"])) for d in done) / len(done))
        reached = sum(d["above_optimum"] < 1e-6 for d in done)
        closed = sum(d["gap"] < 1e-6 for d in done)
        seconds = [d["seconds"] for d in done]
        lines.append(
            f"- {name}: {len(done)} cuts, {reached} at the known optimum, {closed} with their gap closed, "
            f"geometric mean {ratio:.5f} of the optimum, worst {1 + max(d['above_optimum'] for d in done):.5f}; "
            f"{sum(seconds):.0f} s in all, at most {max(seconds):.1f} s"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[1] / "../shared/data")
    data = parser.parse_args().data
    if not data.is_dir():
        print(f"{data} is absent: the published workloads are no part of pipeflow; give their folder with --data")
        return
    rows = run_dnn_partitioning(data)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "partition.json").write_text(json.dumps({"dnn-partitioning": rows}, indent=1) + "\n")
    text = "\n\n".join(
        (
            "# Partitioning, measured",
            f"`make bench-partition` on {platform.processor() or platform.machine()}, Python {platform.python_version()}. "
            "Objectives in ms, each recomputed by the judge that comes with the data.",
            "## dnn-partitioning, contiguous, accelerators only",
            summary(rows),
            table(rows),
        )
    )
    (RESULTS / "partition.md").write_text(text + "\n")
    print(summary(rows))


if __name__ == "__main__":
    main()
