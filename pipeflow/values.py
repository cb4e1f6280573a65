"""The base of every value that enters or leaves the program as JSON, and its way from and to files.

Knows pydantic and nothing of what the values mean.
"""

from __future__ import annotations

import hashlib
import json
import os
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeflow.errors import PipeflowError
from pipeflow.units import one_line

Count = Annotated[int, Field(ge=1)]
"""A number of things there is at least one of."""

Index = Annotated[int, Field(ge=0)]
"""A position counted from 0."""

Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Bytes = Annotated[int, Field(ge=0)]


class Value(BaseModel):
    """A frozen record. Unknown keys are refused; equality and hash are by content."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    def __init__(self, **data: Any) -> None:
        """Raises what a rule of the value raises itself, rather than pydantic's wrapping of it."""
        try:
            super().__init__(**data)
        except ValidationError as error:
            for detail in error.errors():
                cause = detail.get("ctx", {}).get("error")
                if isinstance(cause, PipeflowError):
                    raise cause from None
            raise

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy with some fields changed. What was derived from the old ones is not kept."""
        copy = super().model_copy(update=update, deep=deep)
        for name in copy.__dict__.keys() - type(self).model_fields.keys():
            del copy.__dict__[name]
        return copy

    def canonical_json(self) -> str:
        """The value as JSON with sorted keys and no spaces: equal values give equal text."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))

    @property
    def digest(self) -> str:
        """SHA-256 of `canonical_json`, as 64 hex digits."""
        return hashlib.sha256(self.canonical_json().encode()).hexdigest()


_V = TypeVar("_V", bound=Value)


def read_value(kind: type[_V], path: str | os.PathLike[str], *, what: str, error: type[PipeflowError]) -> _V:
    """The value in a JSON file.

    Args:
        what: the file should be, for example "a plan".
        error: what is raised where it is not.

    Raises:
        error: there is no such file, or it is not one of these; a line for each key that is wrong.
    """
    return as_value(kind, read_json(path, what=what, error=error), path, what=what, error=error)


def read_json(path: str | os.PathLike[str], *, what: str, error: type[PipeflowError]) -> Any:
    """The document in a JSON file. Arguments and errors as `read_value`."""
    name = os.fspath(path)
    try:
        return parse_json(Path(path).read_bytes())
    except OSError as cause:
        raise error(f"{name} cannot be read ({cause.strerror}); give the path of {what}") from cause
    except (ValueError, RecursionError) as cause:  # of JSON, of text encoding
        raise error(f"{name} is not {what}: it is not JSON ({cause})") from cause


def parse_json(content: str | bytes) -> Any:
    """The document of a text, each key of an object once: a second one would hide the first.

    Raises:
        ValueError: it is not JSON, or a key stands twice.
    """
    return json.loads(content, object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object; names must be unique")
    return result


def as_value(
    kind: type[_V], document: Any, path: str | os.PathLike[str], *, what: str, error: type[PipeflowError]
) -> _V:
    """The value that the document of a file is. Arguments and errors as `read_value`."""
    try:
        return kind.model_validate(document)
    except ValidationError as cause:
        raise error(f"{os.fspath(path)} is not {what}: {told(cause)}") from cause


def told(error: ValidationError) -> str:
    """What is wrong with a document: the key, the value seen and the rule, in a line for each."""
    lines = [_told(detail) for detail in error.errors(include_url=False)]
    return lines[0] if len(lines) == 1 else "".join(f"\n  {line}" for line in lines)


def _told(detail: Any) -> str:
    key = one_line(".".join(map(str, detail["loc"])))
    cause = detail.get("ctx", {}).get("error")
    rule = str(cause) if cause is not None else f"{detail['msg'][:1].lower()}{detail['msg'][1:]}"
    if detail["type"] == "missing" or isinstance(cause, PipeflowError):  # which says what it saw
        return f"{key}: {rule}" if key else rule
    return f"{key or 'the whole'}: {reprlib.repr(detail['input'])}; {rule}"


def write_text(path: str | os.PathLike[str], text: str, *, error: type[PipeflowError]) -> None:
    """Writes a file.

    Raises:
        error: it cannot be written.
    """
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as cause:
        raise error(
            f"{os.fspath(path)} cannot be written ({cause.strerror}); name a file in a folder that there is"
        ) from cause
