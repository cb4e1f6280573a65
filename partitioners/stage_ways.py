"""The ways in which layers can run, and what they sum up to over the layers of a stage.

A stage has one degree and number of replicas; what each of its layers costs in each of its ways then
is a row of numbers. Choosing among them is `pipeflow.partitioners.variants`'.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from pipeflow.graphs.costs import LayerCosts, Variant
from pipeflow.partitioners.atoms import Floats
from pipeflow.partitioners.problem import PartitionProblem


def ways_of(problem: PartitionProblem, layer: LayerCosts) -> tuple[Variant, ...]:
    """The ways in which a layer can run; of a layer without variants the one that its costs describe."""
    if layer.variants:
        return layer.variants
    parameters = layer.parameter_bytes
    state = math.ceil(problem.gradient_ratio * parameters) + math.ceil(problem.optimizer_ratio * parameters)
    return (
        Variant(
            name="",
            seconds=layer.seconds,
            parameter_bytes=parameters,
            resident_bytes=parameters + state,
            saved_bytes=layer.saved_bytes,
        ),
    )


def are_bytes_exact(problem: PartitionProblem) -> bool:
    """Whether a stage holds what `ways_of` says of its layers one by one, and not less.

    What layers without variants need beside their parameters is rounded up once for the whole stage.
    """
    ratios = (problem.gradient_ratio, problem.optimizer_ratio)
    return all(
        float(ratio * layer.parameter_bytes).is_integer()
        for layer in problem.costs.layers
        if not layer.variants
        for ratio in ratios
    )


@dataclass(frozen=True)
class Sharing:
    """Stages of one degree and number of replicas: ways of every layer, and sums over ideals.

    Attributes:
        options: (seconds but for borders, saved bytes, resident bytes) of each way of each layer; None
            where a layer has no way of this degree.
        least: seconds of the stages between all pairs of ideals, at least; inf where there are none.
        members: whether a layer is in an ideal, by [ideal, layer].
        memo, prices: what has been summed up already, by micro-batches in flight.
    """

    degree: int
    replicas: int
    options: list[NDArray[np.float64] | None]
    least: Floats
    members: Floats

    @cached_property
    def _fastest(self) -> Floats:
        rows = [min(map(tuple, o)) if o is not None else (0.0, 0.0, 0.0) for o in self.options]
        sums: Floats = self.members @ np.array(rows)
        return sums

    def fast_bytes(self, starts: NDArray[np.intp], end: int, in_flight: int) -> Floats:
        """What stages hold if every layer runs its fastest way."""
        sums = self._fastest[end] - self._fastest[starts]
        held: Floats = sums[:, 1] * in_flight + sums[:, 2]
        return held

    def least_bytes(self, starts: NDArray[np.intp], end: int, in_flight: int) -> Floats:
        """What stages hold if every layer runs the way that takes least."""
        if in_flight not in self.memo:
            rows = [(o[:, 1] * in_flight + o[:, 2]).min() if o is not None else 0.0 for o in self.options]
            self.memo[in_flight] = self.members @ np.array(rows)
        held: Floats = self.memo[in_flight][end] - self.memo[in_flight][starts]
        return held

    def least_price(self, in_flight: int) -> float:
        """Seconds for each byte that a layer saves by running another way than its fastest, at least."""
        if in_flight not in self.prices:
            least = math.inf
            for rows in self.options:
                if rows is None or len(rows) == 1:
                    continue
                held = rows[:, 1] * in_flight + rows[:, 2]
                fastest = min(range(len(rows)), key=lambda i: tuple(rows[i]))
                saved = held[fastest] - held
                prices = (rows[:, 0] - rows[fastest, 0])[saved > 0] / saved[saved > 0]
                least = min(least, float(prices.min(initial=math.inf)))
            self.prices[in_flight] = least if least < math.inf else 0.0
        return self.prices[in_flight]

    memo: dict[int, Floats] = field(default_factory=dict)
    prices: dict[int, float] = field(default_factory=dict)
