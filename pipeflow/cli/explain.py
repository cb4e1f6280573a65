"""`pipeflow explain`: why a plan costs what it costs, what would change it, and a drawing of it."""

from __future__ import annotations

from pathlib import Path

import click

from pipeflow.cli.console import print_json, working
from pipeflow.cli.options import NewFile, allow_option, json_option
from pipeflow.partitioners import PARTITIONERS


@click.command()
@click.argument("plan", type=click.Path(exists=True, dir_okay=False))
@click.option(
    "--partitioner",
    type=click.Choice(list(PARTITIONERS)),
    default="auto",
    show_default=True,
    help="What solves the problems with more devices, memory, bandwidth.",
)
@click.option("--bounds", is_flag=True, help="Bound those problems instead of solving them: at once, for any size.")
@click.option("--svg", type=NewFile(), help="Also draw the graph, cut, to a file.")
@allow_option
@json_option
def command(plan: str, partitioner: str, bounds: bool, svg: str | None, allow: tuple[str, ...], as_json: bool) -> None:
    """Tell which stage of PLAN is the bottleneck and why, what each cut costs, and what more would buy.

    PLAN is a file of `pipeflow plan`. Seconds are of one micro-batch of the batch.
    """
    from pipeflow.execution_plan import Plan

    loaded = Plan.load(plan, allow)
    with working("") as say:
        say("explaining")
        story = loaded.explain(partitioner=None if bounds else partitioner)
    if svg is not None:
        from pipeflow.report.drawing import draw_plan

        Path(svg).write_text(draw_plan(loaded), encoding="utf-8")
    if as_json:
        print_json({**story.document(), "svg": svg})
        return
    click.echo(str(story))
    if svg is not None:
        click.echo(f"\nwrote {svg}; open it in a browser")
