"""How commands speak: results on stdout, progress on stderr, and only where somebody looks.

Knows nothing of what is said. rich is loaded when something is drawn.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import click

from pipeflow.errors import Infeasible
from pipeflow.report.table import Table, print_table

Advance = Callable[[str], None]
"""Moves a progress bar by one and says what is going on."""


def print_json(document: Mapping[str, Any]) -> None:
    """Writes the document to stdout. Figures that are no numbers stand as null, which JSON can hold."""
    click.echo(json.dumps(document, indent=1, allow_nan=False))


def infeasible_document(error: Infeasible) -> dict[str, Any]:
    """What `--json` prints where nothing fits: why, and the smallest set of rules behind it."""
    rules = [{"kind": r.kind, "text": r.text, "layers": r.layers, "devices": r.devices} for r in error.rules]
    return {"feasible": False, "reasons": list(error.reasons), "rules": rules}


def show(table: Table) -> None:
    """Writes the table to stdout."""
    print_table(table, sys.stdout)


def terminal_width(default: int = 100) -> int:
    """Columns of the terminal; `default` where stdout is none."""
    return shutil.get_terminal_size((default, 24)).columns if sys.stdout.isatty() else default


@contextmanager
def progress(title: str, total: int, *, enabled: bool = True) -> Iterator[Advance]:
    """A progress bar on stderr while it lasts; nothing where stderr is no terminal.

    Args:
        title: what is going on.
        total: how many steps there are.
        enabled: False for silence anywhere.
    """
    if not enabled or not sys.stderr.isatty():
        yield lambda message: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Lines for stdout go above the bar where both are one terminal, and must not be caught where they are not.
    shared = sys.stdout.isatty()
    with Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=shared) as bar:
        task = bar.add_task(title, total=total)

        def advance(message: str) -> None:
            bar.update(task, advance=1, description=f"{title} {message}".rstrip())

        yield advance


@contextmanager
def working(title: str, *, enabled: bool = True) -> Iterator[Callable[[str], None]]:
    """A sign on stderr that something goes on, while it lasts; nothing where stderr is no terminal.

    Gives a function that says what.
    """
    if not enabled or not sys.stderr.isatty():
        yield lambda message: None
        return
    from rich.console import Console

    with Console(stderr=True).status(title) as status:
        yield status.update
