"""In which order each rank works: one file per schedule, and the table of them.

A schedule is a pure function from placement and micro-batches to a compute order per rank. A new
one is one file here and one row in the table; a plain function can stand wherever a name can.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType, ModuleType

from pipeflow.errors import PlanError
from pipeflow.schedules.forward_only import forward_order
from pipeflow.schedules.gpipe import GPIPE
from pipeflow.schedules.one_forward_one_backward import ONE_FORWARD_ONE_BACKWARD
from pipeflow.schedules.schedule import ComputeOrder, OrderFunction, Schedule, all_in_flight

__all__ = [
    "SCHEDULES",
    "ComputeOrder",
    "OrderFunction",
    "Schedule",
    "check_schedule_of_file",
    "forward_order",
    "resolve_schedule",
]

SCHEDULES: Mapping[str, Schedule] = MappingProxyType({row.name: row for row in (GPIPE, ONE_FORWARD_ONE_BACKWARD)})
"""The schedules that can be named, read-only."""


def resolve_schedule(schedule: str | Schedule | OrderFunction, *, allow: Sequence[str] | None = ()) -> Schedule:
    """The row that a name, a row or a function means.

    A function is taken to keep every micro-batch in flight, unless it comes in a `Schedule`.

    Args:
        schedule: a name in `SCHEDULES`; `module:function` (or `module:row`); a row; or an order
            function.
        allow: import prefixes, whole components, within which a module is imported to find what a
            name means; None where the name is the caller's own, who may name any. What is not
            within is only looked for among the modules that this process has imported already.

    Raises:
        PlanError: no such name, module or attribute, or what it names is no schedule.
    """
    if isinstance(schedule, Schedule):
        return schedule
    if not isinstance(schedule, str):
        return Schedule(_name_of(schedule), schedule, all_in_flight)
    if schedule in SCHEDULES:
        return SCHEDULES[schedule]
    module_name, colon, attribute = schedule.partition(":")
    if not colon or not module_name:
        raise PlanError(
            f"{schedule!r} is no schedule; known are {', '.join(map(repr, SCHEDULES))}, or write 'module:function'"
        )
    found = getattr(_module(schedule, module_name, allow), attribute, None)
    if isinstance(found, Schedule):
        return found
    home = str(getattr(found, "__module__", None)).partition(".")[0]
    if not callable(found) or home != module_name.partition(".")[0] or home in sys.stdlib_module_names:
        what = "nothing" if found is None else f"a {type(found).__name__} of {home}"
        raise PlanError(
            f"schedule {schedule!r} names {what}, not a function or a Schedule that {module_name} defines; write "
            "'module:function'"
        )
    return Schedule(schedule, found, all_in_flight)


def _module(schedule: str, name: str, allow: Sequence[str] | None) -> ModuleType:
    if allow is None or _is_within(name, allow):
        try:
            return importlib.import_module(name)
        except Exception as error:
            raise PlanError(
                f"schedule {schedule!r} cannot be imported ({type(error).__name__}: {error}); write 'module:function'"
            ) from error
    if name not in sys.modules:
        raise PlanError(
            f"schedule {schedule!r} is of a module that this process has not imported, and nothing is imported because "
            f"a plan names it; import {name} before, or load the plan with allow=({name!r},)"
        )
    return sys.modules[name]


def _is_within(name: str, allow: Sequence[str]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in allow)


def check_schedule_of_file(name: str, allow: Sequence[str]) -> None:
    """Refuses a schedule that a file may not name: a file is data, and what it names would be called.

    Args:
        name: as the file has it.
        allow: as for `resolve_schedule`.

    Raises:
        PlanError: it is no row of `SCHEDULES` and not within `allow`, or is not found there.
    """
    if isinstance(allow, str):
        raise PlanError(f"allow={allow!r} is text; give a tuple of import prefixes, for example ({allow!r},)")
    module_name, colon, _ = name.partition(":")
    if colon and not _is_within(module_name, allow):
        raise PlanError(
            f"schedule {name!r} may not be named by a file: files name {', '.join(map(repr, SCHEDULES))}, and "
            f"functions of modules that the reader allows ({', '.join(allow) or 'none'}); if you trust it, load with "
            f"allow=({module_name!r},), or --allow {module_name}"
        )
    resolve_schedule(name, allow=allow)


def _name_of(function: OrderFunction) -> str:
    """`module:function`, by which a plan can name it again."""
    return f"{getattr(function, '__module__', '?')}:{getattr(function, '__qualname__', type(function).__qualname__)}"
