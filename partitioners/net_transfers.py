"""What the nets of a cut cost its places, kept up as atoms move from one place to another, one at a time.

A place is whatever holds atoms: a stage, or a device with several. A net costs each of the places that its
ends are on, if these are two or more, the seconds of its transfer. It decides nothing: what a move is worth
is its callers' affair, as is whether it may be made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipeflow.partitioners.problem import PartitionProblem


def merged_nets(
    problem: PartitionProblem, is_end: Callable[[int], bool] = lambda atom: True
) -> list[tuple[tuple[int, ...], float]]:
    """Ends and seconds of the nets that cost any; nets of the same ends are one.

    Args:
        is_end: which atoms count as ends. What has fewer than two of them passes between no places.
    """
    bandwidth, latency = problem.transfer_link
    sums: dict[tuple[int, ...], float] = {}
    for net in problem.atoms.nets:
        ends = tuple(sorted(end for end in net.ends if is_end(end)))
        if len(ends) > 1:
            sums[ends] = sums.get(ends, 0.0) + latency + net.bytes / bandwidth
    return [(ends, seconds) for ends, seconds in sums.items() if seconds > 0]


@dataclass(frozen=True, slots=True)
class NetTransfers:
    """Where the ends of the nets are, and the seconds that this costs.

    Attributes:
        seconds: of transfers, by place.
        nets_of: (index, seconds) of the nets of every atom.
        counts: of each net, how many of its ends are on each place that holds any.
    """

    seconds: list[float]
    nets_of: list[list[tuple[int, float]]]
    counts: list[dict[int, int]]

    @classmethod
    def of(cls, problem: PartitionProblem, place_of: Sequence[int], num_places: int) -> NetTransfers:
        """Those of the atoms on their places."""
        result = cls([0.0] * num_places, [[] for _ in place_of], [])
        for index, (ends, seconds) in enumerate(merged_nets(problem)):
            count: dict[int, int] = {}
            for end in ends:
                result.nets_of[end].append((index, seconds))
                count[place_of[end]] = count.get(place_of[end], 0) + 1
            result.counts.append(count)
            for place in count if len(count) > 1 else ():
                result.seconds[place] += seconds
        return result

    def after(self, atom: int, source: int, target: int) -> tuple[float, float]:
        """Seconds of the two places after a move between them; no other place's change."""
        left, joined = self.seconds[source], self.seconds[target]
        for net, seconds in self.nets_of[atom]:
            count = self.counts[net]
            stays, was_there = count[source] > 1, target in count
            if len(count) == 1:
                left, joined = (left + seconds, joined + seconds) if stays else (left, joined)
                continue
            if not stays:
                left -= seconds
            if not was_there:
                joined += seconds
            elif not stays and len(count) == 2:
                joined -= seconds
        return left, joined

    def move(self, atom: int, source: int, target: int, seconds: tuple[float, float]) -> None:
        """Makes a move, after which the two places have so many seconds, as `after` has said."""
        self.seconds[source], self.seconds[target] = seconds
        for net, _ in self.nets_of[atom]:
            count = self.counts[net]
            count[target] = count.get(target, 0) + 1
            count[source] -= 1
            if not count[source]:
                del count[source]
