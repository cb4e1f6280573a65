"""The same engine with a process per rank: the law, failures, checkpoints, refusals."""

from __future__ import annotations

import math
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st

import pipeflow as pf
from pipeflow.errors import BatchError, EngineError, LayerFailure, PipeflowError, PlanMismatch
from pipeflow.testing import (
    check_layout_invariance,
    layer_graphs,
    plans,
    run_ranks,
    sequence_graphs,
    training_batches,
    training_options,
    unit_costs,
)
from tests.runtime.models import (
    THREE_STAGES,
    bomb_batch,
    bomb_graph,
    bomb_plan,
    forked_batch,
    forked_graph,
    make_plan,
    sgd,
)

LIMIT = 3.0  # seconds within which every rank ends after one has failed


def drawn_cases(rank: int, num_ranks: int, num_cases: int, max_replicas: int) -> int:
    """Draws the same graphs and plans on every rank, and holds each to the law."""
    checked = 0
    dtype = "float32" if max_replicas == 1 else "float64"

    # Draws are derandomized, so that all ranks have the same; shrinking would run alone.
    @given(data=st.data())
    @settings(max_examples=num_cases, derandomize=True, deadline=None, database=None, phases=[Phase.generate])
    def law(data: st.DataObject) -> None:
        nonlocal checked
        regular = layer_graphs(dtype=dtype, allow_random=True, allow_shared=True, allow_buffers=True)
        graph = data.draw(st.one_of(regular, regular, sequence_graphs(dtype=dtype)))
        plan = data.draw(
            plans(
                unit_costs(graph),
                max_ranks=num_ranks,
                max_replicas=max_replicas,
                copies=max_replicas > 1,
                graph_digest=graph.digest,
            )
        )
        assume(plan.num_ranks == num_ranks)
        batches = data.draw(training_batches(graph, plan.num_microbatches, max_steps=2))
        check_layout_invariance(graph, plan, batches, options=data.draw(training_options(graph)))
        checked += 1

    law()
    return checked


@pytest.mark.parametrize(("num_ranks", "max_replicas"), [(2, 1), (3, 1), (3, 3), (4, 3)])
def test_drawn_cases_train_as_one_device_does(num_ranks: int, max_replicas: int) -> None:
    for result in run_ranks(drawn_cases, num_ranks, num_ranks, 15, max_replicas):
        assert result.error is None, result.trace
        assert result.value == 15


CASES = [
    (layer, phase, where, microbatch, schedule)
    for layer, phase, where, microbatch in (
        ("first", "forward", 0, 3),
        ("second", "forward", 1, 0),
        ("third", "backward", 2, 3),
        ("first", "backward", 0, 0),
    )
    for schedule in ("gpipe", "1f1b")
]


def bombs(rank: int) -> list[tuple[LayerFailure, float]]:
    """The failure of each case as this rank sees it, and when it ended; a new engine for each."""
    seen = []
    for layer, phase, _, microbatch, schedule in CASES:
        graph = bomb_graph(layer, phase)
        with pf.Engine(graph, bomb_plan(graph, schedule), sgd) as engine:
            engine.step(bomb_batch(None))
            try:
                engine.step(bomb_batch(microbatch))
            except LayerFailure as failure:
                failure.__cause__ = None  # the chain does not pickle
                seen.append((failure, time.time()))
    return seen


def test_when_one_rank_fails_all_end_with_its_story() -> None:
    results = run_ranks(bombs, 3)
    for result in results:
        assert result.error is None, result.trace
        for (_, phase, where, microbatch, _), (failure, _) in zip(CASES, result.value, strict=True):
            assert (failure.rank, failure.stage, failure.layer) == (where, where, ("first", "second", "third")[where])
            assert (failure.microbatch, failure.step, failure.phase) == (microbatch, 1, phase)
            assert f"ZeroDivisionError: {phase} went wrong" in failure.original
            assert f"in {phase}" in failure.trace
    for case in range(len(CASES)):
        ends = [result.value[case][1] for result in results]
        assert max(ends) - min(ends) < LIMIT


