"""Options of the optimizer for some of the parameters, by name pattern.

Patterns are over the whole model's names, so a stage applies those that fit its own parameters
and every layout gives a parameter the same options.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from pipeflow.errors import EngineError

ParameterGroups = Mapping[str, Mapping[str, Any]]
"""Options by pattern, as `fnmatch` reads it, over `<layer>.<name>`; the first that fits holds."""


def check_groups(groups: ParameterGroups | None, names: Iterable[str]) -> ParameterGroups:
    """The groups themselves, if every pattern is of use.

    Raises:
        EngineError: a pattern fits no parameter, or none that an earlier one does not fit.
    """
    left = list(names)
    for pattern in groups or {}:
        fitting = {name for name in left if fnmatchcase(name, pattern)}
        if not fitting:
            raise EngineError(
                f"parameter_groups has {pattern!r}, which fits no parameter that an earlier pattern does not; "
                "patterns are over `<layer>.<name>`, for example '*.bias'"
            )
        left = [name for name in left if name not in fitting]
    return groups or {}


def grouped(parameters: Mapping[str, nn.Parameter], groups: ParameterGroups) -> list[Any]:
    """What an optimizer takes: the parameters themselves, or groups of them with their options."""
    if not groups:
        return list(parameters.values())
    by_pattern: dict[str | None, list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        pattern = next((p for p in groups if fnmatchcase(name, p)), None)
        by_pattern.setdefault(pattern, []).append(parameter)
    return [{"params": held, **(groups[p] if p is not None else {})} for p, held in by_pattern.items()]
