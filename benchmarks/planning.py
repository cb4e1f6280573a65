"""How long it takes to plan, prove and play large pipelines, and to ask for help: `make bench`."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pipeflow as pf
from pipeflow.graphs.costs import GraphCosts, LayerCosts, TensorCosts

RESULTS = Path(__file__).parent / "results"


def chain(num_layers: int) -> GraphCosts:
    """A chain whose layers differ: seconds and bytes repeat with periods that share no factor."""
    return GraphCosts(
        name=f"chain of {num_layers}",
        inputs=(TensorCosts(name="x", bytes=1000),),
        layers=tuple(
            LayerCosts(
                name=f"l{i}",
                inputs=(f"l{i - 1}" if i else "x",),
                outputs=(TensorCosts(name=f"l{i}", bytes=10**6 + 1000 * (i % 11), gradient_bytes=10**6),),
                forward_seconds=1e-3 * (1 + i % 7),
                backward_input_seconds=1e-3 * (1 + i % 5),
                backward_weight_seconds=1e-3 * (1 + i % 3),
                parameter_bytes=10**6 * (1 + i % 13),
                saved_bytes=10**6,
            )
            for i in range(num_layers)
        ),
    )


def chain_plan(num_stages: int, num_microbatches: int) -> pf.Plan:
    """One layer a stage."""
    costs = chain(num_stages)
    return pf.Plan(
        costs=costs,
        cluster=pf.Cluster.uniform(num_stages, bandwidth=1e10, latency=1e-5),
        stages=tuple(pf.Stage.replicated([layer.name], [i]) for i, layer in enumerate(costs.layers)),
        certificate=pf.Certificate(partitioner="one each", objective=1.0, lower_bound=0.0),
        schedule="1f1b",
        num_microbatches=num_microbatches,
        batch_size=num_microbatches,
    )


def median_seconds(action: Callable[[], object], repeats: int = 3) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def main() -> None:
    """Measures, prints a table and writes it to benchmarks/results/."""
    costs = chain(1000)
    cluster = pf.Cluster.uniform(64, memory_bytes=8 * 2**30, bandwidth=1e10, latency=1e-5)
    large = chain_plan(64, 512)
    rows = {
        "plan a chain of 1,000 layers on 64 devices, replicas and all else open": (
            median_seconds(lambda: pf.plan(None, costs, cluster, batch_size=256)),
            10.0,
        ),
        "verify 64 stages by 512 micro-batches, lowering included": (median_seconds(lambda: pf.verify(large)), None),
        "simulate 64 stages by 512 micro-batches, lowering included": (
            median_seconds(lambda: pf.simulate(large)),
            None,
        ),
        "lower once, then verify and simulate": (
            median_seconds(
                lambda: (program := pf.lower(large), pf.verify(program, plan=large), pf.simulate(program, plan=large))
            ),
            5.0,
        ),
        "pipeflow --help": (
            median_seconds(
                lambda: subprocess.run([sys.executable, "-m", "pipeflow", "--help"], check=True, capture_output=True), 7
            ),
            0.4,
        ),
    }
    lines = ["| what | seconds | at most |", "|---|---:|---:|"]
    for name, (seconds, limit) in rows.items():
        lines.append(f"| {name} | {seconds:.2f} | {limit or ''} |")
    text = "\n".join(lines) + "\n"
    sys.stdout.write(text)
    RESULTS.mkdir(exist_ok=True)
    record = {name: {"seconds": s, "limit": limit} for name, (s, limit) in rows.items()}
    (RESULTS / "planning.json").write_text(json.dumps(record, indent=1) + "\n")
    (RESULTS / "planning.md").write_text(f"Printed by `make bench` (medians).\n\n{text}")


if __name__ == "__main__":
    main()
