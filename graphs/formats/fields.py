"""Values of a file's records, each checked where it is read.

Whatever is wrong is a `FormatError` that names the record ("node 4") and the key. Knows no format.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from typing import Any

from pipeflow.errors import FormatError

Record = Mapping[str, Any]

_NOTHING = object()


def value(record: Record, key: str, where: str, default: Any = _NOTHING) -> Any:
    """What stands under the key, or the default, where there is one.

    Args:
        record: of the file.
        key: of the value.
        where: how messages call the record.
        default: for a key that is not there; without one it must be.
    """
    if key in record:
        return record[key]
    if default is _NOTHING:
        raise FormatError(f"{where} has no key {key!r}; give one")
    return default


def number(record: Record, key: str, where: str, *, is_positive: bool = False) -> float:
    """A finite number of at least 0, or above 0."""
    found = value(record, key, where)
    return checked(found, f"{where}: {key}={reprlib.repr(found)}", is_positive=is_positive)


def checked(found: Any, story: str, *, is_positive: bool = False) -> float:
    """The same of a value that stands somewhere else; `story` says where and what it is."""
    rule = f"a finite number {'above' if is_positive else 'of at least'} 0"
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise FormatError(f"{story}; it must be {rule}")
    try:
        amount = float(found)
    except OverflowError:
        amount = math.inf
    if not math.isfinite(amount) or amount < 0 or (is_positive and not amount):
        raise FormatError(f"{story}; it must be {rule}")
    return amount


def count(record: Record, key: str, where: str) -> int:
    """A whole number of at least 1."""
    found = value(record, key, where)
    whole = isinstance(found, int | float) and not isinstance(found, bool) and math.isfinite(found)
    if not whole or found != int(found) or found < 1:
        raise FormatError(f"{where}: {key}={reprlib.repr(found)}; it must be a whole number of at least 1")
    return int(found)


def flag(record: Record, key: str, where: str, *, default: bool) -> bool:
    """True or false, which may be written as 1 or 0."""
    found = value(record, key, where, default)
    if found not in (0, 1):
        raise FormatError(f"{where}: {key}={reprlib.repr(found)}; it must be true or false")
    return bool(found)


def identity(record: Record, key: str, where: str) -> str:
    """A name, or a whole number, which counts as the same written as text."""
    found = value(record, key, where)
    if isinstance(found, float) and math.isfinite(found) and found == int(found):
        found = int(found)
    if isinstance(found, bool) or not isinstance(found, int | str) or found == "":
        raise FormatError(f"{where}: {key}={reprlib.repr(found)}; it must be a whole number or a name")
    return str(found)


def records(record: Record, key: str, where: str) -> list[Record]:
    """A list of objects."""
    found = value(record, key, where)
    if not isinstance(found, list):
        raise FormatError(f"{where}: {key}={reprlib.repr(found)}; it must be a list of objects")
    for index, entry in enumerate(found):
        _require_object(entry, f"{key}[{index}] of {where}")
    return found


def mapping(record: Record, key: str, where: str, default: Any = _NOTHING) -> Record:
    """An object."""
    found: Record = value(record, key, where, default)
    _require_object(found, f"{where}: {key}")
    return found


def _require_object(found: Any, story: str) -> None:
    if not isinstance(found, Mapping):
        raise FormatError(f"{story}={reprlib.repr(found)}; it must be an object with keys")


def whole_file(document: Any) -> Record:
    """The outermost object of a file."""
    if not isinstance(document, Mapping):
        raise FormatError(f"it holds {reprlib.repr(document)}; it must be an object with keys")
    return document
