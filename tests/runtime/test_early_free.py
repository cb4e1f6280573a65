"""What a stage has sent it lets go of, unless backward needs it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

import pipeflow as pf
from pipeflow.flows import flows
from pipeflow.program import Compute, Direction, Free, Kind, Receive, Route, Send
from pipeflow.runtime.binding import Binder
from pipeflow.runtime.call import Call
from pipeflow.runtime.cut import even_cut
from pipeflow.runtime.microbatch import MicroBatches
from pipeflow.runtime.rank_state import RankState, StageState
from pipeflow.runtime.replica import StageReplica
from pipeflow.runtime.stage import compile_stage
from pipeflow.runtime.transport import Payload
from pipeflow.testing import unit_costs


class Network:
    """A transport that forgets what it sends, and receives ones."""

    def begin(
        self, receives: Sequence[Receive], call: Call, arrived: Sequence[int], *, may_lack: bool = False
    ) -> None: ...

    def sender(self, route: Route, peer: int) -> Callable[[int, Payload], None]:
        def send(microbatch: int, payload: Payload) -> None:
            assert payload is not None
            assert payload[0] is not None
            assert payload[0].shape == (2, 4)

        return send

    def receiver(self, route: Route, peer: int) -> Callable[[int], Payload]:
        return lambda microbatch: [torch.ones(2, 4)]

    def start_reduce(self, stage: int, tensor: Tensor) -> Callable[[], Tensor]:
        raise AssertionError("one replica")

    def start_shared(self, stages: tuple[int, ...], ranks: tuple[int, ...], tensor: Tensor) -> Callable[[], Tensor]:
        raise AssertionError("one stage")

    def start_share(self, values: Tensor) -> Callable[[], Tensor]:
        raise AssertionError("no losses here")

    def exchange(self, peers: Sequence[int], values: Tensor) -> list[Tensor]:
        raise AssertionError("no norms here")

    def disagree(self) -> NoReturn:
        raise AssertionError("one rank")

    def end(self) -> None: ...


class Gives(nn.Module):
    """Calls a function on the result of a linear layer, and watches what it gives."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.function = nn.Linear(4, 4), function
        self.given: list[weakref.ref[Any]] = []

    def forward(self, x: Tensor) -> Tensor:
        y = self.function(self.linear(x))
        if type(y) is Tensor:  # shapes are inferred on fake ones
            self.given.append(weakref.ref(y.untyped_storage()))
        return y


def alive_after(function: Callable[[Tensor], Tensor]) -> tuple[list[bool], Tensor]:
    """Whether what the first stage gives is alive: after its send, and after its free; and a gradient."""
    graph = pf.LayerGraph("pair")
    value = graph.add("first", Gives(function), graph.input("x", ("B", 4)))
    graph.loss("loss", torch.mean, graph.add("second", nn.Linear(4, 4), value))
    names = [["first"], ["second", "loss"]]
    flow_by_tensor = flows(unit_costs(graph), names)
    replica = StageReplica(graph, names[0], device=torch.device("cpu"), seed=0)
    compiled = compile_stage(graph, 0, names[0], flow_by_tensor, replica.functions, train=True)
    state = RankState(graph, {0: StageState(compiled, replica)}, 1, torch.device("cpu"))
    binder = Binder(
        rank=0,
        state=state,
        transport=Network(),
        placement=((0,), (1,)),
        flow_by_tensor=flow_by_tensor,
        carried=frozenset({("first", 1)}),
        keep=(),
        train=True,
    )
    state.begin(MicroBatches(even_cut(2, 1), {"x": torch.ones(2, 4)}), share=1.0, draw=0)

    def do(*actions: Any) -> None:
        for action in actions:
            closure = binder.bind(action)
            assert closure is not None
            closure()

    module = replica.modules["first"]
    assert isinstance(module, Gives)
    do(Compute(Kind.FORWARD, 0, 0), Send(Route(Direction.FORWARD, 0, 1, ("first",)), 0, 1))
    seen = [module.given[0]() is not None]
    do(Receive(Route(Direction.BACKWARD, 1, 0, ("first",)), 0, 1), Compute(Kind.BACKWARD, 0, 0), Free(0, 0))
    seen.append(module.given[0]() is not None)
    gradient = module.linear.bias.grad
    assert gradient is not None
    return seen, gradient


def test_an_output_that_backward_does_not_need_is_freed_once_sent() -> None:
    seen, gradient = alive_after(lambda y: y + 1)
    assert seen == [False, False]
    assert torch.equal(gradient, torch.full((4,), 2.0))


def test_an_output_that_backward_needs_is_kept_until_then() -> None:
    assert alive_after(torch.exp)[0] == [True, False]
