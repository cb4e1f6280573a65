"""How good the cuts are: real cost graphs with known optima, next to the rules in use.

    make bench-partition          or: python -m benchmarks.partition [--data ../shared/data]

Every objective is recomputed by the data's own judge, or by `benchmarks.judges`. Writes
benchmarks/results/partition.md and .json. The data are published workloads and no part of pipeflow;
without them this says so and ends.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import platform
import random
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.partition_published import pipedream_table, piper_table, run_pipedream, run_piper
from benchmarks.partition_rules import RULES
from pipeflow.errors import Infeasible
from pipeflow.graphs.costs import GraphCosts, LayerCosts, TensorCosts
from pipeflow.graphs.formats.dnn_partitioning import read
from pipeflow.partitioners import PARTITIONERS
from pipeflow.partitioners.auto import search
from pipeflow.partitioners.certify import stages_of
from pipeflow.partitioners.objective import objective
from pipeflow.partitioners.partition import Partition
from pipeflow.partitioners.problem import PartitionProblem
from pipeflow.partitioning import problem_of
from pipeflow.units import format_bytes

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


def require_equal(value: float, judged: float, where: str) -> None:
    """Raises `AssertionError` unless an objective is what the judge says."""
    if abs(judged - value) > 1e-9 * judged:
        raise AssertionError(f"{where}: objective {value}, but the judge says {judged}")


def geometric_mean(ratios: list[float]) -> float:
    return math.exp(math.fsum(map(math.log, ratios)) / len(ratios))


def timed(problem: PartitionProblem) -> tuple[Partition, float]:
    """What `auto` finds, and the seconds that it takes."""
    begin = time.perf_counter()
    found = PARTITIONERS["auto"](problem)
    return found, time.perf_counter() - begin


def without_solver(problem: PartitionProblem) -> Partition:
    """`auto` as it runs where OR-tools is not installed."""
    return search(problem, use_solver=False)


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
            require_equal(value, judged, f"{key} on {count}")
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
        ratio = geometric_mean([1 + max(0.0, d["above_optimum"]) for d in done])
        reached = sum(d["above_optimum"] < 1e-6 for d in done)
        closed = sum(d["gap"] < 1e-6 for d in done)
        seconds = [d["seconds"] for d in done]
        lines.append(
            f"- {name}: {len(done)} cuts, {reached} at the known optimum, {closed} with their gap closed, "
            f"geometric mean {ratio:.5f} of the optimum, worst {1 + max(d['above_optimum'] for d in done):.5f}; "
            f"{sum(seconds):.0f} s in all, at most {max(seconds):.1f} s"
        )
    return "\n".join(lines)


def run_rules(data: Path) -> list[dict[str, Any]]:
    """The rules in use on the same workloads, priced by the same objective; memory limits waived."""
    root, rows = data / "dnn-partitioning", []
    for key, count, scale, optimum in cases(json.loads((root / "optima.json").read_text())):
        if optimum is None:
            continue
        problem = problem_of(read(root / f"{key}.json", edge_scale=scale), num_devices=count)
        atoms, row = problem.atoms, {"workload": key, "devices": count, "edges": scale}
        weights = {
            "count": [1.0] * atoms.count,
            "parameters": [float(n) for n in atoms.parameter_bytes],
            "time": [sum(c.seconds for c in group) for group in atoms.layers],
        }
        for name, (rule, by) in RULES.items():
            ends = rule(weights[by], count)
            runs = [range(a, b) for a, b in zip([0, *ends[:-1]], ends, strict=True) if b > a]
            stages = stages_of(problem, [(run, (device,)) for device, run in enumerate(runs)])
            row[name] = objective(problem, stages) * 1e3 / optimum
        rows.append(row)
    return rows


def rules_table(rows: list[dict[str, Any]]) -> str:
    lines = ["| rule | geometric mean over the optimum | worst |", "|---|--:|--:|"]
    for name in RULES:
        ratios = [row[name] for row in rows]
        mean = geometric_mean(ratios)
        lines.append(f"| {name} | {mean:.3f} | {max(ratios):.2f} |")
    return "\n".join([*lines, "| pipeflow, auto | 1.000 | 1.00 |"])


def run_chunks(data: Path) -> list[dict[str, Any]]:
    """Two chunks on each device against contiguous stages."""
    judge, root, rows = load_judge(data), data / "dnn-partitioning", []
    for key, entry in json.loads((root / "optima.json").read_text()).items():
        for count, (low, high) in entry["noncontiguous"].items():
            path = root / f"{key}.json"
            problem = problem_of(read(path), num_devices=int(count))
            found, seconds = timed(replace(problem, chunks=2))
            sets: dict[int, list[int]] = {}
            for stage in found.stages:
                sets.setdefault(stage.devices[0], []).extend(int(name) for name in stage.layers)
            judged = judge(json.loads(path.read_text()), list(sets.values()), contiguous=False)
            require_equal(found.certificate.objective * 1e3, judged, f"{key} on {count}, two chunks")
            rows.append(
                {
                    "workload": key,
                    "devices": int(count),
                    "contiguous": entry["contiguous"][count]["optimum"],
                    "any sets": [low, high],
                    "two chunks": judged,
                    "gap": found.certificate.gap,
                    "seconds": seconds,
                }
            )
            print(f"{key:40} {count} two chunks {judged:.4f}, {seconds:.1f} s", file=sys.stderr, flush=True)
    return rows


def chunks_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| workload | devices | contiguous optimum | two chunks | gain | of what any sets may gain | gap | s |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for r in rows:
        gain, most = r["contiguous"] - r["two chunks"], r["contiguous"] - r["any sets"][0]
        lines.append(
            f"| {r['workload']} | {r['devices']} | {r['contiguous']:.4f} | {r['two chunks']:.4f} "
            f"| {gain / r['contiguous']:.1%} | {gain / most if most > 0 else 0:.0%} "
            f"| {r['gap']:.1e} | {r['seconds']:.1f} |"
        )
    return "\n".join(lines)


_SMALLER = 2**10
"""Bytes were made up from times, for graphs of the files' sizes; those of far larger graphs must add up too."""


