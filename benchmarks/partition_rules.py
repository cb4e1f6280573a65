"""The rules in use, written anew from what is published about them, to compare with.

Each cuts a sequence of weights into runs: it returns the end of every run.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate

Rule = Callable[[Sequence[float], int], list[int]]


def even_by_count(weights: Sequence[float], num_runs: int) -> list[int]:
    """The same number of layers each, earlier runs one more."""
    size, extra = divmod(len(weights), num_runs)
    return list(accumulate(size + (index < extra) for index in range(num_runs)))


def balanced_by_probe(weights: Sequence[float], num_runs: int) -> list[int]:
    """DeepSpeed's balanced partition: bisect the largest run, each run filled up to it from the left.

    The bisection ends at a tolerance of 1e-3, as there.
    """
    prefix = [0.0, *accumulate(weights)]

    def probe(limit: float) -> list[int]:
        ends = [0]
        for _ in range(num_runs):
            ends.append(bisect_right(prefix, prefix[ends[-1]] + limit) - 1)
        return ends[1:]

    low, high = prefix[-1] / num_runs, prefix[-1]
    while high > low * (1 + 1e-3):
        middle = (low + high) / 2
        low, high = (low, middle) if probe(middle)[-1] == len(weights) else (middle, high)
    return probe(high * (1 + 1e-12))


def block_partition(weights: Sequence[float], num_runs: int) -> list[int]:
    """torchgpipe's: Barany and Grinberg's block partition, moving ends until no run can shrink.

    Starts from even counts; while it helps, the heaviest run gives its first or last layer to the
    lighter neighbour.
    """
    ends = even_by_count(weights, num_runs)
    prefix = [0.0, *accumulate(weights)]
    for _ in range(len(weights) * num_runs):
        starts = [0, *ends[:-1]]
        sums = [prefix[b] - prefix[a] for a, b in zip(starts, ends, strict=True)]
        heavy = max(range(num_runs), key=sums.__getitem__)
        options = []
        if heavy > 0:
            options.append(
                (max(sums[heavy - 1] + weights[starts[heavy]], sums[heavy] - weights[starts[heavy]]), heavy - 1, 1)
            )
        if heavy < num_runs - 1:
            last = weights[ends[heavy] - 1]
            options.append((max(sums[heavy + 1] + last, sums[heavy] - last), heavy, -1))
        if ends[heavy] - starts[heavy] < 2 or not options or min(options)[0] >= sums[heavy]:
            return ends
        _, index, step = min(options)
        ends[index] += step
    return ends


def least_bottleneck(weights: Sequence[float], num_runs: int) -> list[int]:
    """PipeDream's recurrence without replicas or transfers: the least largest run, exactly."""
    prefix = [0.0, *accumulate(weights)]
    count = len(weights)
    best = [prefix[end] for end in range(count + 1)]
    cuts: list[list[int]] = [[0] * (count + 1)]
    for _ in range(num_runs - 1):
        row, cut = list(best), [0] * (count + 1)
        for end in range(1, count + 1):
            for start in range(end - 1, 0, -1):
                last = prefix[end] - prefix[start]
                if last >= row[end]:
                    break
                value = max(best[start], last)
                if value < row[end]:
                    row[end], cut[end] = value, start
        best = row
        cuts.append(cut)
    ends = [count]
    for cut in reversed(cuts[1:]):
        ends.append(cut[ends[-1]] or 0)
    ends = sorted(ends)
    return ends[-num_runs:]


RULES: dict[str, tuple[Rule, str]] = {
    "even by count": (even_by_count, "count"),
    "balanced by parameters (DeepSpeed)": (balanced_by_probe, "parameters"),
    "balanced by time (DeepSpeed's rule)": (balanced_by_probe, "time"),
    "block partition by time (torchgpipe)": (block_partition, "time"),
    "least bottleneck by time (PipeDream)": (least_bottleneck, "time"),
}
"""Name to the rule and the weights it goes by."""
