"""Which sizes a layer is tried with, and what its output's sizes say of how they depend on them.

Two numbers of samples tell what grows with the batch. For every length that the layer's inputs
have, further trials change it alone, and one changes all; a size that follows no rule of
`pipeflow.graphs.sizes` is left to be asked for at each length. Knows nothing of torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pipeflow.graphs.sizes import Dim, Length, Size

BATCH_SIZES = (3, 5)
"""Small, different, coprime: a size is a multiple of both only if it grows with the batch."""


@dataclass(frozen=True)
class Trial:
    """One set of sizes.

    Attributes:
        samples: B.
        lengths: by name.
    """

    samples: int
    lengths: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        return ", ".join([f"B={self.samples}", *(f"{name}={size}" for name, size in self.lengths)])


FIXED_LENGTHS = tuple(Trial(samples) for samples in BATCH_SIZES)
"""What a layer without lengths is tried with."""


def choose_trials(lengths: Iterable[Length]) -> tuple[Trial, ...]:
    """The sizes to try for inputs that have these lengths: the first two differ in the batch alone."""
    sizes = {length.name: length.trials(shift) for shift, length in enumerate(lengths)}
    first = {name: several[0] for name, several in sizes.items()}
    points = [first]
    for name, several in sizes.items():
        points.append({**first, name: several[1]})
    points.append({name: several[-1] for name, several in sizes.items()})
    few, more = BATCH_SIZES
    trials = [Trial(few, _pairs(first)), Trial(more, _pairs(first))]
    trials += [Trial(few, _pairs(point)) for point in points[1:-1]]
    return (*trials, Trial(more, _pairs(points[-1])))


def _pairs(sizes: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    return tuple(sizes.items())


def fit(sizes: Sequence[int], trials: Sequence[Trial], name: str) -> Dim:
    """How a size depends on what was tried.

    Args:
        sizes: what came out, one for each trial.
        trials: as `choose_trials` gives them.
        name: of a new length, for a size that follows no rule: its own.

    Raises:
        ValueError: it depends on the batch and is no multiple of it.
    """
    grows = sizes[0] != sizes[1]
    per_sample = [size // trial.samples if grows else size for size, trial in zip(sizes, trials, strict=True)]
    if grows and [n * trial.samples for n, trial in zip(per_sample, trials, strict=True)] != list(sizes):
        raise ValueError("neither fixed nor a multiple of the batch")
    if grows and per_sample[0] != per_sample[1]:
        raise ValueError("neither fixed nor a multiple of the batch")
    points = [dict(trial.lengths) for trial in trials]
    given = [name for name in points[0] if not name.startswith("<")]
    # One length alone before a sum of several, and what was given before what layers made of it.
    candidates = [_one(name, per_sample, points) for name in (*given, *(n for n in points[0] if n not in given))]
    for terms in [*candidates, _sum(given, per_sample, points)]:
        constant = per_sample[0] - sum(times * points[0][name] for name, times in terms.items())
        found = Size(grows, tuple(sorted((name, n) for name, n in terms.items() if n)), constant)
        if all(found.at(t.samples, p) == s for t, p, s in zip(trials, points, sizes, strict=True)):
            return found.dim
    return Size(grows, ((name, 1),), 0).dim


def _one(name: str, sizes: Sequence[int], points: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """The multiple of one length that fits the first two points in which it differs."""
    for size, point in zip(sizes, points, strict=True):
        step = point[name] - points[0][name]
        if step:
            return {name: (size - sizes[0]) // step}
    return {}


def _sum(names: Sequence[str], sizes: Sequence[int], points: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """The multiples of several lengths, from the points that change one of them alone."""
    terms = {}
    for name in names:
        for size, point in zip(sizes, points, strict=True):
            if [n for n in names if point[n] != points[0][n]] == [name]:
                terms[name] = (size - sizes[0]) // (point[name] - points[0][name])
                break
    return terms
