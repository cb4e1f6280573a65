"""The options that commands share, and how their values are written.

Options have the same name and meaning wherever they stand. Knows no command.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import click

from pipeflow.cli.pins import pin_options
from pipeflow.partitioners import PARTITIONERS
from pipeflow.schedules import SCHEDULES
from pipeflow.units import parse_bytes


def parse_counts(text: str) -> tuple[int, ...]:
    """Whole numbers joined by commas."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is no list of counts; write for example 2,1") from error


def parse_levels(text: str) -> tuple[int, ...]:
    """Numbers of devices such as 4x2, innermost level first."""
    try:
        counts = tuple(int(part) for part in text.split("x"))
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is no number of devices; write for example 8, or 4x2") from error
    if min(counts) < 1:
        raise click.BadParameter(f"{text!r} has a level of {min(counts)} devices; each has at least 1")
    return counts


def parse_amounts(text: str) -> tuple[int, ...]:
    """Bytes joined by commas, such as 10GB,1.25GB."""
    return tuple(parse_amount(part) for part in text.split(","))


def parse_layers(text: str) -> str | tuple[str, ...]:
    """A rule (never, always, fit), or names and patterns of layers joined by commas."""
    return text if text in ("never", "always", "fit") else tuple(text.split(","))


def parse_amount(text: str) -> int:
    """Bytes such as 16GiB."""
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


class NewFile(click.Path):
    """A file to be written at the end, which is found impossible at the start."""

    name = "file"

    def __init__(self) -> None:
        super().__init__(dir_okay=False, writable=True)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = super().convert(value, param, ctx)
        folder = os.path.dirname(path) or "."
        if not os.path.isdir(folder):
            self.fail(f"{path!r} cannot be written, since there is no folder {folder!r}; make it before", param, ctx)
        if not os.access(folder, os.W_OK):
            self.fail(f"{path!r} cannot be written, since the folder {folder!r} may not be; name another", param, ctx)
        return path


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")

allow_option = click.option(
    "--allow",
    multiple=True,
    metavar="PREFIX",
    help="An import prefix, such as mypackage, of a schedule that the plan may name besides pipeflow's.",
)

_OPTIONS = (
    click.option("--devices", type=click.IntRange(min=1), help="How many devices of this machine to plan for."),
    click.option("--cluster", type=click.Path(exists=True, dir_okay=False), help="A cluster file, instead."),
    click.option(
        "--memory",
        type=parse_amount,
        metavar="BYTES",
        help="Memory of each device, for example 16GiB, instead of its own.",
    ),
    click.option("--microbatches", type=click.IntRange(min=1), help="Into how many a batch is cut."),
    click.option("--stages", type=click.IntRange(min=1), help="Exactly so many stages."),
    click.option(
        "--replicas", type=parse_counts, metavar="N,N,...", help="Replicas of each stage in turn, for example 2,1."
    ),
    click.option("--partitioner", help=f"One of {', '.join(PARTITIONERS)}."),
    click.option(
        "--objective",
        type=click.Choice(["bottleneck", "iteration"]),
        help="iteration also tries plans next to the partitioner's, by simulated time.",
    ),
    click.option("--schedule", help=f"auto, one of {', '.join(SCHEDULES)}, or module:function."),
    click.option(
        "--shared",
        type=click.Choice(["together", "copies"]),
        help="Layers that share parameters: on one stage, or with a copy on each of theirs.",
    ),
    click.option(
        "--recompute",
        type=parse_layers,
        metavar="RULE|NAMES",
        help="Layers computed again for backward: never, always, fit (as few as fit), or names, as block*,head.",
    ),
    click.option(
        "--offload",
        type=parse_layers,
        metavar="RULE|NAMES",
        help="Layers that keep what backward needs on the host: never, always, or names.",
    ),
    click.option("--profile-cache", type=NewFile(), help="A file that keeps measured costs."),
)


def planning_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options of a `pipeflow.cli.planning.Request` to a command, its batch size apart."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return pin_options(function)
