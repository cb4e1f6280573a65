"""A table of text, for a terminal or for a pipe.

Knows nothing of what the cells mean. rich is loaded when a table is printed, not before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import IO


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text under headings.

    Attributes:
        title: one line above; "" for none.
        headings: of the columns. One that starts with ">" is aligned right, for numbers. Where all
            are empty none is shown.
        rows: as many cells each as there are headings.
        notes: lines below.
    """

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


def print_table(table: Table, stream: IO[str]) -> None:
    """Writes the table: ruled and coloured on a terminal, plain aligned columns elsewhere."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable

    terminal = stream.isatty()
    # A pipe has no width: a long cell must not be cut or wrapped there.
    console = Console(file=stream, highlight=False, markup=False, width=None if terminal else 10_000)
    drawn = RichTable(
        box=box.SIMPLE_HEAD if terminal else None,
        pad_edge=False,
        header_style="bold",
        show_header=any(table.headings),
    )
    for heading in table.headings:
        drawn.add_column(heading.removeprefix(">"), justify="right" if heading.startswith(">") else "left")
    for row in table.rows:
        drawn.add_row(*row)
    if table.title:
        console.print(table.title, style="bold", soft_wrap=True)
    console.print(drawn)
    for note in table.notes:
        console.print(note, soft_wrap=True)
