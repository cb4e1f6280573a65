"""What every test has: reproducible draws, no deadline on a busy machine, no GPU by surprise."""

from __future__ import annotations

import functools
import importlib.util
import os
import time
from collections.abc import Generator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# One thread in every process, before torch is loaded: kernels round by the number of threads, and a process per
# rank has its share of the cores while the reference beside it would have all.
os.environ["OMP_NUM_THREADS"] = "1"

settings.register_profile(
    "suite",
    derandomize=True,
    deadline=None,
    # Drawing a layer graph is slower than drawing an integer; the suite's length is watched as a whole.
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("fuzz", parent=settings.get_profile("suite"), derandomize=False, print_blob=True)
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "suite")
settings.load_profile(PROFILE)

FUZZ_FACTOR = int(os.environ.get("FUZZ_FACTOR", "20"))
"""How many times more examples `make fuzz` draws than the tests do."""
FUZZ_SECONDS = float(os.environ.get("FUZZ_SECONDS", "300"))
"""How long one law may go on drawing them."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what is marked `gpu` where there is none; asks torch only if something is marked."""
    if PROFILE == "fuzz":
        # Cases of one parametrized law are items that share a function.
        for function in {id(f): f for item in items if (f := getattr(item, "function", None))}.values():
            if hasattr(function, "hypothesis"):
                _draw_more(function)
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    if importlib.util.find_spec("torch") is not None:
        import torch

        if torch.cuda.is_available():
            return
    for item in marked:
        item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and this machine has none"))


def _draw_more(function: Any) -> None:
    """Multiplies the examples of a law. What a law says of itself wins over a profile, so it is changed there."""
    own = function._hypothesis_internal_use_settings
    function._hypothesis_internal_use_settings = settings(own, max_examples=own.max_examples * FUZZ_FACTOR)
    inner = function.hypothesis.inner_test

    @functools.wraps(inner)
    def budgeted(*args: Any, **kwargs: Any) -> None:
        inner(*args, **kwargs)
        _RUN.num_cases += 1
        if time.monotonic() > _RUN.end:  # after the case, whose draws hypothesis expects to be whole
            pytest.skip(_TIME_IS_UP)  # which hypothesis passes on at once

    function.hypothesis.inner_test = budgeted


_TIME_IS_UP = "the law has had its seconds"


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """A law whose time is up has held so far, which the summary counts: it is not left out."""
    try:
        return (yield)
    except pytest.skip.Exception as skip:
        if skip.msg != _TIME_IS_UP:
            raise
        return True


class _Run:
    """The law that runs now: when it has to stop drawing, and how many cases held."""

    def __init__(self) -> None:
        self.end = 0.0
        self.num_cases = 0


_RUN = _Run()
_CASES_BY_LAW: dict[str, int] = {}


def pytest_runtest_setup(item: pytest.Item) -> None:
    _RUN.end, _RUN.num_cases = time.monotonic() + FUZZ_SECONDS, 0


def pytest_runtest_teardown(item: pytest.Item) -> None:
    if PROFILE == "fuzz":
        item.user_properties.append(("cases", _RUN.num_cases))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Where laws run in several processes, what each has counted comes with its report."""
    if report.when == "teardown":
        for key, count in report.user_properties:
            if key == "cases":
                _CASES_BY_LAW[report.nodeid] = int(str(count))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if PROFILE == "fuzz":
        for law, count in sorted(_CASES_BY_LAW.items()):
            terminalreporter.write_line(f"{count:7} cases of {law}")
        total = sum(_CASES_BY_LAW.values())
        terminalreporter.write_line(f"{total:7} cases held, at most {FUZZ_SECONDS:g} s for each law")
