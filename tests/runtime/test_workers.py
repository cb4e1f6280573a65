"""Threads that run the ranks of one process."""

from __future__ import annotations

import sys

from pipeflow.runtime.handover import quick_handover
from pipeflow.runtime.workers import Workers


def test_the_switch_interval_is_short_while_threads_run_and_as_before_after() -> None:
    before = sys.getswitchinterval()
    workers = Workers((0, 1), num_threads=1)
    try:
        inside, errors = workers.run(lambda rank: sys.getswitchinterval())
        _, failed = workers.run(lambda rank: 1 // rank)
    finally:
        workers.close()
    assert not errors
    assert all(interval < before for interval in inside)
    assert [type(error) for error in failed] == [ZeroDivisionError]
    assert sys.getswitchinterval() == before


def test_the_last_of_several_engines_restores_it() -> None:
    before = sys.getswitchinterval()
    with quick_handover():
        with quick_handover():
            pass
        assert sys.getswitchinterval() < before
    assert sys.getswitchinterval() == before
