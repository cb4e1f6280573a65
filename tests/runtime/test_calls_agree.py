"""Between processes: ranks that are asked for different things all end within seconds, and hear who was asked what."""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._C._distributed_c10d import HashStore

import pipeflow as pf
from pipeflow.errors import BatchError, EngineError, LayerFailure
from pipeflow.runtime import distributed, watch
from pipeflow.runtime.board import Board
from pipeflow.runtime.call import Call
from pipeflow.runtime.cut import even_cut
from pipeflow.testing import run_ranks
from tests.runtime.models import THREE_STAGES, Stages, forked_batch, forked_graph, make_plan, sgd
from tests.runtime.test_decoding import decoder
from tests.runtime.test_one_rank import check_in_time, seen

Act = Callable[[pf.Engine], Any]

REPLICATED: Stages = [(["a", "b", "c", "d", "e", "p", "s", "loss"], (0, 1, 2))]
"""No data travels between these ranks: only sums of gradients, and losses."""

BATCH = forked_batch(8)


def step(engine: pf.Engine) -> None:
    engine.step(BATCH)


def evaluate(engine: pf.Engine) -> None:
    engine.evaluate(BATCH)


def predict(engine: pf.Engine) -> None:
    engine.predict({"x": BATCH["x"]})


def predict_other(engine: pf.Engine) -> None:
    engine.predict({"x": BATCH["x"]}, ["d"])


def accumulate(engine: pf.Engine) -> None:
    engine.accumulate(BATCH)


def accumulate_half(engine: pf.Engine) -> None:
    engine.accumulate(BATCH, share=0.5)


def state(engine: pf.Engine) -> None:
    engine.state_dict()


def save(engine: pf.Engine) -> None:
    engine.save("/nowhere/that/can/be/written")


def load_state(engine: pf.Engine) -> None:
    engine.load_state_dict({})


def measured(engine: pf.Engine) -> None:
    engine.measured()


def close(engine: pf.Engine) -> None:
    engine.close()
    time.sleep(1)  # alive, with all its connections


def leave_after_an_error(engine: pf.Engine) -> None:
    with engine:
        raise KeyError("no such file")


CASES: list[tuple[Act, Act, tuple[str, str]]] = [
    (step, evaluate, ("step()", "evaluate()")),
    (step, predict, ("step()", "predict(outputs=('s',))")),
    (step, accumulate, ("step()", "accumulate()")),
    (accumulate, accumulate_half, ("accumulate()", "accumulate(share=0.5)")),
    (predict_other, predict, ("predict(outputs=('d',))", "predict(outputs=('s',))")),
    (step, state, ("step()", "state_dict()")),
    (save, step, ("save()", "step()")),
    (measured, evaluate, ("measured()", "evaluate()")),
    (state, load_state, ("state_dict()", "load_state_dict()")),
    (close, step, ("rank 0 has closed its engine", "step()")),
]


def different_calls(rank: int, stages: Stages, num_cases: int) -> list[tuple[BaseException | None, float]]:
    """What this rank raises where rank 0 is asked for one thing and the others for another."""
    watch._INTERVAL = 0.1  # there are many cases
    cases = []
    graph = forked_graph()
    for first, others, _ in CASES[:num_cases]:
        with pf.Engine(graph, make_plan(graph, stages), sgd, measure=True) as engine:
            step(engine)
            cases.append(seen(lambda act=first if rank == 0 else others: act(engine)))  # type: ignore[misc]
            if cases[-1][0] is not None:
                with pytest.raises(EngineError, match="cannot run any more"):
                    step(engine)
    return cases


@pytest.mark.parametrize(
    ("stages", "num_cases"), [(THREE_STAGES, len(CASES)), (REPLICATED, 4)], ids=["stages", "replicas"]
)
def test_ranks_that_are_asked_for_different_things_are_told_what_each_was_asked(stages: Stages, num_cases: int) -> None:
    results = run_ranks(different_calls, 3, stages, num_cases)
    for rank, result in enumerate(results):
        assert result.error is None, result.trace
        for (first, _, (one, other)), (error, _) in zip(CASES[:num_cases], result.value, strict=True):
            if first is close and rank == 0:
                assert error is None
                continue
            assert isinstance(error, LayerFailure), (one, other, error)
            assert error.phase == "call"
            for words in (one, other):
                assert words in str(error), (one, other)
            assert error.step == 1
    check_in_time([result.value for result in results])


def summed_losses(rank: int) -> tuple[BaseException | None, float]:
    """As in a job of many ranks, whose losses are added up by a collective that knows no tags."""
    distributed._DIRECT_RANKS = 0
    graph = forked_graph()
    with pf.Engine(graph, make_plan(graph, REPLICATED), sgd) as engine:
        accumulate(engine)
        return seen(lambda: (accumulate if rank else accumulate_half)(engine))


