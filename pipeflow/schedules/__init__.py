"""In which order each rank works: one file per schedule, and the table of them.

A schedule is a pure function from placement and micro-batches to a compute order per rank. A new
one is one file here and one row in the table; a plain function can stand wherever a name can.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import MappingProxyType

from pipeflow.errors import PlanError
from pipeflow.schedules.forward_only import forward_order
from pipeflow.schedules.gpipe import GPIPE
from pipeflow.schedules.one_forward_one_backward import ONE_FORWARD_ONE_BACKWARD
from pipeflow.schedules.schedule import ComputeOrder, OrderFunction, Schedule, all_in_flight

__all__ = ["SCHEDULES", "ComputeOrder", "OrderFunction", "Schedule", "forward_order", "resolve_schedule"]

SCHEDULES: Mapping[str, Schedule] = MappingProxyType({row.name: row for row in (GPIPE, ONE_FORWARD_ONE_BACKWARD)})
"""The schedules that can be named, read-only."""


def resolve_schedule(schedule: str | Schedule | OrderFunction) -> Schedule:
    """The row that a name, a row or a function means.

    A function is taken to keep every micro-batch in flight, unless it comes in a `Schedule`.

    Args:
        schedule: a name in `SCHEDULES`; `module:function` (or `module:row`), which is imported; a
            row; or an order function.

    Raises:
        PlanError: no such name, module or attribute, or what it names is not callable.
    """
    if isinstance(schedule, Schedule):
        return schedule
    if not isinstance(schedule, str):
        return Schedule(_name_of(schedule), schedule, all_in_flight)
    if schedule in SCHEDULES:
        return SCHEDULES[schedule]
    module_name, colon, attribute = schedule.partition(":")
    if not colon:
        raise PlanError(
            f"{schedule!r} is no schedule; known are {', '.join(map(repr, SCHEDULES))}, or write 'module:function'"
        )
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise PlanError(f"schedule {schedule!r} cannot be imported ({error}); write 'module:function'") from error
    if isinstance(found, Schedule):
        return found
    if not callable(found):
        raise PlanError(f"schedule {schedule!r} names a {type(found).__name__}, not a function or a Schedule")
    return Schedule(schedule, found, all_in_flight)


def _name_of(function: OrderFunction) -> str:
    """`module:function`, by which a plan can name it again."""
    return f"{getattr(function, '__module__', '?')}:{getattr(function, '__qualname__', type(function).__qualname__)}"
