from __future__ import annotations

import json
import math
from dataclasses import replace

from pipeflow.report.run import Comparison, Epoch, Run, StageSeconds, epoch_line, run_tables
from pipeflow.report.table import plain

RUN = Run(
    name="digits",
    digest="0" * 64,
    num_ranks=3,
    ranks_are="processes",
    epochs=(Epoch(0, 2.0, 1.5, 0.5, 0.25), Epoch(1, 1.0, 0.5, 0.96, 0.25)),
    losses=(2.0, 1.0),
    stages=(
        StageSeconds(("a", "b"), (0, 1), 0.001, 0.002, 0.003, 0.006),
        StageSeconds(("c",), (2,), 0.0, 0.0, 0.0, 0.0),
    ),
    predicted_iteration_seconds=0.1,
    measured_iteration_seconds=0.15,
    metric_name="accuracy",
    metric_goal=0.97,
    comparison=Comparison(2, 1e-7, 1, 0.0, 0.2),
    predicted_bytes_by_rank=(1024, 2048, 1000),
    measured_bytes_by_rank=(1024, 1024, 1000),
)


def test_an_epoch_is_one_line() -> None:
    assert epoch_line(RUN.epochs[1], 10, "accuracy") == (
        "epoch  2/10  loss 1.0000  test loss 0.5000  test accuracy 0.9600  250 ms"
    )


def test_tables_show_predicted_beside_measured() -> None:
    stages, whole = (plain(table) for table in run_tables(RUN))
    assert " ".join(stages.splitlines()[2].split()) == "0 a..b 0, 1 1 ms 2 ms 3 ms 6 ms 2.00"
    assert "predicted 100 ms, measured 150 ms, ratio 1.50" in whole
    assert "predicted 2.0 KiB, measured 1.0 KiB at most, ratio 0.50" in whole
    assert "largest difference 1e-07 to one device's over 2 steps, at step 1" in whole
    assert "largest difference 0 (bitwise equal) to one device's at the end" in whole


def test_a_run_without_comparison_or_metric_says_less() -> None:
    bare = replace(RUN, comparison=None, measured_bytes_by_rank=(), epochs=(replace(RUN.epochs[0], metric=None),))
    assert len(run_tables(bare)[1].rows) == 1
    assert not bare.misses_goal


def test_a_missed_goal_is_known() -> None:
    assert RUN.misses_goal
    assert not replace(RUN, metric_goal=0.96).misses_goal
    assert not replace(RUN, metric_goal=None).misses_goal


def test_a_run_is_json_whatever_its_figures() -> None:
    document = replace(RUN, losses=(math.nan, math.inf, 1.0)).document()
    assert json.loads(json.dumps(document, allow_nan=False))["losses"] == [None, None, 1.0]
