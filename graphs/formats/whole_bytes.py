"""Amounts of bytes of a file as whole numbers, though the file may have fractions of bytes.

Rounding each of many amounts up would make more of their sum than there is, and down less: a graph that just
fits would not fit any more. So costs then count in a smaller unit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

_MOST_BITS = 52
"""Of the sum of all amounts in the smaller unit."""

_SLACK = 1e-12
"""Sums of fractions are rounded; a limit has that much room for it, relatively."""


@dataclass(frozen=True, slots=True)
class WholeBytes:
    """How amounts are counted.

    Attributes:
        unit: that they are counted in, in bytes: 1, or a power of two below it.
    """

    unit: float

    @classmethod
    def of(cls, amounts: Iterable[float]) -> WholeBytes:
        """The largest unit that all amounts are whole numbers of, or the smallest that their sum allows."""
        broken = list(amounts)
        total = math.fsum(broken)
        bits = max((a.as_integer_ratio()[1].bit_length() - 1 for a in broken), default=0)
        return cls(math.ldexp(1.0, -max(0, min(bits, _MOST_BITS - math.frexp(total)[1]))))

    def amount(self, value: float) -> int:
        """So many units."""
        return round(value / self.unit)

    def limit(self, value: float) -> int:
        """So many units that others have to stay within."""
        return math.floor(value if self.unit == 1.0 else value / self.unit * (1 + _SLACK))
