"""A plan as a plain-text table: what each stage holds and costs, and which one is the bottleneck.

The seconds are the partitioner's (`pipeflow.partitioners.objective`), per micro-batch of the batch;
what an iteration takes is the simulator's to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeflow.graphs.sharing import shared_groups
from pipeflow.partitioners.explain import bottleneck_of
from pipeflow.partitioners.objective import stage_terms
from pipeflow.partitioners.partition import Stage
from pipeflow.plan_problem import problem_of_plan
from pipeflow.units import format_bytes, format_seconds, one_line

if TYPE_CHECKING:
    from pipeflow.execution_plan import Plan

_HEADER = ("stage", "layers", "devices", "compute", "transfer", "reduce", "seconds", "bytes", "")


def plan_table(plan: Plan) -> str:
    """The table, without a trailing newline.

    Columns: compute and transfer seconds of one micro-batch on a device of the stage; reduce, the
    seconds of one gradient reduction; seconds, what the stage's busiest replica spends for each
    micro-batch of the batch; bytes of one replica, with the micro-batches that the schedule keeps
    in flight. The stage on the busiest device that takes the longest is marked, and how many layers a
    stage recomputes is said, what is saved on the host, and what several stages keep copies of.
    """
    certificate = plan.certificate
    terms = stage_terms(problem_of_plan(plan), plan.stages)
    bottleneck = bottleneck_of(plan.stages, terms)
    rows = [_HEADER] + [
        (
            str(index),
            _layers(stage.layers),
            ", ".join(map(str, stage.devices)),
            format_seconds(term.compute_seconds),
            format_seconds(term.transfer_seconds),
            format_seconds(term.reduce_seconds),
            format_seconds(term.seconds),
            format_bytes(term.total_bytes),
            _mark(stage, is_bottleneck=index == bottleneck),
        )
        for index, (stage, term) in enumerate(zip(plan.stages, terms, strict=True))
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    samples = f"{plan.costs.samples} sample{'s' if plan.costs.samples > 1 else ''}"
    lines = [
        f"plan of {plan.costs.name!r}: {plan.schedule}, {plan.num_microbatches} micro-batches of {samples}, "
        f"batch of {plan.batch_size}, digest {plan.digest[:12]}",
        f"{certificate.partitioner}: {format_seconds(certificate.objective)} per micro-batch, lower bound "
        f"{format_seconds(certificate.lower_bound)}, gap {certificate.gap:.1%}",
        "",
    ]
    for row in rows:
        # Text to the left, numbers to the right.
        cells = [
            cell.ljust(w) if i in (1, 2, 8) else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    if plan.offload:
        lines.append(f"saved on the host: {_layers(plan.offload)}")
    for group in shared_groups(plan.costs, [stage.layers for stage in plan.stages]):
        lines.append(f"stages {', '.join(map(str, group.stages))} keep copies of {_layers(group.names)}")
    return "\n".join(lines)


def _mark(stage: Stage, *, is_bottleneck: bool) -> str:
    marks = ["< bottleneck"] if is_bottleneck else []
    if stage.recompute:
        marks.append(f"recomputes {_layers(stage.recompute)}")
    return "  ".join(marks)


def _layers(names: Sequence[str]) -> str:
    if len(names) <= 2:
        return ", ".join(map(_short, names))
    return f"{_short(names[0])}..{_short(names[-1])} ({len(names)})"


def _short(name: str) -> str:
    shown = one_line(name)
    return shown if len(shown) <= 24 else f"...{shown[-21:]}"
