"""Costs kept in a file between runs, each under what it was measured for."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from pipeflow.errors import FormatError
from pipeflow.graphs.costs import GraphCosts
from pipeflow.values import Value, read_value, write_text


class _Entry(Value):
    key: dict[str, Any]
    costs: GraphCosts


class _File(Value):
    format: Literal["pipeflow-profiles-1"] = "pipeflow-profiles-1"
    entries: dict[str, _Entry] = Field(default_factory=dict)


def read(path: str | os.PathLike[str], key: Mapping[str, Any]) -> GraphCosts | None:
    """The costs kept for exactly `key`; None if there are none.

    Raises:
        FormatError: the file is no such file, or was altered.
    """
    entry = _load(path).entries.get(_name(key))
    return entry.costs if entry is not None and entry.key == dict(key) else None


def write(path: str | os.PathLike[str], key: Mapping[str, Any], costs: GraphCosts) -> None:
    """Keeps the costs besides those that are there; a reader never sees half a file.

    Raises:
        FormatError: the file is there but is no such file, or it cannot be written.
    """
    entries = {**_load(path).entries, _name(key): _Entry(key=dict(key), costs=costs)}
    target = Path(path)
    scratch = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        write_text(scratch, _File(entries=entries).model_dump_json(indent=1) + "\n", error=FormatError)
        scratch.replace(target)
    finally:
        scratch.unlink(missing_ok=True)


def _load(path: str | os.PathLike[str]) -> _File:
    if not Path(path).exists():
        return _File()
    try:
        return read_value(_File, path, what="a file that keeps costs", error=FormatError)
    except FormatError as error:
        raise FormatError(f"{error}; delete it or name another cache") from error


def _name(key: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()
