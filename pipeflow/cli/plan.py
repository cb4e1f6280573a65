"""`pipeflow plan`: cuts a model over devices and orders the work."""

from __future__ import annotations

from typing import Any

import click

from pipeflow.cli.console import infeasible_document, print_json, working
from pipeflow.cli.options import NewFile, json_option, planning_options
from pipeflow.cli.planning import Request, load_source, make_plan
from pipeflow.errors import Infeasible


@click.command()
@click.argument("source")
@planning_options
@click.option("--batch-size", type=click.IntRange(min=1), help="Samples of a whole batch; by default the recipe's.")
@click.option("--allow", multiple=True, help="An import prefix that a graph file may name besides torch's.")
@click.option("--output", "-o", type=NewFile(), help="Write the plan to a file.")
@json_option
@click.pass_context
def command(
    context: click.Context, /, source: str, allow: tuple[str, ...], output: str | None, as_json: bool, **options: Any
) -> None:
    """Plan SOURCE: a recipe (a Python file, or a module's dotted name), a graph file or a costs file.

    What no option and no recipe fixes is searched. Layers of a recipe or a graph file are measured
    on this machine first; costs are taken as they are, and --devices then means equal devices
    between which transfers are free. With --json the plan itself is printed. Exit code 1 means
    that no plan is feasible.
    """
    try:
        with working("") as say:
            plan = make_plan(load_source(source, allow), Request(**options), on_phase=say)
    except Infeasible as error:
        if not as_json:
            raise
        print_json(infeasible_document(error))
        context.exit(1)
    if output is not None:
        plan.save(output)
    if as_json:
        click.echo(plan.model_dump_json(indent=1))
        return
    click.echo(str(plan))
    if output is not None:
        click.echo(f"wrote {output}; see it with: pipeflow simulate {output}")
