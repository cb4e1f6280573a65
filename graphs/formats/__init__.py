"""Costs that others have measured: readers of published file formats.

A reader turns a file into a `Profile`: ordinary `GraphCosts`, and beside them what else the
file fixes (limits, links, its unit of time). Nothing here knows partitioners or devices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from pipeflow.graphs.formats.profile import Profile

    Reader = Callable[[Path], Profile]

_MODULES = {
    "dnn-partitioning": "dnn_partitioning",
    "pipedream": "pipedream",
    "piper": "piper",
    "pipeflow": "native",
}


class _Table(Mapping[str, "Reader"]):
    """Readers by the name of their format. A row is loaded when it is first looked up."""

    def __getitem__(self, name: str) -> Reader:
        reader: Reader = import_module(f"{__name__}.{_MODULES[name]}").read
        return reader

    def __iter__(self) -> Iterator[str]:
        return iter(_MODULES)

    def __len__(self) -> int:
        return len(_MODULES)


FORMATS = _Table()
"""Read-only: name of a format to `read(path) -> Profile`."""
