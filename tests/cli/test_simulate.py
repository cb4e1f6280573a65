from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from pipeflow.cli import cli


def test_the_timeline_is_drawn(plan_file: Path) -> None:
    done = CliRunner().invoke(cli, ["simulate", str(plan_file), "--width", "60"])
    assert done.exit_code == 0, done.output
    drawn = [line for line in done.stdout.splitlines() if line.startswith("rank ") and "|" in line]
    assert len(drawn) == 3
    assert done.stderr == ""


def test_json_says_what_the_table_says(plan_file: Path) -> None:
    done = CliRunner().invoke(cli, ["simulate", str(plan_file), "--json"])
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    # The last stage computes 4 micro-batches of 2 layers of 3 ms, after the first has come through.
    assert document["makespan_seconds"] >= 4 * 2 * 0.003
    assert document["ranks"][2]["busy_seconds"] == pytest.approx(4 * 2 * 0.003)
    assert [rank["rank"] for rank in document["ranks"]] == [0, 1, 2]
    assert document["ranks"][0]["memory_bytes"] == 10_000


def test_inference_takes_less(plan_file: Path) -> None:
    train, infer = (
        json.loads(CliRunner().invoke(cli, ["simulate", str(plan_file), "--json", "--mode", mode]).stdout)
        for mode in ("train", "infer")
    )
    assert infer["makespan_seconds"] < train["makespan_seconds"]


def test_a_trace_is_written(plan_file: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    done = CliRunner().invoke(cli, ["simulate", str(plan_file), "--trace", str(trace)])
    assert done.exit_code == 0, done.output
    assert json.loads(trace.read_text())["traceEvents"]
    assert str(trace) in done.stdout
