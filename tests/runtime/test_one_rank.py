"""What goes wrong on one rank alone, between processes: every rank ends with its story, within seconds."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import pipeflow as pf
from pipeflow.errors import CheckpointError, EngineError, LayerFailure, NonFiniteError, PipeflowError, PlanMismatch
from pipeflow.runtime import checkpoint
from pipeflow.runtime.distributed import DistributedTransport
from pipeflow.testing import run_ranks
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

LIMIT = 3.0  # seconds within which every rank ends


def seen(call: Callable[[], Any]) -> tuple[BaseException | None, float]:
    """What the call raises, fit to be pickled, and when it ended."""
    try:
        call()
    except BaseException as error:
        error.__cause__ = error.__context__ = None
        return error, time.time()
    return None, time.time()


def check_in_time(results: list[list[tuple[BaseException | None, float]]]) -> None:
    """All ranks have ended each case at about the same time."""
    for case in zip(*results, strict=True):
        ends = [end for _, end in case]
        assert max(ends) - min(ends) < LIMIT


def without_momentum(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05)


def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters)


def halving(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)


UNLIKE: dict[str, tuple[dict[str, Any], str]] = {
    "clip": ({"clip_norm": 1.0}, "clip_norm is None on ranks 0, 2, 1.0 on rank 1."),
    "seed": ({"seed": 3}, "seed is 0 on ranks 0, 2, 3 on rank 1."),
    "nonfinite": ({"nonfinite": "skip"}, "nonfinite is 'ignore' on ranks 0, 2, 'skip' on rank 1."),
    "groups": (
        {"parameter_groups": {"*.bias": {"lr": 0.1}}},
        "parameter_groups is {} on ranks 0, 2, {*.bias: {lr: 0.1}} on rank 1.",
    ),
    "precision": ({"precision": pf.Precision(reduce="float64")}, "precision is {"),
    "class": ({"optimizer": adam}, "optimizer is SGD on ranks 0, 2, Adam on rank 1"),
    "option": ({"optimizer": without_momentum}, "the optimizer's momentum is 0.9 on ranks 0, 2, 0 on rank 1."),
    "none": ({"optimizer": None}, "optimizer is given on ranks 0, 2, None on rank 1."),
    "scheduler": ({"lr_scheduler": halving}, "lr_scheduler is None on ranks 0, 2, given on rank 1."),
}


def unlike_settings(rank: int) -> list[tuple[BaseException | None, float]]:
    graph = forked_graph()
    plan = make_plan(graph, THREE_STAGES)

    def make(options: dict[str, Any]) -> pf.Engine:
        return pf.Engine(graph, plan, **({"optimizer": sgd} | (options if rank == 1 else {})))

    return [seen(partial(make, options)) for options, _ in UNLIKE.values()]


def test_settings_that_differ_are_named_with_the_ranks_and_their_values() -> None:
    results = run_ranks(unlike_settings, 3)
    for result in results:
        assert result.error is None, result.trace
        for (_, words), (error, _) in zip(UNLIKE.values(), result.value, strict=True):
            assert isinstance(error, PlanMismatch), error
            assert words in str(error)
    check_in_time([result.value for result in results])


def angry_optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    raise ZeroDivisionError("no optimizer today")


def failed_constructions(rank: int) -> list[tuple[BaseException | None, float]]:
    graph = forked_graph()
    plan = make_plan(graph, THREE_STAGES)
    options: list[dict[str, Any]] = [
        {"optimizer": angry_optimizer},
        {"clip_norm": -1.0},
        {"devices": ["cuda:77"] * 3},
    ]
    cases = [
        seen(partial(pf.Engine, graph, plan, **({"optimizer": sgd} | (own if rank == 1 else {})))) for own in options
    ]
    with pf.Engine(graph, plan, sgd) as engine:  # nothing is left behind that would be in the way
        cases.append(seen(lambda: engine.step(forked_batch(8))))
    return cases


def test_an_engine_that_cannot_be_made_on_one_rank_is_made_on_none() -> None:
    results = run_ranks(failed_constructions, 3)
    words = ("ZeroDivisionError: no optimizer today", "clip_norm=-1.0", "cuda:77")
    for rank, result in enumerate(results):
        assert result.error is None, result.trace
        *failed, (error, _) = result.value
        assert error is None
        for text, (error, _) in zip(words, failed, strict=True):
            if rank == 1:
                assert text.split(": ")[-1] in str(error)
            else:
                assert isinstance(error, EngineError)
                assert "cannot make the engine" in str(error)
                assert text in str(error)
                assert "on rank 1" in str(error)
    assert isinstance(results[1].value[0][0], ZeroDivisionError)
    assert isinstance(results[1].value[1][0], PipeflowError)
    check_in_time([result.value for result in results])


def deadly_optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    os._exit(1)


def dead_construction(rank: int) -> None:
    graph = forked_graph()
    pf.Engine(graph, make_plan(graph, THREE_STAGES), deadly_optimizer if rank == 1 else sgd)


def test_a_process_that_dies_while_engines_are_made_leaves_nobody_waiting() -> None:
    results = run_ranks(dead_construction, 3)
    for rank in (0, 2):
        assert type(results[rank].error) is EngineError, results[rank].trace
        assert "cannot make the engine: a rank has ended or is gone" in str(results[rank].error)


REPLICATED = [(["a", "b", "c", "d", "e", "p", "s", "loss"], (0, 1, 2))]


def no_memory(*args: Any) -> None:
    raise MemoryError("no memory")


def failed_agreement(rank: int) -> list[tuple[BaseException | None, float]]:
    """Rank 1 fails in the middle of what it does with the others, and its process lives on."""
    if rank == 1:
        DistributedTransport.broadcast_in_stage = no_memory  # type: ignore[assignment, method-assign]
    graph = forked_graph()
    case = seen(lambda: pf.Engine(graph, make_plan(graph, REPLICATED), sgd))
    time.sleep(1.5 * LIMIT if rank == 1 else 0.0)
    return [case]


def test_a_rank_that_fails_while_weights_are_agreed_on_leaves_nobody_waiting() -> None:
    results = run_ranks(failed_agreement, 3)
    for rank, result in enumerate(results):
        assert result.error is None, result.trace
        error, _ = result.value[0]
        assert isinstance(error, MemoryError if rank == 1 else EngineError)
        assert rank == 1 or "MemoryError: no memory (construction on rank 1" in str(error)
    check_in_time([result.value for result in results])


def closed_after_its_job(rank: int) -> float:
    graph = forked_graph()
    engine = pf.Engine(graph, make_plan(graph, THREE_STAGES), sgd)
    loss = engine.step(forked_batch(8)).loss
    dist.barrier()
    dist.destroy_process_group()
    engine.close()
    return loss


def test_an_engine_can_be_closed_after_the_process_group_of_its_job() -> None:
    for result in run_ranks(closed_after_its_job, 3):
        assert result.error is None, result.trace


def same_state(engine: pf.Engine, before: dict[str, Tensor]) -> bool:
    after = engine.state_dict()
    return all(torch.equal(after[name], value) for name, value in before.items())


def checkpoints(rank: int, folder: str) -> tuple[list[tuple[BaseException | None, float]], list[bool], float]:
    """Rank 1 alone cannot write, cannot read, reads something else, or lacks a name; then all train on."""
    graph = forked_graph()
    root = Path(folder)
    cases, unchanged = [], []
    with pf.Engine(graph, make_plan(graph, THREE_STAGES), adam) as engine:
        engine.step(forked_batch(8))
        engine.save(root / "good")
        if rank == 1:
            (root / "file").write_text("no folder")
            shutil.copytree(root / "good", root / "bad")
            data = next(file for file in (root / "bad").iterdir() if file.suffix == ".distcp")
            data.write_bytes(data.read_bytes()[:-1] + b"?")
        engine.step(forked_batch(8, seed=1))
        engine.save(root / "later")
        before = engine.state_dict()

        def try_all_but(call: Callable[[Any], None], good: Any, on_rank_1: Any) -> None:
            cases.append(seen(lambda: call(on_rank_1 if rank == 1 else good)))
            unchanged.append(same_state(engine, before))

        try_all_but(engine.save, root / "new", root / "file" / "new")
        try_all_but(engine.load, root / "good", root / "nowhere")
        try_all_but(engine.load, root / "good", root / "bad")
        try_all_but(engine.load, root / "good", root / "later")
        try_all_but(engine.load_state_dict, before, {n: v for n, v in before.items() if n != "a.bias"})
        try_all_but(engine.load_state_dict, before, None)
        engine.load(root / "good")
        return cases, unchanged, engine.step(forked_batch(8, seed=1)).loss


def test_a_checkpoint_that_one_rank_cannot_write_or_read_changes_nothing_on_any(tmp_path: Path) -> None:
    reference = pf.Reference(forked_graph(), adam, num_microbatches=4)
    expected = [reference.step(forked_batch(8, seed=s)).loss for s in range(2)][1]
    results = run_ranks(checkpoints, 3, str(tmp_path))
    words = (
        "cannot be written: NotADirectoryError",
        "nowhere is not there",
        "was altered",
        "different checkpoints",
        "lacks 'a.bias'",
        "None",
    )
    for rank, result in enumerate(results):
        assert result.error is None, result.trace
        cases, unchanged, loss = result.value
        for text, (error, _) in zip(words, cases, strict=True):
            assert isinstance(error, CheckpointError), (text, error)
            assert text in str(error)
            assert rank == 1 or "rank 1" in str(error)
        assert all(unchanged)
        assert loss == pytest.approx(expected, rel=1e-5)
    check_in_time([result.value[0] for result in results])


def stopped_save(*args: Any, **options: Any) -> None:
    raise KeyboardInterrupt


def dead_save(*args: Any, **options: Any) -> None:
    os._exit(1)


def half_a_save(rank: int, folder: str, kind: str) -> list[tuple[BaseException | None, float]]:
    """Rank 1 leaves torch's writer between its messages."""
    graph = forked_graph()
    engine = pf.Engine(graph, make_plan(graph, THREE_STAGES), sgd)
    engine.step(forked_batch(8))
    if rank == 1:
        checkpoint.save_tensors = stopped_save if kind == "stopped" else dead_save  # type: ignore[attr-defined]
    return [seen(lambda: engine.save(folder)), seen(lambda: engine.step(forked_batch(8)))]


