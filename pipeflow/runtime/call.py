"""What a rank is asked for, as a value: by it ranks tell whether they do the same.

Every rank makes the same calls of its engine in the same order. Messages of a call carry its tag, so that
none takes what another sends for another call; the words are for those who wait in vain.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from pipeflow.runtime.cut import Cut

_TAGS = 1 << 29
_SPREAD = 2654435761  # Knuth's multiplier: neighbouring numbers get tags far apart

Arguments = tuple[tuple[str, Any], ...]
"""(name, value) of those that are not as by default; values are plain and hashable."""


@dataclass(slots=True)
class Call:
    """One call of an engine that all ranks make.

    Attributes:
        number: of such calls before it.
        name: of the method.
        arguments: that must be the same on every rank.
        step: optimizer steps taken before.
        cut: of the batch; None before it is read, and where there is none.
    """

    number: int
    name: str
    arguments: Arguments
    step: int
    cut: Cut | None = None

    @property
    def tag(self) -> int:
        """A number below 2**29 that tells calls apart."""
        cut = 0 if self.cut is None else self.cut.tag
        kind = _kind(self.name, self.arguments)
        return (kind + cut * _SPREAD + (self.number * 31 + self.step) * 97) % _TAGS

    @property
    def asked(self) -> str:
        """What was asked for, as code would have it, and at which step."""
        given = ", ".join(f"{name}={value!r}" for name, value in self.arguments)
        return f"{self.name}({given}) as call {self.number}, at step {self.step}"

    @property
    def batch(self) -> str:
        """The batch in words; "" where there is none."""
        return "" if self.cut is None else str(self.cut)

    def __str__(self) -> str:
        return self.asked + (f", with a batch of {self.batch}" if self.cut else "")


@lru_cache(maxsize=256)
def _kind(name: str, arguments: Arguments) -> int:
    return zlib.crc32(repr((name, arguments)).encode())


def given(arguments: Mapping[str, Any]) -> Arguments:
    """Those of the arguments that say something."""
    return tuple((name, value) for name, value in arguments.items() if value is not None)
