"""Frozen layers cost nothing: no gradient computed, none sent towards them, none summed. Counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pipeflow as pf
from pipeflow.program import Direction, Route
from pipeflow.runtime import binding
from pipeflow.runtime.threads import ThreadTransport
from pipeflow.runtime.transport import Payload
from pipeflow.testing import run_ranks
from tests.runtime.models import Stages, make_plan, mean_square, sgd

NUM_MICROBATCHES = 4
STAGES: Stages = [(["first"], (0, 1)), (["second"], (2, 3)), (["third", "loss"], (4,))]


def chain(*frozen: str) -> pf.LayerGraph:
    """Three linear layers, some of them frozen."""
    graph = pf.LayerGraph("chain")
    h = graph.input("x", ("B", 4))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name in ("first", "second", "third"):
            h = graph.add(name, nn.Linear(4, 4).requires_grad_(name not in frozen), h)
    graph.loss("loss", mean_square, h)
    return graph


def batch() -> dict[str, Tensor]:
    return {"x": torch.randn(8, 4, generator=torch.Generator().manual_seed(1))}


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """What happens from here on: backward calls, gradients computed, sends by direction, sums."""
    seen: Counter[str] = Counter()
    run_backward, sender, start_reduce = binding.run_backward, ThreadTransport.sender, ThreadTransport.start_reduce

    def backward(roots: list[Any], gradients: list[Tensor]) -> None:
        seen["backward"] += 1
        run_backward(roots, gradients)

    def counted_sender(self: ThreadTransport, route: Route, peer: int) -> Callable[[int, Payload], None]:
        send = sender(self, route, peer)

        def counted(microbatch: int, payload: Payload) -> None:
            seen[f"{route.direction.name.lower()} {route.source}>{route.target}"] += 1
            send(microbatch, payload)

        return counted

    def counted_reduce(self: ThreadTransport, stage: int, tensor: Tensor) -> Callable[[], Tensor]:
        seen[f"sum of stage {stage}"] += 1
        return start_reduce(self, stage, tensor)

    monkeypatch.setattr(binding, "run_backward", backward)
    monkeypatch.setattr(ThreadTransport, "sender", counted_sender)
    monkeypatch.setattr(ThreadTransport, "start_reduce", counted_reduce)
    return seen


FORWARD = {"forward 0>1": NUM_MICROBATCHES, "forward 1>2": NUM_MICROBATCHES}
ALL = {
    **FORWARD,
    "backward": 3 * NUM_MICROBATCHES,
    "backward 1>0": NUM_MICROBATCHES,
    "backward 2>1": NUM_MICROBATCHES,
    "sum of stage 0": 2,
    "sum of stage 1": 2,
}


def without(*events: str, backward: int) -> dict[str, int]:
    """What is left of it all, with backward on so many stages."""
    return {k: v for k, v in ALL.items() if k not in events} | {"backward": backward * NUM_MICROBATCHES}


@pytest.mark.parametrize(
    ("frozen", "expected"),
    [
        ((), ALL),
        (("first",), without("backward 1>0", "sum of stage 0", backward=2)),
        (("first", "second"), without("backward 1>0", "backward 2>1", "sum of stage 0", "sum of stage 1", backward=1)),
        (("second",), without("sum of stage 1", backward=3)),  # what comes before it learns through it
        (("third",), ALL),
    ],
    ids=str,
)
def test_what_is_frozen_is_neither_computed_nor_sent_nor_summed(
    frozen: tuple[str, ...], expected: dict[str, int], counts: Counter[str]
) -> None:
    assert {direction.name.lower() for direction in Direction} == {"forward", "backward"}
    graph = chain(*frozen)
    computed: Counter[str] = Counter()
    with pf.Engine(graph, make_plan(graph, STAGES, num_microbatches=NUM_MICROBATCHES), sgd) as engine:
        before = engine.state_dict()
        for replicas in engine._ranks.replicas.values():
            for replica in replicas.values():
                for name, parameter in replica.parameters.items():
                    if parameter.requires_grad:
                        note = lambda _, name=name: computed.update([name])  # noqa: E731 (binds the name)
                        parameter.register_post_accumulate_grad_hook(note)
        loss = engine.step(batch()).loss
        after = engine.state_dict()
    assert counts == expected
    trained = [name for name in graph.parameters if name.partition(".")[0] not in frozen]
    assert computed == dict.fromkeys(trained, NUM_MICROBATCHES)
    reference = pf.Reference(graph, sgd, num_microbatches=NUM_MICROBATCHES)
    assert loss == pytest.approx(reference.step(batch()).loss)
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(after[name], value)
        assert torch.equal(before[name], after[name]) == (name not in trained)


def run_frozen(rank: int) -> list[dict[str, Tensor]]:
    states = []
    for frozen in (("first",), ("second",), ("first", "second")):
        graph = chain(*frozen)
        stages: Stages = [(["first"], (0,)), (["second"], (1, 2)), (["third", "loss"], (0,))]
        with pf.Engine(graph, make_plan(graph, stages, num_microbatches=NUM_MICROBATCHES), sgd) as engine:
            engine.step(batch())
            states.append(engine.state_dict())
    return states


def test_frozen_layers_of_processes_stay_as_they_are() -> None:
    for result in run_ranks(run_frozen, 3):
        assert result.error is None, result.trace
        for frozen, state in zip((("first",), ("second",), ("first", "second")), result.value, strict=True):
            reference = pf.Reference(chain(*frozen), sgd, num_microbatches=NUM_MICROBATCHES)
            reference.step(batch())
            for name, value in reference.state_dict().items():
                torch.testing.assert_close(state[name], value)