def test_losses_of_different_calls_are_not_added_up() -> None:
    for result in run_ranks(summed_losses, 3):
        error, _ = result.value
        assert isinstance(error, LayerFailure), result.trace
        assert "accumulate() as call 1" in str(error)
        assert "accumulate(share=0.5) as call 1" in str(error)


def phased_graph() -> pf.LayerGraph:
    graph = forked_graph()
    graph.phase("head", losses=["loss"], trains=["e.*", "p.*"])
    graph.phase("body", losses=["loss"], trains=["a.*", "c.*"])
    return graph


def other_phases_and_sessions(rank: int) -> list[tuple[BaseException | None, float]]:
    """Rank 0 steps in another phase; it makes a prediction beside a session; it has two sessions, in another order."""
    watch._INTERVAL = 0.1
    graph = phased_graph()
    with pf.Engine(graph, make_plan(graph, THREE_STAGES), sgd) as engine:
        engine.step(BATCH, phase="head")
        cases = [seen(lambda: engine.step(BATCH, phase="body" if rank == 0 else "head"))]
    graph = decoder()
    tokens = torch.zeros(4, 3, dtype=torch.int64)
    plan = make_plan(
        graph, [(["embed", "place"], (0,)), (list(graph.layers)[2:4], (1,)), (list(graph.layers)[4:], (2,))]
    )
    with pf.Engine(graph, plan) as engine, engine.decode(4) as session:
        session.step({"tokens": tokens})
        act = engine.predict if rank == 0 else session.step
        cases.append(seen(lambda: act({"tokens": tokens})))
    with pf.Engine(graph, plan) as engine, engine.decode(4) as first, engine.decode(4) as second:
        act = second.step if rank == 0 else first.step
        cases.append(seen(lambda: act({"tokens": tokens})))
    return cases


def test_phases_and_decode_sessions_must_be_the_same_on_all_ranks() -> None:
    results = run_ranks(other_phases_and_sessions, 3)
    words = (
        ("step(phase='body')", "step(phase='head')"),
        ("predict(outputs=('logits',))", "step='1 of session 0'"),
        ("step='0 of session 1'", "step='0 of session 0'"),
    )
    for result in results:
        assert result.error is None, result.trace
        for texts, (error, _) in zip(words, result.value, strict=True):
            assert isinstance(error, LayerFailure), error
            for text in texts:
                assert text in str(error)
    check_in_time([result.value for result in results])


def another_step(rank: int) -> tuple[BaseException | None, float]:
    graph = forked_graph()
    engine = pf.Engine(graph, make_plan(graph, THREE_STAGES), sgd)
    step(engine)
    if rank == 1:
        return seen(lambda: leave_after_an_error(engine))
    return seen(lambda: step(engine))


def test_ranks_that_wait_for_one_that_left_hear_why_it_did() -> None:
    results = run_ranks(another_step, 3)
    for rank in (0, 2):
        error, _ = results[rank].value
        assert isinstance(error, LayerFailure), results[rank].trace
        assert "rank 1 has closed its engine after KeyError: 'no such file'" in str(error)
    check_in_time([[result.value] for result in results])


def ended_process(rank: int) -> tuple[BaseException | None, float]:
    graph = forked_graph()
    engine = pf.Engine(graph, make_plan(graph, THREE_STAGES), sgd)
    step(engine)
    if rank == 1:
        atexit._run_exitfuncs()  # as at the end of a script
        os._exit(0)
    return seen(lambda: step(engine))


def test_ranks_that_wait_for_a_process_that_has_ended_hear_so() -> None:
    results = run_ranks(ended_process, 3)
    for rank in (0, 2):
        error, _ = results[rank].value
        assert isinstance(error, LayerFailure), results[rank].trace
        assert "the process of rank 1 has ended" in str(error)


def forked_process(rank: int) -> float:
    graph = forked_graph()
    engine = pf.Engine(graph, make_plan(graph, THREE_STAGES), sgd)
    step(engine)
    if rank == 1:
        child = os.fork()
        if not child:
            atexit._run_exitfuncs()  # as where the fork ends by sys.exit
            os._exit(0)
        os.waitpid(child, 0)
        time.sleep(1)  # long enough for the watches of the others
    return engine.step(BATCH).loss


def test_a_fork_that_ends_is_not_taken_for_the_rank() -> None:
    for result in run_ranks(forked_process, 3):
        assert result.error is None, result.trace


def closed_session(rank: int) -> list[tuple[BaseException | None, float]]:
    """Rank 1 has closed its session, and lives on."""
    graph = decoder()
    tokens = torch.zeros(4, 3, dtype=torch.int64)
    plan = make_plan(
        graph, [(["embed", "place"], (0,)), (list(graph.layers)[2:4], (1,)), (list(graph.layers)[4:], (2,))]
    )
    engine = pf.Engine(graph, plan)
    session = engine.decode(4)
    session.step({"tokens": tokens})
    if rank == 1:
        session.close()
    case = seen(lambda: session.step({"tokens": tokens}))
    time.sleep(5 if rank == 1 else 0)
    return [case]


