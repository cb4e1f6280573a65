"""`pipeflow simulate`: runs a plan by a clock and draws what happens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from pipeflow.cli.console import print_json, show, terminal_width
from pipeflow.cli.options import NewFile, allow_option, json_option
from pipeflow.report.table import Table
from pipeflow.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from pipeflow.execution_plan import Plan
    from pipeflow.timeline import Timeline


@click.command()
@click.argument("plan", type=click.Path(exists=True, dir_okay=False))
@click.option(
    "--mode", type=click.Choice(["train", "infer"]), default="train", show_default=True, help="Which of its programs."
)
@click.option("--phase", help="Of this phase of the training, where the graph has any; by default all of it at once.")
@click.option("--trace", type=NewFile(), help="Also write a Chrome/Perfetto trace.")
@click.option("--width", type=click.IntRange(min=40), help="Columns of the drawing; by default the terminal's, or 100.")
@allow_option
@json_option
def command(
    plan: str, mode: str, phase: str | None, trace: str | None, width: int | None, allow: tuple[str, ...], as_json: bool
) -> None:
    """Tell how long PLAN, a file of `pipeflow plan`, takes, who waits for whom, and what memory peaks at."""
    from pipeflow.execution_plan import Plan
    from pipeflow.lowering import lower
    from pipeflow.program import Mode
    from pipeflow.simulator import simulate

    loaded = Plan.load(plan, allow)
    if phase is not None:
        loaded = loaded.in_phase(phase)
    timeline = simulate(lower(loaded, mode=Mode(mode)), plan=loaded)
    if trace is not None:
        timeline.to_chrome(trace)
    if as_json:
        print_json(_document(loaded, timeline, trace))
        return
    click.echo(timeline.text(width=width or terminal_width()))
    click.echo()
    show(_table(loaded, timeline))
    if trace is not None:
        click.echo(f"wrote {trace}; open it in https://ui.perfetto.dev or chrome://tracing")


def _waits(timeline: Timeline, rank: int) -> dict[int, float]:
    return {peer: seconds for (waiter, peer), seconds in timeline.wait_seconds.items() if waiter == rank}


def _document(plan: Plan, timeline: Timeline, trace: str | None) -> dict[str, Any]:
    return {
        "digest": plan.digest,
        "mode": timeline.mode.value,
        "num_microbatches": timeline.num_microbatches,
        "makespan_seconds": timeline.makespan,
        "bubble": timeline.bubble,
        "samples_per_second": plan.batch_size / timeline.makespan if timeline.makespan else None,
        "ranks": [
            {
                "rank": rank,
                "device": plan.cluster.devices[rank].name,
                "busy_seconds": timeline.busy_seconds_by_rank[rank],
                "wait_seconds_by_peer": {str(peer): seconds for peer, seconds in _waits(timeline, rank).items()},
                "peak_bytes": timeline.peak_bytes_by_rank[rank],
                "memory_bytes": plan.cluster.devices[rank].memory_bytes,
            }
            for rank in timeline.ranks
        ],
        "trace": trace,
    }


def _table(plan: Plan, timeline: Timeline) -> Table:
    rows = []
    for rank in timeline.ranks:
        waits = _waits(timeline, rank)
        longest = max(waits, key=lambda peer: waits[peer], default=None)
        memory = plan.cluster.devices[rank].memory_bytes
        rows.append(
            (
                str(rank),
                plan.cluster.devices[rank].name,
                format_seconds(timeline.busy_seconds_by_rank[rank]),
                format_seconds(sum(waits.values())),
                "" if longest is None else f"rank {longest}",
                format_bytes(timeline.peak_bytes_by_rank[rank]),
                "no limit" if memory is None else format_bytes(memory),
            )
        )
    return Table(
        title="",
        headings=(">rank", "device", ">busy", ">waiting", "most for", ">peak", ">memory"),
        rows=tuple(rows),
    )
