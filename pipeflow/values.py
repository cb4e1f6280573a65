"""The base of every value that enters or leaves the program as JSON.

Knows pydantic and nothing of what the values mean.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeflow.errors import PipeflowError

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
