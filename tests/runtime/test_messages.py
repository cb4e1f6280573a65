"""What is sent: nothing twice to one rank, nothing that is not used there, and never an input of the graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pipeflow as pf
from pipeflow.program import Direction, Route, rank_of
from pipeflow.runtime.threads import ThreadTransport
from pipeflow.runtime.transport import Payload
from pipeflow.testing import check_layout_invariance, layer_graphs, plans, run_ranks, unit_costs
from pipeflow.testing.graphs import sample_batch
from tests.runtime.models import make_plan, sgd
from tests.runtime.test_known_cases import finish, linear, skip_one_to_three, start

Sent = Counter[tuple[int, int, str, int]]
"""How often (rank, peer, tensor, micro-batch) was sent downstream."""


def sent_by(graph: pf.LayerGraph, plan: pf.Plan, monkeypatch: pytest.MonkeyPatch) -> Sent:
    """What one training step sends."""
    sent: Sent = Counter()
    original = ThreadTransport.sender

    def sender(self: ThreadTransport, route: Route, peer: int) -> Callable[[int, Payload], None]:
        send = original(self, route, peer)

        def count(microbatch: int, payload: Payload) -> None:
            if route.direction is Direction.FORWARD:
                source = rank_of(plan.placement, route.source, microbatch)
                sent.update((source, peer, name, microbatch) for name in route.payload)
            send(microbatch, payload)

        return count

    with monkeypatch.context() as patch:
        patch.setattr(ThreadTransport, "sender", sender)
        with pf.Engine(graph, plan, sgd, num_threads=1) as engine:
            engine.step(sample_batch(graph, 2 * plan.num_microbatches))
    return sent


def needed(graph: pf.LayerGraph, plan: pf.Plan) -> set[tuple[int, int, str, int]]:
    """What has to go between ranks: each tensor to each other rank that reads it."""
    producer = {tensor: name for name, layer in graph.layers.items() for tensor in layer.outputs}
    result = set()
    for name, layer in graph.layers.items():
        for tensor in layer.inputs:
            if tensor in producer:
                for m in range(plan.num_microbatches):
                    stages = plan.stage_by_layer[producer[tensor]], plan.stage_by_layer[name]
                    source, target = (rank_of(plan.placement, s, m) for s in stages)
                    if source != target:
                        result.add((source, target, tensor, m))
    return result


@given(data=st.data())
@settings(max_examples=60)
def test_every_rank_is_sent_what_it_reads_once(data: st.DataObject) -> None:
    graph = data.draw(layer_graphs(dtype="float64"))
    plan = data.draw(plans(unit_costs(graph), max_ranks=3, max_replicas=2, graph_digest=graph.digest))
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert sent_by(graph, plan, monkeypatch) == Counter(needed(graph, plan))


def test_two_stages_of_a_rank_share_what_they_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A skip that three stages read, two of them on one rank: it used to go there twice."""
    graph = skip_one_to_three()
    names = list(graph.layers)
    plan = make_plan(graph, [(names[:1], (0,)), (names[1:3], (1,)), (names[3:5], (2,)), (names[5:], (1,))])
    sent = sent_by(graph, plan, monkeypatch)
    assert [(key[1], n) for key, n in sent.items() if key[2] == "first" and key[3] == 0] == [(1, 1), (2, 1)]
    check_layout_invariance(graph, plan, [sample_batch(graph, n) for n in (10, 3)])


def test_replicas_that_meet_at_some_micro_batches_share_these(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = skip_one_to_three()
    names = list(graph.layers)
    plan = make_plan(graph, [(names[:1], (0,)), (names[1:3], (1,)), (names[3:5], (1, 2)), (names[5:], (2, 1))])
    sent = sent_by(graph, plan, monkeypatch)
    assert set(sent.values()) == {1}
    assert {(peer, m) for _, peer, name, m in sent if name == "first"} == {(r, m) for r in (1, 2) for m in range(4)}
    check_layout_invariance(graph, plan, [sample_batch(graph, n) for n in (10, 3)])


READS: tuple[list[str], ...] = (["x"], [], ["late", "target"])


def inputs_on_three_stages(rank: int) -> dict[str, float]:
    """A step of which each rank has the inputs that its stage reads, and of the others no data at all."""
    graph, h = start("late")
    late = graph.input("late", ("B", 6), dtype="float64")
    graph = finish(graph, graph.add("join", torch.add, graph.add("second", linear(), h), late))
    names = list(graph.layers)
    plan = make_plan(graph, [(names[:1], (0,)), (names[1:2], (1,)), (names[2:], (2,))])
    batch = sample_batch(graph, 10)
    mine = {name: t if name in READS[rank] else t.to("meta") for name, t in batch.items()}
    with pf.Engine(graph, plan, sgd) as engine:
        losses = dict(engine.step(mine).losses)
    assert losses == dict(pf.Reference(graph, sgd, num_microbatches=4).step(batch).losses)
    return losses


def test_an_input_is_needed_only_where_it_is_read() -> None:
    for result in run_ranks(inputs_on_three_stages, 3):
        assert result.error is None, result.trace


def over_gloo(rank: int) -> None:
    graph = skip_one_to_three()
    names = list(graph.layers)
    for placement in ([(0,), (1,), (2,), (1,)], [(0,), (1,), (1, 2), (2, 1)], [(2,), (0, 1), (1,), (1, 0)]):
        cut = [names[:1], names[1:3], names[3:5], names[5:]]
        plan = make_plan(graph, list(zip(cut, placement, strict=True)))
        check_layout_invariance(graph, plan, [sample_batch(graph, n) for n in (10, 3)])
        with pf.Engine(graph, plan, sgd) as engine:
            # What is left of a route without the layers that a prediction leaves out.
            assert torch.equal(
                engine.predict(sample_batch(graph, 10), ["join2"])["join2"],
                pf.Reference(graph, sgd, num_microbatches=4).predict(sample_batch(graph, 10), ["join2"])["join2"],
            )


def test_processes_share_too() -> None:
    for result in run_ranks(over_gloo, 3):
        assert result.error is None, result.trace