def die(rank: int) -> None:
    graph = bomb_graph("first", "never")
    with pf.Engine(graph, bomb_plan(graph, "1f1b"), sgd) as engine:
        engine.step(bomb_batch(None))
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        engine.step(bomb_batch(None))


def test_when_a_process_dies_the_others_end() -> None:
    results = run_ranks(die, 3, timeout=30)
    assert isinstance(results[1].error, ConnectionError)
    for rank in (0, 2):
        failure = results[rank].error
        assert isinstance(failure, LayerFailure)
        assert failure.phase == "transport"
        assert "a peer is gone" in str(failure)


def mixed_plans(rank: int) -> None:
    graph = forked_graph()
    pf.Engine(graph, make_plan(graph, THREE_STAGES, num_microbatches=4 if rank else 2), sgd)


def test_different_plans_are_refused_on_every_rank_before_the_first_step() -> None:
    for result in run_ranks(mixed_plans, 3):
        assert isinstance(result.error, PlanMismatch), result.trace
        assert "rank 0" in str(result.error)


def wrong_size(rank: int) -> None:
    graph = forked_graph()
    plan = make_plan(graph, [*THREE_STAGES[:1], (["c", "d", "e", "p", "s", "loss"], (1,))])
    pf.Engine(graph, plan, sgd)


def test_a_job_of_another_size_than_the_plan_is_refused() -> None:
    for result in run_ranks(wrong_size, 3):
        assert isinstance(result.error, EngineError)
        assert "--nproc-per-node 2" in str(result.error)


BAD_BATCHES = ("dtype", "fewer", "more")


def bad_batches(rank: int) -> list[PipeflowError]:
    """What this rank raises where rank 0 has another batch than the others."""
    graph = forked_graph()
    seen = []
    for kind in BAD_BATCHES:
        with pf.Engine(graph, make_plan(graph, THREE_STAGES), sgd) as engine:
            engine.step(forked_batch(8))
            batch = forked_batch({"fewer": 2, "more": 12}.get(kind, 8) if rank == 0 else 8)
            if kind == "dtype" and rank == 0:
                batch["x"] = batch["x"].double()
            try:
                engine.step(batch)
            except PipeflowError as error:
                error.__cause__ = error.__context__ = None
                seen.append(error)
    return seen


def test_a_batch_that_one_rank_sees_otherwise_ends_all_ranks() -> None:
    results = run_ranks(bad_batches, 3, timeout=60)
    for result in results:
        assert result.error is None, result.trace
        assert len(result.value) == len(BAD_BATCHES)
    assert isinstance(results[0].value[0], BatchError)
    assert all("BatchError" in str(result.value[0]) for result in results[1:])


def save_and_load(rank: int, folder: str) -> tuple[list[float], dict[str, Any], dict[str, Any]]:
    graph = forked_graph()
    first = make_plan(graph, [(["a", "b"], (0, 1)), (["c", "d"], (2,)), (["e", "p", "s", "loss"], (1,))])
    losses = []
    with pf.Engine(graph, first, sgd, measure=True) as engine:
        losses += [engine.step(forked_batch(8, seed=s)).loss for s in range(2)]
        engine.save(folder)
        assert len(engine.measured().forward_seconds) == 3
    with pf.Engine(graph, make_plan(graph, THREE_STAGES), sgd) as engine:
        engine.load(folder)
        losses += [engine.step(forked_batch(8, seed=s)).loss for s in range(2, 4)]
        return losses, engine.state_dict(), engine.predict({"x": forked_batch(5)["x"]})


def test_checkpoints_and_predictions_are_the_same_on_every_rank(tmp_path: Path) -> None:
    reference = pf.Reference(forked_graph(), sgd, num_microbatches=4)
    expected = [reference.step(forked_batch(8, seed=s)).loss for s in range(4)]
    output = reference.predict({"x": forked_batch(5)["x"]})["s"]
    for result in run_ranks(save_and_load, 3, str(tmp_path / "saved")):
        assert result.error is None, result.trace
        losses, state, predicted = result.value
        assert all(math.isclose(a, b, rel_tol=1e-5) for a, b in zip(losses, expected, strict=True))
        torch.testing.assert_close(predicted["s"], output, rtol=1e-4, atol=1e-6)
        for name, value in reference.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-6)
