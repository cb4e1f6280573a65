"""Options of the optimizer for some of the parameters, by name pattern.

Patterns are over the whole model's names, so a stage applies those that fit its own parameters
and every layout gives a parameter the same options. A parameter that several layers use goes by
each of its names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from pipeflow.errors import EngineError
from pipeflow.graphs.layer_graph import LayerGraph

ParameterGroups = Mapping[str, Mapping[str, Any]]
"""Options by pattern, as `fnmatch` reads it, over `<layer>.<name>`; the first that fits holds."""


@dataclass(frozen=True, slots=True)
class Grouping:
    """Which options hold for which parameter.

    Attributes:
        options_by_pattern: as they were given.
        pattern_by_name: of the parameters that a pattern fits, by their names in the state.
    """

    options_by_pattern: ParameterGroups = field(default_factory=dict)
    pattern_by_name: Mapping[str, str] = field(default_factory=dict)

    def options_of(self, name: str) -> Mapping[str, Any]:
        """What is asked for a parameter."""
        pattern = self.pattern_by_name.get(name)
        return {} if pattern is None else self.options_by_pattern[pattern]

    def grouped(self, parameters: Mapping[str, nn.Parameter]) -> list[Any]:
        """What an optimizer takes: the parameters themselves, or groups of them with their options."""
        if not self.options_by_pattern:
            return list(parameters.values())
        by_pattern: dict[str | None, tuple[list[nn.Parameter], Mapping[str, Any]]] = {}
        for name, parameter in parameters.items():
            held, _ = by_pattern.setdefault(self.pattern_by_name.get(name), ([], self.options_of(name)))
            held.append(parameter)
        return [{"params": held, **options} for held, options in by_pattern.values()]

    def check_made(self, optimizer: torch.optim.Optimizer, trained: Mapping[str, nn.Parameter]) -> None:
        """Whether an optimizer has taken the options of its parameters.

        Raises:
            EngineError: it has no such option, or its group has another value of it.
        """
        group_by_id = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        kind = type(optimizer).__name__
        for name, parameter in trained.items():
            group = group_by_id[id(parameter)]
            for option, value in self.options_of(name).items():
                if option not in optimizer.defaults:
                    raise EngineError(
                        f"parameter_groups has {option!r} for {name!r}, which is no option of {kind}; it has "
                        f"{', '.join(optimizer.defaults)}"
                    )
                if group[option] is not value and group[option] != value:
                    raise EngineError(
                        f"parameter_groups has {option}={value} for {name!r}, but the optimizer was made with "
                        f"{option}={group[option]}; the factory is given groups with their options: hand them on as "
                        f"they are, as in lambda groups: {kind}(groups)"
                    )


def check_groups(groups: ParameterGroups | None, graph: LayerGraph) -> Grouping:
    """The groups, resolved for the parameters of a graph.

    Raises:
        EngineError: a pattern fits no parameter, or none that an earlier one does not fit; or the
            names of a shared parameter fit patterns with unlike options.
    """
    if not groups:
        return Grouping()
    if not isinstance(groups, Mapping) or not all(isinstance(options, Mapping) for options in groups.values()):
        raise EngineError(
            f"parameter_groups={groups!r}; give options by pattern, for example {{'*.bias': {{'weight_decay': 0.0}}}}"
        )
    names_by_first = {group[0]: group for group in graph.shared_parameters}
    pattern_by_name: dict[str, str] = {}
    used: set[str] = set()
    for name in graph.parameters:
        fitting = _fitting(groups, names_by_first.get(name, (name,)))
        used.update(fitting.values())
        for alias, pattern in fitting.items():
            first = pattern_by_name.setdefault(name, pattern)
            if dict(groups[first]) != dict(groups[pattern]):
                raise EngineError(
                    f"parameter_groups has {first!r} and {pattern!r} with unlike options, and {name!r} and {alias!r}, "
                    "which they fit, are one parameter; give both the same options, or put a pattern that fits both "
                    "names before"
                )
    if unused := [pattern for pattern in groups if pattern not in used]:
        raise EngineError(
            f"parameter_groups has {unused[0]!r}, which fits no parameter that an earlier pattern does not; "
            "patterns are over `<layer>.<name>`, for example '*.bias'"
        )
    return Grouping(groups, pattern_by_name)


def _fitting(groups: ParameterGroups, names: Iterable[str]) -> dict[str, str]:
    """The first pattern that fits, for each of the names that one fits."""
    fitting = {name: next((p for p in groups if fnmatchcase(name, p)), None) for name in names}
    return {name: pattern for name, pattern in fitting.items() if pattern is not None}