@pytest.mark.parametrize("kind", ["stopped", "dead"])
def test_a_rank_that_ends_while_tensors_are_written_ends_the_others(tmp_path: Path, kind: str) -> None:
    """It waited for ever: the group's next message was taken for torch's. Of a dead one others said that all knew."""
    results = run_ranks(half_a_save, 3, str(tmp_path / "new"), kind)
    for rank in (0, 2):
        assert results[rank].error is None, results[rank].trace
        (first, _), (second, _) = results[rank].value
        assert isinstance(first, LayerFailure)
        assert kind == "dead" or "KeyboardInterrupt during save()" in str(first)
        assert type(second) is EngineError  # and not one that goes on
    if kind == "stopped":
        assert isinstance(results[1].value[0][0], KeyboardInterrupt)
        check_in_time([result.value for result in results])


def own_nonfinite(x: Tensor) -> Tensor:
    if type(x) is Tensor and bool(x.abs().max() > 100):
        raise NonFiniteError("a layer's own")
    return x * 1.0


def nonfinite_in_a_layer(rank: int) -> list[tuple[BaseException | None, float]]:
    graph = pf.LayerGraph("own")
    h = graph.add("first", nn.Identity(), graph.input("x", ("B", 4)))
    h = graph.add("own", own_nonfinite, h)
    graph.loss("loss", torch.mean, graph.add("last", nn.Linear(4, 4), h))
    plan = make_plan(graph, [(["first"], (0,)), (["own"], (1,)), (["last", "loss"], (2,))])
    case = seen(lambda: pf.Engine(graph, plan).evaluate(bomb_batch(1)))
    time.sleep(1.5 * LIMIT if rank == 1 else 0.0)
    return [case]


