"""The calls of an engine, one after the other: what becomes of each on this rank, and what of the engine.

refused   before anything was sent: this rank says so to those who may wait for it, and goes on
agreed    all ranks raise the same by themselves (NonFiniteError, CheckpointError) and go on
failed    anything else: the other ranks are stopped, and the engine is of no use any more
"""

from __future__ import annotations

import atexit
import json
import os
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any

from pipeflow.errors import CheckpointError, EngineError, LayerFailure, NonFiniteError
from pipeflow.runtime.board import disagreement
from pipeflow.runtime.call import Call, given
from pipeflow.runtime.cut import Cut
from pipeflow.runtime.distributed import DistributedTransport
from pipeflow.runtime.transport import Aborted

_AGREED = (NonFiniteError, CheckpointError)


class Calls:
    """Counts the calls of an engine and knows whether there can be another.

    Args:
        remote: this rank's end, where each rank is a process.
        stop: wakes the ranks of this process, where it holds all.
    """

    def __init__(self, remote: DistributedTransport | None, stop: Callable[[], None]) -> None:
        self._remote = remote
        self._stop = stop
        self._number = 0
        self._failed: str | None = None
        self._is_closed = False
        self._is_spread = False
        self._weights_may_differ = False
        self._process = os.getpid()
        if remote is not None:
            atexit.register(self._exit)

    def check(self, *, weights_alone: bool = False) -> None:
        """Whether the engine can be used.

        Args:
            weights_alone: for what it holds, not for running it.

        Raises:
            EngineError: it has failed, or is closed.
        """
        if self._failed is not None and (not weights_alone or self._weights_may_differ):
            half = "; its weights are not given, as half a step may have been taken" if weights_alone else ""
            raise EngineError(
                f"this engine cannot run any more: {self._failed}{half}; make a new one, and load a checkpoint if it "
                "has trained"
            )
        if self._is_closed and (not weights_alone or self._remote is not None):
            raise EngineError("this engine cannot run any more: it is closed; make a new one")

    def one(self, name: str, step: int, *, weights_alone: bool = False, trains: bool = False) -> OneCall:
        """The next call, for a `with` block. Errors as `check`.

        Args:
            name: of the method.
            step: optimizer steps taken.
            weights_alone: it does not run the model.
            trains: weights may change while it runs.
        """
        self.check(weights_alone=weights_alone)
        call = Call(self._number, name, (), step)
        self._number += 1
        return OneCall(self, call, self._remote, trains=trains, is_harmless=weights_alone and self._remote is None)

    def refuse(self, call: Call, error: BaseException) -> None:
        """This rank does not make the call."""
        if self._remote is not None:
            self._remote.board.refuse(call.number, f"{call.name}()", f"{type(error).__name__}: {error}")

    def spread(self, call: Call, error: BaseException, rank: int) -> None:
        """Lets every other rank know, so that none waits for this one."""
        if self._is_spread:
            return
        self._is_spread = True
        if self._remote is None:
            self._stop()
        elif isinstance(error, Aborted):
            self._remote.abort()
        else:
            self._remote.report(error if isinstance(error, LayerFailure) else _failure(call, error, rank))

    def fail(self, call: Call, error: BaseException, *, trains: bool) -> BaseException:
        """Ends the engine; what to raise for the error."""
        rank = -1 if self._remote is None else self._remote.rank
        self.spread(call, error, rank)
        if isinstance(error, Aborted):
            reported = None if self._remote is None else self._remote.failure(call)
            error = reported or LayerFailure(
                rank=rank,
                step=call.step,
                phase="transport",
                original=f"a peer is gone or sent something else than planned: {error}",
            )
        self._failed = str(error) or type(error).__name__
        self._weights_may_differ |= trains or self._remote is not None
        return error

    def close(self, because: BaseException | None = None) -> None:
        """There is no other call; ranks that wait for one are told."""
        if self._remote is not None:
            self._leave(f"rank {self._remote.rank} has closed its engine", because)
            atexit.unregister(self._exit)
        self._is_closed = True

    def _exit(self) -> None:
        """The process ends, and nobody has closed the engine."""
        assert self._remote is not None
        if os.getpid() != self._process:
            return  # a fork of it, which has the watch's thread and the store's connection in name alone
        self._leave(f"the process of rank {self._remote.rank} has ended", getattr(sys, "last_value", None))
        self._remote.watch.close()

    def _leave(self, what: str, because: BaseException | None) -> None:
        if self._remote is not None and self._failed is None and not self._is_closed:
            after = "" if because is None else f" after {type(because).__name__}: {because}"
            self._remote.board.refuse(self._number, "any other call", f"EngineError: {what}{after}")


class OneCall:
    """A call that is being made."""

    def __init__(
        self, calls: Calls, call: Call, remote: DistributedTransport | None, *, trains: bool, is_harmless: bool
    ) -> None:
        self.call = call
        self._calls = calls
        self._remote = remote
        self._trains = trains
        self._is_harmless = is_harmless
        self._has_begun = False

    def begin(self, cut: Cut | None = None, **arguments: Any) -> None:
        """Nothing is refused any more: other ranks wait for this one from now on, or it for them.

        Args:
            cut: of the batch.
            arguments: of the call, None for those that are as ever.
        """
        self.call.cut = cut
        self.call.arguments = given(arguments)
        self._has_begun = True
        if self._remote is not None:
            self._remote.watch.open(self.call)

    def meet(self, **arguments: Any) -> None:
        """Begins a call that is no step: ranks first hear whether all were asked for it.

        Raises:
            LayerFailure: they were not.
        """
        self.begin(**arguments)
        if self._remote is not None:
            mine = {"asked": self.call.asked, "batch": ""}
            heard = [json.loads(text) for text in self._remote.meeting.hear(json.dumps(mine))]
            if any(entry != mine for entry in heard):
                raise disagreement(self.call, dict(enumerate(heard)))

    def spread(self, error: BaseException, rank: int) -> None:
        """Lets every other rank know of what one here raised, at once."""
        self._calls.spread(self.call, error, rank)

    def __enter__(self) -> OneCall:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None or self._is_harmless or (self._has_begun and isinstance(error, _AGREED)):
                return
            if not self._has_begun:
                self._calls.refuse(self.call, error)
            elif (told := self._calls.fail(self.call, error, trains=self._trains)) is not error:
                raise told from None
        finally:
            if self._remote is not None:
                self._remote.watch.rest()


def _failure(call: Call, error: BaseException, rank: int) -> LayerFailure:
    phase = "interrupt" if isinstance(error, KeyboardInterrupt | SystemExit) else "transport"
    return LayerFailure(
        rank=rank,
        step=call.step,
        phase=phase,
        original=f"{type(error).__name__}: {error}".rstrip(": ") + f" during {call}",
    )
