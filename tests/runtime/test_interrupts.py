"""Ctrl-C and exits while a step runs: they surface where they happen, at once, and nobody is left waiting."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

import pipeflow as pf
from pipeflow.errors import EngineError, LayerFailure
from pipeflow.runtime.watch import CtrlC
from pipeflow.testing import run_ranks
from tests.runtime.models import bomb_batch, make_plan, mean_square, sgd
from tests.runtime.test_one_rank import LIMIT, check_in_time, seen

ROOT = Path(__file__).resolve().parents[2]


class Trap:
    """A layer that does what it is told on a sample beyond 100."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __call__(self, x: Tensor) -> Tensor:
        if type(x) is Tensor and bool(x.abs().max() > 100):
            if self.what == "interrupt":
                raise KeyboardInterrupt
            if self.what == "exit":
                sys.exit("enough")
            time.sleep(float(self.what))
        return x * 1.0


def trap_engine(what: str, **options: Any) -> pf.Engine:
    """Three stages; the middle one is a trap."""
    graph = pf.LayerGraph("trap")
    h = graph.input("x", ("B", 4))
    h = graph.add("first", pf.lazy(_linear), h)
    h = graph.add("trap", Trap(what), h)
    h = graph.add("third", pf.lazy(_linear), h)
    graph.loss("loss", mean_square, h)
    plan = make_plan(graph, [(["first"], (0,)), (["trap"], (1,)), (["third", "loss"], (2,))])
    return pf.Engine(graph, plan, sgd, **options)


def _linear() -> nn.Module:
    layer = nn.Linear(4, 4)
    nn.init.eye_(layer.weight)
    return layer


def press(seconds: float) -> None:
    """Ctrl-C in a while."""
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT))
    timer.daemon = True
    timer.start()


ENDS: list[tuple[str, type[BaseException], str]] = [
    ("interrupt", KeyboardInterrupt, "KeyboardInterrupt (forward on rank 1, stage 1, layer 'trap', micro-batch 1"),
    ("exit", SystemExit, "SystemExit: enough (forward on rank 1, stage 1, layer 'trap', micro-batch 1"),
]


def stopped_in_a_layer(rank: int) -> list[tuple[BaseException | None, float]]:
    cases = []
    for what, _, _ in ENDS:
        with trap_engine(what) as engine:
            engine.step(bomb_batch(None))
            cases.append(seen(lambda: engine.step(bomb_batch(1))))
    return cases


def test_what_stops_a_process_in_a_layer_surfaces_there_and_the_others_hear_of_it() -> None:
    results = run_ranks(stopped_in_a_layer, 3)
    for rank, result in enumerate(results):
        assert result.error is None, result.trace
        for (_, kind, words), (error, _) in zip(ENDS, result.value, strict=True):
            if rank == 1:
                assert type(error) is kind
            else:
                assert isinstance(error, LayerFailure)
                assert words in str(error)
    check_in_time([result.value for result in results])


@pytest.mark.parametrize(("what", "kind", "words"), ENDS)
def test_what_stops_a_thread_in_a_layer_surfaces(what: str, kind: type[BaseException], words: str) -> None:
    with trap_engine(what) as engine:
        engine.step(bomb_batch(None))
        with pytest.raises(kind):
            engine.step(bomb_batch(1))
        with pytest.raises(EngineError, match="cannot run any more"):
            engine.step(bomb_batch(None))


SLEEP = 5.0


def pressed_while_waiting(rank: int) -> tuple[BaseException | None, float]:
    """Rank 1 is busy in a layer; rank 0, which waits for it inside of gloo, is told to stop."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    engine = trap_engine(str(SLEEP))
    engine.step(bomb_batch(None))
    if rank == 0:
        press(1.0)
    start = time.time()
    error, end = seen(lambda: engine.step(bomb_batch(1)))
    return error, end - start


def test_ctrl_c_is_heard_by_a_rank_that_waits_for_others_and_by_those() -> None:
    results = run_ranks(pressed_while_waiting, 3)
    assert isinstance(results[0].value[0], KeyboardInterrupt), results[0].trace
    assert results[0].value[1] < 1.0 + LIMIT
    for rank in (1, 2):
        error, seconds = results[rank].value
        assert isinstance(error, LayerFailure)
        assert "KeyboardInterrupt" in str(error)
        assert "rank 0" in str(error)
        assert seconds < (SLEEP if rank == 1 else 1.0) + LIMIT


def test_whoever_wants_to_hear_of_signals_from_within_a_call_on_still_does() -> None:
    read, write = os.pipe()
    os.set_blocking(write, False)
    ctrl_c = CtrlC()
    try:
        ctrl_c.arm()
        signal.set_wakeup_fd(write)
        ctrl_c.disarm()
        assert signal.set_wakeup_fd(-1) == write
    finally:
        ctrl_c.close()
        os.close(read)
        os.close(write)


SCRIPT = """
import time
from tests.runtime.test_interrupts import press, trap_engine
from tests.runtime.models import bomb_batch

engine = trap_engine("120", transport="threads")
engine.step(bomb_batch(None))
press(0.5)
start = time.monotonic()
try:
    engine.step(bomb_batch(1))
except KeyboardInterrupt:
    print(f"stopped after {time.monotonic() - start:.1f} s")
try:
    engine.step(bomb_batch(None))
except Exception as error:
    print(type(error).__name__)
engine.close()
print("end")
"""


def test_ctrl_c_stops_a_process_of_threads_and_nothing_keeps_it() -> None:
    done = subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    out, problems = done.communicate(timeout=60)  # a layer sleeps for two minutes from now
    assert done.returncode == 0, problems
    first, second, last = out.splitlines()
    assert float(first.split()[2]) < 0.5 + LIMIT
    assert (second, last) == ("EngineError", "end")
