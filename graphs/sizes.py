"""Sizes that are not numbers: the batch, lengths that differ from batch to batch, and what follows from them.

A size is a number; or so many times the batch; or a sum of lengths and a constant; or the batch
times such a sum. What depends on a length in any other way has a name of its own, written in
angle brackets after the tensor and the dimension that it is the size of.

    7   B   4*B   time   2*time+1   source+target   B*time   B*(time+1)   <conv.2>

Knows nothing of torch, and not where a length comes from.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from pipeflow.errors import GraphError

Dim = int | str
"""A size: a number, "B" for the batch, the name of a length such as "time", or for example "4*B" or "B*(time+1)"."""

_ATOM = r"<[^<>]+>|[A-Za-z_][A-Za-z0-9_]*"
_TERM = re.compile(rf"([+-]?)(?:(?:(\d+)\*)?({_ATOM})|(\d+))")
_BATCH = re.compile(r"(?:(\d+)\*?)?B(?:\*(.+))?")
_LENGTH = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True, slots=True)
class Size:
    """One size as numbers: `constant + sum(times * length)`, times the number of samples if `batch`.

    Attributes:
        batch: whether it grows with the batch.
        terms: (length, times), each length once, in order of name.
        constant: what is left without lengths.
    """

    batch: bool
    terms: tuple[tuple[str, int], ...]
    constant: int

    def at(self, samples: int, lengths: Mapping[str, int]) -> int:
        """The number.

        Raises:
            GraphError: a length is not given.
        """
        total = self.constant
        for name, times in self.terms:
            if name not in lengths:
                raise GraphError(f"the size {self} depends on the length {name!r}, which is not given")
            total += times * lengths[name]
        return total * samples if self.batch else total

    @property
    def dim(self) -> Dim:
        """The same as it is written in a shape."""
        if not self.terms:
            if not self.batch:
                return self.constant
            return "B" if self.constant == 1 else f"{self.constant}*B"
        if not self.batch:
            return self._sum()
        if self.constant or len(self.terms) > 1:
            return f"B*({self._sum()})"
        [(name, times)] = self.terms
        return f"B*{name}" if times == 1 else f"{times}*B*{name}"

    def _sum(self) -> str:
        text = "".join(
            f"{times:+d}*{name}" if abs(times) != 1 else f"{times:+d}"[0] + name for name, times in self.terms
        )
        return (text + (f"{self.constant:+d}" if self.constant else "")).removeprefix("+")

    def __str__(self) -> str:
        return str(self.dim)


@lru_cache(maxsize=4096)
def size_of(dim: Dim) -> Size:
    """What is written, as numbers.

    Raises:
        GraphError: it is no size.
    """
    if isinstance(dim, int) and not isinstance(dim, bool) and dim >= 0:
        return Size(False, (), dim)
    if isinstance(dim, str):
        text = re.sub(r"\s+", "", dim)
        if match := _BATCH.fullmatch(text):
            times = int(match[1] or 1)
            inner = match[2] or "1"
            inside = _parse(inner[1:-1] if inner.startswith("(") and inner.endswith(")") else inner)
            if inside is not None and times > 0 and (inside.terms or not match[2]):
                return Size(True, tuple((name, times * n) for name, n in inside.terms), times * inside.constant)
        elif (plain := _parse(text)) is not None and plain.terms:
            return plain
    raise GraphError(
        f'{dim!r} is not a size; give a number of at least 0, "B" for the batch, for example "4*B", or the name of a '
        'length that differs between batches, for example "time"'
    )


def _parse(text: str) -> Size | None:
    """A sum of lengths and numbers; None if it is none."""
    terms: dict[str, int] = {}
    constant = position = 0
    while position < len(text):
        match = _TERM.match(text, position)
        if match is None or (position and not match[1]) or match[3] in ("B", "b"):
            return None
        sign = -1 if match[1] == "-" else 1
        if match[3]:
            terms[match[3]] = terms.get(match[3], 0) + sign * int(match[2] or 1)
        else:
            constant += sign * int(match[4])
        position = match.end()
    return Size(False, tuple(sorted((name, n) for name, n in terms.items() if n)), constant) if text else None


@dataclass(frozen=True, slots=True)
class Length:
    """A size that differs between batches, or between micro-batches that are given one by one.

    In a shape its name alone is enough. What a layer does with it is found by trying sizes; where
    it cannot have every size, `low`, `high` and `multiple_of` say which are tried and accepted.

    >>> Length("time", low=16, multiple_of=16).trials()
    (16, 64, 144)

    Attributes:
        name: letters, digits and _, after a letter; the same name is the same size in all inputs.
        low: the least, at least 1.
        high: the most; None without a limit.
        multiple_of: what every size is a multiple of.

    Raises:
        GraphError: the name is none, or fewer than two sizes are left.
    """

    name: str
    low: int = 1
    high: int | None = None
    multiple_of: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _LENGTH.fullmatch(self.name) or self.name in ("B", "b"):
            raise GraphError(
                f'{self.name!r} cannot name a length; use letters, digits and _ after a letter, and not "B"'
            )
        if self.low < 1 or self.multiple_of < 1:
            raise GraphError(
                f"length {self.name!r}: low={self.low}, multiple_of={self.multiple_of}; both are at least 1"
            )
        if self.high is not None and self._round(self.low) + self.multiple_of > self.high:
            raise GraphError(
                f"length {self.name!r} has fewer than two sizes from {self.low} to {self.high} that are multiples of "
                f"{self.multiple_of}; a size that never changes is given as a number"
            )

    def _round(self, size: int) -> int:
        return -(-size // self.multiple_of) * self.multiple_of

    def allows(self, size: int) -> bool:
        """Whether a batch may have this size."""
        return size >= self.low and size % self.multiple_of == 0 and (self.high is None or size <= self.high)

    def trials(self, shift: int = 0) -> tuple[int, ...]:
        """Sizes to try, two or three of them, apart from each other and mostly odd and even.

        Args:
            shift: moves them, so that several lengths are tried with different sizes.
        """
        step = self.multiple_of
        first = self._round(max(self.low, 1)) if self.low > 1 or step > 1 else 7
        wanted = [first + step * (n + 2 * shift) for n in (0, 3, 8)]
        if self.high is None or wanted[-1] <= self.high:
            return tuple(wanted)
        last = self.high // step
        least = self._round(self.low) // step
        return tuple(sorted({least * step, (least + last) // 2 * step, last * step}))

    def __str__(self) -> str:
        most = "" if self.high is None else f" to {self.high}"
        multiples = f", multiples of {self.multiple_of}" if self.multiple_of > 1 else ""
        return f"{self.low}{most if most else ' or more'}{multiples}"
