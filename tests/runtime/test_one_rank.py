"""What goes wrong on one rank alone, between processes: every rank ends with its story, within seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

import pipeflow as pf
from pipeflow.errors import EngineError, PipeflowError, PlanMismatch
from pipeflow.testing import run_ranks
from tests.runtime.models import THREE_STAGES, forked_batch, forked_graph, make_plan, sgd

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
    "none": ({"optimizer": None}, "optimizer is given for None on ranks 0, 2, None on rank 1."),
    "scheduler": ({"lr_scheduler": halving}, "lr_scheduler is None on ranks 0, 2, given for None on rank 1."),
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
