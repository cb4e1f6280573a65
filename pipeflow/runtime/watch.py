"""The watch of a rank: a thread that looks whether all is well once a call takes long.

A call that does not take long costs the watch nothing, and the watch it next to nothing. It also sees
Ctrl-C while the rank's own thread waits inside of a collective, where Python does not look for signals:
the C part of Python's handler writes a byte to a pipe at once [1].

Python ends daemon threads that come back from C code once it is finalized by unwinding their stacks, which C++
does not stand: "terminate called without an active exception". So none may be left by then [2].
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from pipeflow.errors import LayerFailure
from pipeflow.runtime.board import Board
from pipeflow.runtime.call import Call

_ENDING = 5.0  # seconds to wait for the thread to end
_INTERVAL = 0.5  # seconds after which a call is long enough to ask whether the ranks agree


class Watch:
    """Looks after the calls of one engine.

    Args:
        board: where the ranks of the engine post.
        rank: this one.
        report: ends the engine on all ranks; called from the watch's thread.
    """

    def __init__(self, board: Board, rank: int, report: Callable[[LayerFailure], None]) -> None:
        self._board = board
        self._rank = rank
        self._report = report
        self._now: tuple[Call, float] | None = None
        self._closed = threading.Event()
        self._ctrl_c = CtrlC()
        self._thread = threading.Thread(target=self._run, name=f"pipeflow-watch-{rank}", daemon=True)
        self._thread.start()

    @property
    def call(self) -> Call | None:
        """The call that is being made."""
        now = self._now
        return None if now is None else now[0]

    def open(self, call: Call) -> None:
        """A call begins: from now on other ranks wait for this one, or it for them."""
        self._now = (call, time.monotonic())
        self._ctrl_c.arm()

    def rest(self) -> None:
        """The call is over."""
        self._ctrl_c.disarm()
        self._now = None

    def close(self) -> None:
        """Ends the thread, and waits until it has: at exit, one within a call of the store ends the process [2]."""
        self._closed.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(_ENDING)

    def _run(self) -> None:
        while not self._closed.wait(_INTERVAL):
            now = self._now
            if now is None:
                continue
            call, started = now
            failure = self._interrupted(call)
            if failure is None and time.monotonic() - started >= _INTERVAL:
                with suppress(RuntimeError):
                    self._board.post(call)
                    # What a rank far away has reported: one between may be busy, and not break its groups yet.
                    failure = self._board.failure() or self._board.disagreement(call)
            if failure is not None and self._now is now:
                self._report(failure)
                break
        self._closed.wait()
        self._ctrl_c.close()

    def _interrupted(self, call: Call) -> LayerFailure | None:
        if not self._ctrl_c.was_pressed():
            return None
        return LayerFailure(
            rank=self._rank,
            step=call.step,
            phase="interrupt",
            original=f"KeyboardInterrupt: Ctrl-C during {call}",
        )


class CtrlC:
    """Whether Ctrl-C was pressed while armed [1]. Does nothing where it would be in another's way."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)
        self._is_armed = False

    def arm(self) -> None:
        """Begins to look, unless this is not the main thread or somebody else looks."""
        if threading.current_thread() is not threading.main_thread():
            return
        self.was_pressed()  # before: that was raised then
        before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        if before != -1:
            signal.set_wakeup_fd(before)
        self._is_armed = before == -1

    def disarm(self) -> None:
        """Ends it."""
        if self._is_armed:
            self._is_armed = False
            current = signal.set_wakeup_fd(-1)
            if current not in (-1, self._write):  # set during the call, and to stay
                signal.set_wakeup_fd(current)

    def was_pressed(self) -> bool:
        """Whether it was, since this was asked last, and Python will raise KeyboardInterrupt for it."""
        try:
            signals = os.read(self._read, 4096)
        except BlockingIOError:
            return False
        return signal.SIGINT in signals and signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def close(self) -> None:
        """Lets go of the pipe."""
        os.close(self._read)
        os.close(self._write)
