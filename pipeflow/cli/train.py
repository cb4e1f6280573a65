"""`pipeflow train`: profiles, plans, proves and trains a recipe, and compares it with one device."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from pipeflow.cli.console import infeasible_document, print_json, progress, show, working
from pipeflow.cli.options import allow_option, json_option, planning_options
from pipeflow.cli.planning import Request, Source, make_plan
from pipeflow.errors import EngineError, Infeasible, PlanError
from pipeflow.report.run import Epoch, Run, epoch_line, run_tables

if TYPE_CHECKING:
    from pipeflow.execution_plan import Plan
    from pipeflow.graphs.layer_graph import LayerGraph


@click.command()
@click.argument("recipe")
@planning_options
@click.option("--plan", "plan_file", type=click.Path(exists=True, dir_okay=False), help="Run this plan; search none.")
@click.option("--epochs", type=click.IntRange(min=1), help="Passes over the training data; by default the recipe's.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of weights, dropout and the order of samples.")
@click.option(
    "--check-reference/--no-check-reference",
    default=True,
    show_default=True,
    help="Take the same steps on one device afterwards and compare.",
)
@allow_option
@json_option
@click.pass_context
def command(
    context: click.Context,
    /,
    recipe: str,
    plan_file: str | None,
    epochs: int | None,
    seed: int,
    check_reference: bool,
    allow: tuple[str, ...],
    as_json: bool,
    **options: Any,
) -> None:
    """Train RECIPE, a Python file or a module's dotted name that defines recipe(), as a pipeline.

    In one process by default, a thread for each rank. Over processes, on one machine or many, start
    the same command with torchrun: torchrun --nproc-per-node 3 -m pipeflow train RECIPE

    Exit code 1 means that the run failed, that no plan is feasible, or that the recipe's metric
    missed its goal.
    """
    from pipeflow.cli.training import Job, compare, train
    from pipeflow.recipe import load_recipe
    from pipeflow.runtime.distributed import is_launched

    loaded = load_recipe(recipe)
    is_distributed = is_launched()
    speaks = _join() == 0 if is_distributed else True
    talks = speaks and not as_json
    graph = loaded.graph()
    source = Source(recipe=loaded, graph=graph)
    request = Request(**options)
    try:
        with working("", enabled=speaks) as say:
            plan = (
                _plan(source, request, allow, is_distributed=is_distributed, say=say)
                if plan_file is None
                else _load(plan_file, graph, request, allow)
            )
    except Infeasible as error:
        if not as_json:
            raise
        print_json(infeasible_document(error))
        context.exit(1)
    if talks:
        _introduce(plan)
    job = Job(
        recipe=loaded,
        graph=graph,
        plan=plan,
        num_epochs=epochs or loaded.num_epochs,
        seed=seed,
        num_threads=_num_threads(plan, is_distributed=is_distributed),
    )
    with progress("training", job.num_epochs, enabled=speaks) as advance:

        def on_epoch(epoch: Epoch) -> None:
            advance("")
            if talks:
                click.echo(epoch_line(epoch, job.num_epochs, loaded.metric_name))

        run, state = train(job, is_distributed=is_distributed, on_epoch=on_epoch)
    if not speaks:
        return
    if check_reference:
        with progress("one device", len(run.losses)) as advance:
            run = replace(run, comparison=compare(job, run, state, on_step=lambda loss: advance("")))
    _conclude(run, as_json=as_json)


def _join() -> int:
    """This process's rank among those that torchrun started."""
    import torch.distributed as dist

    from pipeflow.runtime.distributed import connect

    connect()
    return dist.get_rank()


def _load(plan_file: str, graph: LayerGraph, request: Request, allow: tuple[str, ...]) -> Plan:
    """The plan of a file, if it is for the graph."""
    from pipeflow.execution_plan import Plan
    from pipeflow.runtime.prepared import check_match

    if given := [f"--{name.replace('_', '-')}" for name in request.given()]:
        raise PlanError(f"--plan fixes what {', '.join(given)} would; give one or the other")
    plan = Plan.load(plan_file, allow)
    check_match(graph, plan)
    return plan


def _plan(source: Source, request: Request, allow: tuple[str, ...], *, is_distributed: bool, say: Any) -> Plan:
    """The plan that all ranks run, made here; by rank 0 for all of them."""
    if allow:
        raise PlanError(f"--allow {allow[0]} is given, but no plan is read; leave it out, or give --plan")
    if not is_distributed:
        return make_plan(source, request, on_phase=say)
    import torch.distributed as dist

    from pipeflow.runtime.distributed import share_plan
    from pipeflow.schedules import resolve_schedule

    schedule = request.schedule or (source.recipe.schedule if source.recipe else "auto")
    if schedule != "auto":
        resolve_schedule(schedule, allow=None)  # on every rank: none imports what another's plan names
    if request.devices is None and request.cluster is None:
        request = request.for_ranks(dist.get_world_size(), source.recipe)
    return share_plan(make_plan(source, request, on_phase=say) if dist.get_rank() == 0 else None)


def _num_threads(plan: Plan, *, is_distributed: bool) -> int:
    import torch

    available = torch.get_num_threads()
    return available if is_distributed else max(1, available // plan.num_ranks)


def _introduce(plan: Plan) -> None:
    from pipeflow.verifier import verify

    proof = verify(plan)
    click.echo(str(plan))
    click.echo(f"proved: {proof.num_actions} actions, {proof.num_messages} messages, nobody waits in a circle")
    click.echo()


def _conclude(run: Run, *, as_json: bool) -> None:
    """Shows the run; a goal that was missed is a negative result."""
    if as_json:
        print_json(run.document())
    else:
        for table in run_tables(run):
            click.echo()
            show(table)
    if run.misses_goal:
        raise EngineError(
            f"test {run.metric_name} is {run.epochs[-1].metric:.4f} after {len(run.epochs)} epochs, and the recipe "
            f"promises at least {run.metric_goal:.4g}; train longer, or change the recipe"
        )
