from __future__ import annotations

import io

from pipeflow.report.table import Table, print_table


def test_a_piped_table_is_plain_text_in_columns() -> None:
    stream = io.StringIO()
    print_table(Table("figures", ("name", ">seconds"), (("a", "1.5"), ("long", "10.25")), ("a note",)), stream)
    lines = stream.getvalue().splitlines()
    assert lines == ["figures", "name  seconds", "a         1.5", "long    10.25", "a note"]


def test_a_long_cell_is_neither_cut_nor_wrapped_in_a_pipe() -> None:
    stream = io.StringIO()
    cell = "x" * 500
    print_table(Table("", ("layers",), ((cell,),)), stream)
    assert cell in stream.getvalue()


def test_text_in_brackets_stays() -> None:
    stream = io.StringIO()
    print_table(Table("[bold]", ("[a]",), (("[b]",),)), stream)
    assert all(text in stream.getvalue() for text in ("[bold]", "[a]", "[b]"))


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_the_same_words() -> None:
    stream = _Terminal()
    print_table(Table("[figures]", ("name", ">[s]"), (("[a]", "1.5"),), ("a note",)), stream)
    assert all(text in stream.getvalue() for text in ("[figures]", "name", "[s]", "[a]", "1.5", "a note"))


def test_headings_that_are_all_empty_are_left_out() -> None:
    stream = io.StringIO()
    print_table(Table("", ("", ""), (("a", "b"),)), stream)
    assert stream.getvalue() == "a  b\n"
