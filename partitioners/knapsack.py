"""One option for each of several things, so that all fit at the least time: a knapsack of choices.

Exact by keeping, thing after thing, the sums that no other sum beats in both time and bytes, as long as
these are few. It knows nothing of layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeflow.partitioners.atoms import Floats

Option = tuple[float, float]
"""(seconds, bytes)"""

_MOST_SUMS = 4000
_ROUNDING = 1 + 1e-12


@dataclass(frozen=True, slots=True)
class Choice:
    """An option for each thing.

    Attributes:
        seconds: of all; inf where nothing fits.
        options: the index of the option of each thing; empty where nothing fits.
        least_seconds: that any choice takes which fits; less than `seconds` only if there were too many sums.
    """

    seconds: float
    options: tuple[int, ...]
    least_seconds: float


def choose(things: Sequence[Sequence[Option]], limit: float) -> Choice:
    """The choice of least seconds whose bytes keep to the limit.

    Args:
        things: the options of each, at least one.
    """
    fastest = [min(range(len(options)), key=lambda i: options[i]) for options in things]
    seconds = math.fsum(options[i][0] for options, i in zip(things, fastest, strict=True))
    lacking = math.fsum(options[i][1] for options, i in zip(things, fastest, strict=True)) - limit
    if lacking <= 0:
        return Choice(seconds, tuple(fastest), seconds)
    # For each thing that can save: (seconds more, bytes less) of its options, the fastest first.
    steps = {t: _steps(options, options[i]) for t, (options, i) in enumerate(zip(things, fastest, strict=True))}
    steps = {t: rows for t, rows in steps.items() if len(rows) > 1}
    if math.fsum(max(saved for _, saved, _ in rows) for rows in steps.values()) < lacking:
        return Choice(math.inf, (), math.inf)
    dearest = _greedy(steps, lacking)
    found = _sums(steps, lacking, dearest * _ROUNDING)
    chosen = list(fastest)
    for thing, option in found.options.items():
        chosen[thing] = option
    return Choice(seconds + found.more, tuple(chosen), seconds + (found.more if found.is_exact else 0.0))


def _steps(options: Sequence[Option], fastest: Option) -> list[tuple[float, float, int]]:
    """(seconds more, bytes less, index) of the options that no other beats in both, by seconds."""
    result: list[tuple[float, float, int]] = []
    for seconds, amount, index in sorted((s, b, i) for i, (s, b) in enumerate(options)):
        if not result or fastest[1] - amount > result[-1][1]:
            result.append((seconds - fastest[0], fastest[1] - amount, index))
    return result


def _greedy(steps: dict[int, list[tuple[float, float, int]]], lacking: float) -> float:
    """Seconds of a choice that saves enough: what saves most for its time first."""
    moves = [(more / saved, more, saved, t) for t, rows in steps.items() for more, saved, _ in rows[1:]]
    taken: dict[int, tuple[float, float]] = {}
    for _, more, saved, thing in sorted(moves):
        if saved > taken.get(thing, (0.0, 0.0))[1]:
            taken[thing] = (more, saved)
        if math.fsum(s for _, s in taken.values()) >= lacking:
            break
    return math.fsum(m for m, _ in taken.values())


@dataclass(frozen=True, slots=True)
class _Found:
    more: float
    options: dict[int, int]
    is_exact: bool


def _sums(steps: dict[int, list[tuple[float, float, int]]], lacking: float, most: float) -> _Found:
    """The least seconds more that save what is lacking, at most `most`."""
    order = sorted(steps, key=lambda t: steps[t][-1][0] / max(steps[t][-1][1], 1e-300))
    ahead = math.fsum(steps[t][-1][1] for t in order)
    more, saved = np.zeros(1), np.zeros(1)
    history: list[tuple[NDArray[np.intp], int]] = []
    is_exact = True
    for thing in order:
        rows = steps[thing]
        ahead -= rows[-1][1]
        all_more = (more[:, None] + np.array([m for m, _, _ in rows])).ravel()
        all_saved = (saved[:, None] + np.array([s for _, s, _ in rows])).ravel()
        keep = _unbeaten(all_more, np.minimum(all_saved, lacking))
        keep = keep[(all_more[keep] <= most) & (all_saved[keep] + ahead * _ROUNDING >= lacking)]
        if len(keep) > _MOST_SUMS:
            keep, is_exact = keep[:: len(keep) // _MOST_SUMS + 1], False
        more, saved = all_more[keep], all_saved[keep]
        history.append((keep, len(rows)))
    enough = np.flatnonzero(saved >= lacking)
    place = int(enough[np.argmin(more[enough])])
    total, options = float(more[place]), {}
    for thing, (keep, width) in zip(reversed(order), reversed(history), strict=True):
        place, step = divmod(int(keep[place]), width)
        options[thing] = steps[thing][step][2]
    return _Found(total, options, is_exact)


def _unbeaten(more: Floats, saved: Floats) -> NDArray[np.intp]:
    """Indices of the sums that no other beats in both, by seconds."""
    order = np.lexsort((-saved, more))
    best = np.maximum.accumulate(saved[order])
    fresh = np.ones(len(order), dtype=np.bool_)
    fresh[1:] = best[1:] > best[:-1]
    return order[fresh]
