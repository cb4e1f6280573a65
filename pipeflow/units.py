"""Quantities, and names, as people write and read them. Bytes are binary (KiB); seconds and flops decimal."""

from __future__ import annotations

import math
import re

_BYTES = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}


def parse_bytes(text: str | int | float) -> int:
    """Bytes from a number or from text such as "16GiB", "1.5 GB" or "4096".

    >>> parse_bytes("16 GiB")
    17179869184

    Raises:
        ValueError: the text is not a non-negative number with a known unit.
    """
    if isinstance(text, int | float):
        if not (math.isfinite(text) and text >= 0):
            raise ValueError(f"{text!r} is not an amount of bytes; give a number of at least 0")
        return int(text)
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*([a-z]*)\s*", text.lower())
    if match is None or match[2] not in _BYTES:
        raise ValueError(f"{text!r} is not an amount of bytes; write for example 4096, 512MiB or 16GB")
    return int(float(match[1]) * _BYTES[match[2]])


def format_bytes(amount: float) -> str:
    """Bytes in the largest binary unit that keeps the number at 1 or more.

    >>> format_bytes(1536)
    '1.5 KiB'
    """
    size = float(amount)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} B" if unit == "B" and size == int(size) else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def format_seconds(amount: float) -> str:
    """Seconds in s, ms, us or ns with three significant digits.

    >>> format_seconds(0.00123)
    '1.23 ms'
    """
    if amount == 0 or not math.isfinite(amount):
        return f"{amount:g} s"
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if abs(amount) >= factor:
            return f"{amount / factor:.3g} {unit}"
    return f"{amount / 1e-9:.3g} ns"


def one_line(text: str) -> str:
    r"""The text with what would end its line, or cannot be seen, escaped.

    >>> one_line("two\nlines")
    'two\\nlines'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