def random_costs(source: GraphCosts, count: int, *, seed: int = 0) -> GraphCosts:
    """A random DAG with the costs and numbers of inputs of the source's layers, in bytes `_SMALLER` times fewer."""
    draw = random.Random(seed)
    pool = [(c.forward_seconds, c.outputs[0].bytes // _SMALLER, len(c.inputs)) for c in source.layers if c.inputs]
    layers: list[LayerCosts] = []
    for index in range(count):
        seconds, amount, degree = draw.choice(pool)
        back = [1 if draw.random() < 0.8 else draw.randint(1, 12) for _ in range(degree)]
        inputs = dict.fromkeys(layers[-min(b, len(layers))].name for b in back if layers)
        name = f"n{index}"
        layers.append(
            LayerCosts(
                name=name,
                inputs=tuple(inputs),
                outputs=(TensorCosts(name=name, bytes=amount),),
                forward_seconds=seconds,
                parameter_bytes=1000,
            )
        )
    return GraphCosts(layers=tuple(layers))


def run_scale(data: Path) -> list[dict[str, Any]]:
    rows = []
    for key in ("OperatorGraphs/bert_l-12_inference", "LayerGraphs/inceptionv3_inference"):
        source = read(data / "dnn-partitioning" / f"{key}.json")
        for count in (1_000, 10_000, 100_000):
            assert source.bandwidth is not None, "transfer times became bytes"
            changes = {"memory_bytes": None, "bandwidth": source.bandwidth / _SMALLER}
            profile = source.model_copy(update={"costs": random_costs(source.costs, count), **changes})
            found, seconds = timed(problem_of(profile, num_devices=64))
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            print(f"{key:40} {count} nodes {seconds:.1f} s", file=sys.stderr, flush=True)
            certificate = found.certificate
            rows.append(
                {
                    "like": key,
                    "nodes": count,
                    "gap": certificate.gap,
                    "seconds": seconds,
                    "peak_bytes": peak,
                    "partitioner": certificate.partitioner,
                }
            )
    return rows


def scale_table(rows: list[dict[str, Any]]) -> str:
    lines = ["| nodes and costs like | nodes | gap | s | peak so far | by |", "|---|--:|--:|--:|--:|---|"]
    for r in rows:
        lines.append(
            f"| {r['like']} | {r['nodes']} | {r['gap']:.1%} | {r['seconds']:.1f} "
            f"| {format_bytes(r['peak_bytes'])} | {r['partitioner']} |"
        )
    return "\n".join(lines)


SECTIONS: dict[str, tuple[str, Callable[[Path], list[dict[str, Any]]], Callable[[list[dict[str, Any]]], str]]] = {
    "dnn-partitioning": (
        "dnn-partitioning, contiguous, accelerators only",
        run_dnn_partitioning,
        lambda rows: summary(rows) + "\n\n" + table(rows),
    ),
    "rules": ("the rules in use, on the same workloads", run_rules, rules_table),
    "pipedream": ("PipeDream's profiles under its own cost", run_pipedream, pipedream_table),
    "piper": ("Piper's bert32a100 under its own cost, 25 GiB/s", run_piper, piper_table),
    "scale": ("random DAGs on 64 devices", run_scale, scale_table),
    "chunks": ("dnn-partitioning, two chunks on each device", run_chunks, chunks_table),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[1] / "../shared/data")
    parser.add_argument("--only", choices=SECTIONS, help="measure one section again and keep the others' figures")
    arguments = parser.parse_args()
    if not arguments.data.is_dir():
        print(f"{arguments.data} is absent: the published workloads are no part of pipeflow; name their folder: --data")
        return
    RESULTS.mkdir(exist_ok=True)
    stored = RESULTS / "partition.json"
    results: dict[str, Any] = json.loads(stored.read_text()) if arguments.only and stored.exists() else {}
    header = [
        "# Partitioning, measured",
        f"`make bench-partition`, Python {platform.python_version()} on {platform.machine()}. "
        "Objectives in ms where no unit is named, each recomputed by the data's own judge or by `benchmarks.judges`.",
    ]
    for name, (_, measure, _) in SECTIONS.items():
        if arguments.only in (None, name):
            results[name] = measure(arguments.data)
            stored.write_text(json.dumps(results, indent=1) + "\n")
    shown = [f"## {title}\n\n{show(results[n])}" for n, (title, _, show) in SECTIONS.items() if n in results]
    (RESULTS / "partition.md").write_text("\n\n".join([*header, *shown]) + "\n")
    print("\n\n".join([*header, *shown]))


if __name__ == "__main__":
    main()
