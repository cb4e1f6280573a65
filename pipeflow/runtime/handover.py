"""How long a thread of Python waits before it asks another for the interpreter lock.

Ranks in threads let go of the lock in every operation of torch, and want it back microseconds
later. By Python's own rule a thread that finds it taken asks for it only after 5 milliseconds,
and until then the holder may let go and retake it unseen. Small layers spend most of their time
so: asking sooner made a step of them a tenth faster (`make bench`, two ranks, small).
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_SECONDS = 1e-4


class _Users:
    """Who wants it so: the interval belongs to the process, and several engines may run in it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0
        self._before = 0.0

    def enter(self) -> None:
        with self._lock:
            if not self._count:
                self._before = sys.getswitchinterval()
                sys.setswitchinterval(min(self._before, _SECONDS))
            self._count += 1

    def leave(self) -> None:
        with self._lock:
            self._count -= 1
            if not self._count:
                sys.setswitchinterval(self._before)


_USERS = _Users()


@contextmanager
def quick_handover() -> Iterator[None]:
    """Inside, threads ask for the interpreter lock soon; after the last to leave all is as before."""
    _USERS.enter()
    try:
        yield
    finally:
        _USERS.leave()