def test_a_session_closed_on_one_rank_ends_the_others() -> None:
    results = run_ranks(closed_session, 3)
    for result in results:
        assert result.error is None, result.trace
        assert "this decode session is closed" in str(result.value[0][0])
    check_in_time([result.value for result in results])


def test_long_calls_leave_one_key_a_rank_in_the_store_and_none_is_deleted() -> None:
    store = HashStore()
    ends = [Board(store, rank, 2) for rank in range(2)]
    for number in range(20):
        for end in ends:
            end.post(Call(number, "step", (), number))
    assert store.num_keys() == 2
    assert ends[1].disagreement(Call(19, "step", (), 19)) is None
    assert ends[1].disagreement(Call(18, "evaluate", (), 18)) is None  # nobody says anything of that any more
    assert "evaluate()" in str(ends[1].disagreement(Call(19, "evaluate", (), 19)))


def refused_alike(rank: int) -> float:
    """All refuse the same batch, some of them late, and train on."""
    graph = forked_graph()
    with pf.Engine(graph, make_plan(graph, THREE_STAGES), sgd) as engine:
        time.sleep(0.7 * rank)  # long enough for the watch of a rank that has gone on
        for _ in range(2):
            with pytest.raises(BatchError, match="different numbers of samples"):
                engine.step({"x": BATCH["x"], "y": BATCH["y"][:3]})
            with pytest.raises(EngineError, match="'nowhere' is computed by no layer"):
                engine.predict(BATCH, ["nowhere"])
        return engine.step(BATCH).loss


def threads_after_exit(rank: int) -> list[str]:
    graph = forked_graph()
    engine = pf.Engine(graph, make_plan(graph, THREE_STAGES), sgd)
    step(engine)
    atexit._run_exitfuncs()
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("pipeflow-watch")]


def test_no_watch_is_left_when_a_process_ends_without_closing_its_engine() -> None:
    """One process in three aborted: Python unwound the watch's thread, which C++ does not stand."""
    for result in run_ranks(threads_after_exit, 3):
        assert result.error is None, result.trace
        assert result.value == []


def test_a_batch_that_all_ranks_refuse_ends_nothing() -> None:
    expected = pf.Reference(forked_graph(), sgd, num_microbatches=4).step(BATCH).loss
    for result in run_ranks(refused_alike, 3):
        assert result.error is None, result.trace
        assert result.value == pytest.approx(expected)


def refused_on_one(rank: int) -> list[tuple[BaseException | None, float]]:
    graph = forked_graph()
    with pf.Engine(graph, make_plan(graph, THREE_STAGES), sgd) as engine:
        step(engine)
        outputs = ["nowhere"] if rank == 1 else None
        return [seen(lambda: engine.predict(BATCH, outputs)), seen(lambda: step(engine))]


def test_what_one_rank_refuses_ends_the_others_with_its_words() -> None:
    results = run_ranks(refused_on_one, 3)
    for rank, result in enumerate(results):
        assert result.error is None, result.trace
        error, _ = result.value[0]
        assert isinstance(error, EngineError)
        assert "output 'nowhere' is computed by no layer" in str(error)
        assert isinstance(error, LayerFailure) == (rank != 1)
        assert isinstance(result.value[1][0], EngineError)
    assert "'nowhere'" in str(results[1].value[1][0])  # it has gone on, and hears that the others could not
    check_in_time([result.value[:1] for result in results])


def test_a_tag_tells_calls_apart() -> None:
    cuts = [even_cut(n, 4) for n in (7, 8, 9)]
    calls = [
        Call(number, name, arguments, at, cut)
        for number in range(4)
        for name in ("step", "evaluate", "predict")
        for arguments in ((), (("share", 0.5),), (("phase", "first"),))
        for at in range(3)
        for cut in cuts
    ]
    assert len({call.tag for call in calls}) == len(calls)
    assert all(0 <= call.tag < 1 << 29 for call in calls)


def test_a_call_in_time_neither_meets_nor_asks_the_store() -> None:
    for result in run_ranks(quiet_steps, 2):
        assert result.error is None, result.trace
        assert result.value == 0


def quiet_steps(rank: int) -> int:
    graph = forked_graph()
    stages = [(["a", "b", "c", "d"], (0,)), (["e", "p", "s", "loss"], (1,))]
    with pf.Engine(graph, make_plan(graph, stages), sgd) as engine:
        remote = engine._remote
        assert remote is not None
        board = remote.board
        asked: list[str] = []
        remote.meeting.hear = asked.append  # type: ignore[assignment, method-assign]
        remote.board = None  # type: ignore[assignment]
        for _ in range(3):
            step(engine)
            evaluate(engine)
            predict(engine)
        remote.board = board
        return len(asked)
