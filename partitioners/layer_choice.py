"""Layers that a caller names, by a rule or by patterns, and costs in which they keep nothing.

For choices that stand beside a cut: what is recomputed, what is offloaded.
"""

from __future__ import annotations

from collections.abc import Collection
from fnmatch import fnmatchcase

from pipeflow.errors import PlanError
from pipeflow.graphs.costs import GraphCosts


def resolve_layers(what: str, choice: str | Collection[str], costs: GraphCosts, rules: str = "") -> frozenset[str]:
    """The layers that are meant by "never", "always", or names with `*` and `?`.

    Args:
        what: the option, for errors.
        rules: further words that the option takes, for errors.

    Raises:
        PlanError: a word that is no rule, or a pattern that fits no layer.
    """
    names = [layer.name for layer in costs.layers]
    if choice == "never":
        return frozenset()
    if choice == "always":
        return frozenset(names)
    if isinstance(choice, str):
        raise PlanError(f"{what}={choice!r}; give 'never', 'always'{rules} or a list of layer names")
    chosen: set[str] = set()
    for pattern in choice:
        fitting = [name for name in names if fnmatchcase(name, pattern)]
        if not fitting:
            raise PlanError(f"{what} names {pattern!r}, which fits no layer of {costs.name!r}; layers are {names}")
        chosen.update(fitting)
    return frozenset(chosen)


def saving_nothing(costs: GraphCosts, layers: Collection[str]) -> GraphCosts:
    """The costs as if the layers saved nothing for backward."""
    return costs.model_copy(
        update={
            "layers": tuple(
                layer.model_copy(update={"saved_bytes": 0}) if layer.name in layers else layer for layer in costs.layers
            )
        }
    )
