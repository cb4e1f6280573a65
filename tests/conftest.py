"""What every test has: reproducible draws, no deadline on a busy machine, no GPU by surprise."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what is marked `gpu` where there is none; asks torch only if something is marked."""
    if PROFILE == "fuzz":
        # Cases of one parametrized law are items that share a function.
        for function in {id(f): f for item in items if (f := getattr(item, "function", None))}.values():
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
    own = getattr(function, "_hypothesis_internal_use_settings", None)
    if own is not None:
        function._hypothesis_internal_use_settings = settings(own, max_examples=own.max_examples * FUZZ_FACTOR)
