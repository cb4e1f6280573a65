"""Every run of an order of atoms as a stage: its seconds and bytes, a row of arrays at a time.

For an order of n atoms, the run [i, j) is a candidate stage. A row holds, for one i and all
j = i + 1 .. n, what the objective needs to know of them. Rows come from the last i to the first,
each from the one after it by adding what atom i changes, so that a row costs O(n) for each net
that ends in i. Amounts are whole numbers in float64 and thus exact.

A net with ends S is paid by the run if the run holds some of S but not all. What a run pays for
sending a net to several later stages depends on how the others are cut, which a row cannot know:
`readers="once"` counts one message (never too much), `readers="each"` one for each reading atom
outside (never too little). Where no net has two readers outside, both are the objective.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeflow.partitioners.atoms import Atoms, Floats


@dataclass(frozen=True, slots=True)
class Row:
    """Runs [start, j) for j = start + 1 .. n; every array has n - start entries.

    Attributes:
        seconds: of compute, one array for each device model of the segments.
        parameter_bytes, saved_bytes: of the run.
        stuck: how many of its atoms cannot be replicated.
        in_count, in_bytes: messages between the run and the producers outside it.
        out_count, out_bytes: messages between its own producers and readers outside.
        received_bytes: of activations alone, among `in_bytes`.
    """

    start: int
    seconds: Floats
    parameter_bytes: Floats
    saved_bytes: Floats
    stuck: Floats
    in_count: Floats
    in_bytes: Floats
    out_count: Floats
    out_bytes: Floats
    received_bytes: Floats


@dataclass(frozen=True)
class Segments:
    """The runs of one order.

    Attributes:
        atoms: the atoms.
        order: a permutation of them.
        atom_seconds: seconds of each atom on each device model, of shape (models, atoms).
        readers: how a net with several readers outside is counted.
    """

    atoms: Atoms
    order: Sequence[int]
    atom_seconds: Floats
    readers: Literal["once", "each"] = "once"

    def prefix(self, values: NDArray[Any]) -> Floats:
        """Sums over the first 0 .. n atoms of the order, along the last axis."""
        ordered = values[..., list(self.order)].astype(np.float64)
        zero = np.zeros((*ordered.shape[:-1], 1))
        return np.concatenate([zero, np.cumsum(ordered, axis=-1)], axis=-1)

    @cached_property
    def passing(self) -> tuple[Floats, Floats]:
        """How many nets pass the cut before each place 0 .. n of the order, and their bytes."""
        place = {atom: p for p, atom in enumerate(self.order)}
        count, amount = np.zeros((2, self.atoms.count + 2))
        for net in self.atoms.nets:
            ends = [place[atom] for atom in net.ends]
            for table, value in ((count, 1.0), (amount, float(net.bytes))):
                table[min(ends) + 1] += value
                table[max(ends) + 1] -= value
        return np.cumsum(count)[:-1], np.cumsum(amount)[:-1]

    def rows(self) -> Iterator[Row]:
        """Rows of start n - 1, n - 2, ..., 0."""
        count = self.atoms.count
        seconds = self.prefix(self.atom_seconds)
        parameters = self.prefix(self.atoms.parameter_bytes)
        saved = self.prefix(self.atoms.saved_bytes)
        stuck = self.prefix((~self.atoms.replicable).astype(np.float64))
        events = self._events()
        state = np.zeros((5, count + 1))
        for i in range(count - 1, -1, -1):
            for first, last, weights in events[i]:
                state[:, first:last] += weights
            view = state[:, i + 1 :]
            yield Row(
                start=i,
                seconds=np.maximum(seconds[:, i + 1 :] - seconds[:, i : i + 1], 0.0),
                parameter_bytes=parameters[i + 1 :] - parameters[i],
                saved_bytes=saved[i + 1 :] - saved[i],
                stuck=stuck[i + 1 :] - stuck[i],
                in_count=view[0],
                in_bytes=view[1],
                out_count=view[2],
                out_bytes=view[3],
                received_bytes=view[4],
            )

    def _events(self) -> list[list[tuple[int, int, Floats]]]:
        """For every i: (first j, one past the last j, what to add) when the row of i is built."""
        count = self.atoms.count
        place = {atom: p for p, atom in enumerate(self.order)}
        events: list[list[tuple[int, int, Floats]]] = [[] for _ in range(count)]
        for net in self.atoms.nets:
            received = net.bytes if net.is_activation else 0
            inward = np.array([1.0, net.bytes, 0.0, 0.0, received])[:, None]
            outward = np.array([0.0, 0.0, 1.0, net.bytes, 0.0])[:, None]
            ends = sorted(place[atom] for atom in net.ends)
            producer = place[net.producer]
            for p in ends:
                after = bisect_right(ends, p)
                # From here on, the run [p, j) meets the net, up to where the next end already did.
                events[p].append((p + 1, ends[after] + 1 if after < len(ends) else count + 1, inward))
            # A run with the producer receives nothing; it sends unless it holds every end.
            events[producer].append((producer + 1, count + 1, -inward))
            if self.readers == "once":
                events[producer].append((producer + 1, count + 1, outward))
                events[ends[0]].append((ends[-1] + 1, count + 1, -outward))
                continue
            for reader in (place[atom] for atom in net.readers):
                events[producer].append((producer + 1, count + 1, outward))
                events[min(producer, reader)].append((max(producer, reader) + 1, count + 1, -outward))
        return events