def test_a_layer_that_raises_what_all_ranks_raise_alike_is_one_that_failed() -> None:
    results = run_ranks(nonfinite_in_a_layer, 3)
    for result in results:
        assert result.error is None, result.trace
        assert isinstance(result.value[0][0], LayerFailure)
        assert "NonFiniteError: a layer's own (forward on rank 1" in str(result.value[0][0])
    check_in_time([result.value for result in results])


def weights_of_failed(rank: int, folder: str) -> list[tuple[BaseException | None, float]]:
    graph = bomb_graph("second", "backward")
    with pf.Engine(graph, bomb_plan(graph, "1f1b"), sgd) as engine:
        engine.step(bomb_batch(None))
        return [
            seen(lambda: engine.step(bomb_batch(1))),
            seen(engine.state_dict),
            seen(lambda: engine.save(folder)),
            seen(lambda: engine.load_state_dict({})),
        ]


def check_no_weights(cases: list[tuple[BaseException | None, float]], folder: Path) -> None:
    (failure, _), *others = cases
    assert isinstance(failure, LayerFailure)
    for error, _ in others:
        assert type(error) is EngineError
        assert "backward went wrong" in str(error)
    assert "half a step may have been taken" in str(others[0][0])
    assert not folder.exists()


def test_a_failed_engine_gives_no_weights_and_writes_no_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "torn"
    check_no_weights(weights_of_failed(0, str(folder)), folder)
    for result in run_ranks(weights_of_failed, 3, str(folder)):
        assert result.error is None, result.trace
        check_no_weights(result.value, folder)


def test_an_engine_of_one_process_that_failed_while_it_predicted_still_has_its_weights() -> None:
    graph = bomb_graph("second", "forward")
    with pf.Engine(graph, bomb_plan(graph, "1f1b"), sgd) as engine:
        engine.step(bomb_batch(None))
        before = engine.state_dict()
        with pytest.raises(LayerFailure):
            engine.evaluate(bomb_batch(1))
        assert same_state(engine, before)
        with pytest.raises(EngineError, match="cannot run any more"):
            engine.evaluate(bomb_batch(None))
