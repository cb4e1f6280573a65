"""`pipeflow verify`: proves a plan, or shows why it would not run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from pipeflow.cli.console import print_json, show
from pipeflow.cli.options import allow_option, json_option
from pipeflow.errors import VerificationError
from pipeflow.report.table import Table
from pipeflow.units import format_bytes

if TYPE_CHECKING:
    from pipeflow.execution_plan import Plan
    from pipeflow.verifier import Proof


@click.command()
@click.argument("plan", type=click.Path(exists=True, dir_okay=False))
@click.option(
    "--semantics",
    type=click.Choice(["posted", "rendezvous"]),
    default="posted",
    show_default=True,
    help="What a send does: it never waits, as in pipeflow's own transports; or it waits for its receive.",
)
@allow_option
@json_option
@click.pass_context
def command(context: click.Context, /, plan: str, semantics: str, allow: tuple[str, ...], as_json: bool) -> None:
    """Prove that PLAN, a file of `pipeflow plan`, runs to its end within the memory of its devices.

    All of its programs are proved: the one for training, the one for inference, and those of the
    phases of the training. Exit code 1 means that one is refused; the shortest counterexample that
    was found is printed.
    """
    from pipeflow.execution_plan import Plan

    loaded = Plan.load(plan, allow)
    try:
        proofs = _prove(loaded, semantics)
    except VerificationError as error:
        if not as_json:
            raise
        print_json({"proved": False, "message": str(error), "counterexample": list(error.counterexample)})
        context.exit(1)
    if as_json:
        print_json({"proved": True, "digest": loaded.digest, "semantics": semantics, "proofs": _document(proofs)})
    else:
        show(_table(loaded, proofs, semantics))


def _prove(plan: Plan, semantics: Any) -> tuple[tuple[str, Proof], ...]:
    """Proofs by the name of the program."""
    from pipeflow.lowering import lower
    from pipeflow.program import Mode
    from pipeflow.verifier import verify

    programs = [(mode.value, plan, mode) for mode in Mode]
    for phase in plan.costs.phases:
        programs += [(f"{mode.value} {phase.name}", plan.in_phase(phase.name), mode) for mode in Mode]
    return tuple(
        (name, verify(lower(part, mode=mode), plan=part, semantics=semantics)) for name, part, mode in programs
    )


def _document(proofs: tuple[tuple[str, Proof], ...]) -> list[dict[str, Any]]:
    return [
        {
            "program": name,
            "mode": proof.mode.value,
            "num_ranks": proof.num_ranks,
            "num_actions": proof.num_actions,
            "num_messages": proof.num_messages,
            "peak_bytes_by_rank": list(proof.peak_bytes_by_rank),
        }
        for name, proof in proofs
    ]


def _table(plan: Plan, proofs: tuple[tuple[str, Proof], ...], semantics: str) -> Table:
    return Table(
        title=f"{plan.costs.name}: proved, with {semantics} sends",
        headings=("program", ">ranks", ">actions", ">messages", ">largest peak", "on"),
        rows=tuple(
            (
                name,
                str(proof.num_ranks),
                str(proof.num_actions),
                str(proof.num_messages),
                format_bytes(max(proof.peak_bytes_by_rank)),
                plan.cluster.devices[proof.peak_bytes_by_rank.index(max(proof.peak_bytes_by_rank))].name,
            )
            for name, proof in proofs
        ),
        notes=("Every action happens once, every message is received in order, nobody waits in a circle.",),
    )
