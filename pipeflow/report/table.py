"""A table of text, for a terminal or for a pipe.

Knows nothing of what the cells mean. rich is loaded when a table is drawn on a terminal, not before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import IO

from pipeflow.units import one_line


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text under headings.

    Attributes:
        title: one line above; "" for none.
        headings: of the columns. One that starts with ">" is aligned right, for numbers. Where all
            are empty none is shown.
        rows: as many cells each as there are headings. What would end the line of a cell, or of the title, is
            escaped: names come from anywhere.
        notes: lines below.
    """

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


def print_table(table: Table, stream: IO[str]) -> None:
    """Writes the table: ruled and fitted on a terminal, plain aligned columns elsewhere."""
    if stream.isatty():
        _print_ruled(table, stream)
    else:
        stream.write(plain(table) + "\n")


def plain(table: Table) -> str:
    """The table as text: columns two spaces apart, no cell cut or wrapped, no line ending in spaces."""
    shown = any(table.headings)
    cells = [tuple(map(one_line, row)) for row in table.rows]
    rows = [tuple(h.removeprefix(">") for h in table.headings)] * shown + cells
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(len(table.headings))]
    lines = [
        "  ".join(
            cell.rjust(width) if heading.startswith(">") else cell.ljust(width)
            for cell, width, heading in zip(row, widths, table.headings, strict=True)
        ).rstrip()
        for row in rows
    ]
    return "\n".join([*([one_line(table.title)] if table.title else []), *lines, *table.notes])


def _print_ruled(table: Table, stream: IO[str]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable

    console = Console(file=stream, highlight=False, markup=False)
    drawn = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", show_header=any(table.headings))
    for heading in table.headings:
        drawn.add_column(heading.removeprefix(">"), justify="right" if heading.startswith(">") else "left")
    for row in table.rows:
        drawn.add_row(*map(one_line, row))
    if table.title:
        console.print(one_line(table.title), style="bold")
    console.print(drawn)
    for note in table.notes:
        console.print(note)
