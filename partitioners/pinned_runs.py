"""Which runs of an order of atoms the pins allow as a stage, as numbers that a programme adds in.

For a run that starts at place i, what keeps layers apart or few bounds its length; what puts
layers on a stage leaves an interval of lengths for the k-th stage from the end; and what puts them
on devices asks for a least number of replicas.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeflow.partitioners.atoms import Floats, Ints
from pipeflow.partitioners.pinned_atoms import PinnedAtoms


class PinnedRuns:
    """The pins of one order.

    Args:
        pinned: of the atoms.
        order: a permutation of the atoms.
        num_stages: how many there will be; None where no stage is named by its index from the first.
    """

    def __init__(self, pinned: PinnedAtoms, order: Sequence[int], num_stages: int | None) -> None:
        self._count = len(order)
        self.longest = _longest(pinned, order)
        place = {atom: p for p, atom in enumerate(order)}
        self._turns: dict[int, int] = {}
        """The stage, counted from 1 at the end, of every place whose stage is given; 0 where none will do."""
        for atom, indices in pinned.stages.items():
            turns = {-index if index < 0 else (num_stages or 0) - index for index in indices}
            self._turns[place[atom]] = turns.pop() if len(turns) == 1 else 0
        self.has_turns = bool(self._turns)
        self._devices = {place[atom]: devices for atom, devices in pinned.devices.items()}
        self.has_devices = bool(self._devices)
        self._num_devices = np.zeros(self._count + 1, np.int64)
        for p, devices in self._devices.items():
            self._num_devices[p + 1] = len(devices)
        self._num_devices = np.cumsum(self._num_devices)

    def lengths(self, start: int, turn: int) -> tuple[int, int]:
        """The least and the greatest length of a run from `start` that is stage `turn` from the end."""
        least, greatest = 1, self._count - start
        for p, given in self._turns.items():
            if given == turn:
                if p < start:
                    return 1, 0
                least = max(least, p - start + 1)
            elif p >= start:
                greatest = min(greatest, p - start)
        return least, greatest

    def least_replicas(self, start: int, width: int) -> Ints:
        """Of devices alike: the replicas that runs [start, start + 1 .. start + width) need at least."""
        least: Ints = self._num_devices[start + 1 : start + 1 + width] - self._num_devices[start]
        return least

    def device_span(self, start: int, width: int) -> tuple[Floats, Floats]:
        """Of unlike devices: the first and last device that such runs must be on; inf and -inf for none."""
        first, last = np.full(width, np.inf), np.full(width, -np.inf)
        for p, devices in self._devices.items():
            if start <= p < start + width:
                first[p - start :] = np.minimum(first[p - start :], min(devices))
                last[p - start :] = np.maximum(last[p - start :], max(devices))
        return first, last


def _longest(pinned: PinnedAtoms, order: Sequence[int]) -> Ints:
    """For every place, the longest run from there that keeps atoms apart and layers few."""
    count = len(order)
    ends = np.full(count + 1, count)
    place = {atom: p for p, atom in enumerate(order)}
    for pair in pinned.apart:
        a, b = sorted(place[atom] for atom in pair)
        ends[a] = min(ends[a], b)
    ends = np.minimum.accumulate(ends[::-1])[::-1]
    if pinned.max_layers is not None:
        before = np.concatenate([[0], np.cumsum(pinned.sizes[list(order)])])
        ends = np.minimum(ends, np.searchsorted(before, before + pinned.max_layers, side="right") - 1)
    longest: Ints = ends[:count] - np.arange(count)
    return longest
