"""Gradients of several calls in one step, reduced once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import pipeflow as pf
from pipeflow.errors import EngineError
from tests.runtime.models import THREE_STAGES, Stages, forked_batch, forked_graph, make_plan, sgd

REPLICAS: Stages = [(["a", "b"], (0, 1)), (["c", "d"], (2,)), (["e", "p", "s", "loss"], (0, 1, 2))]


def test_equal_batches_count_as_one_large_batch() -> None:
    graph = forked_graph()
    large = forked_batch(24)
    reference = pf.Reference(graph, sgd)
    expected = reference.step(large).loss
    for stages in (THREE_STAGES, REPLICAS):
        with pf.Engine(graph, make_plan(graph, stages), sgd, num_threads=1) as engine:
            parts = [{name: value[i : i + 8] for name, value in large.items()} for i in (0, 8, 16)]
            before = engine.state_dict()
            losses = [engine.accumulate(part, share=1 / 3).loss for part in parts[:2]]
            assert all(torch.equal(before[n], v) for n, v in engine.state_dict().items())
            losses.append(engine.step(parts[2], share=1 / 3).loss)
            assert engine.num_steps == 1
            assert sum(losses) / 3 == pytest.approx(expected, rel=1e-6)
            for name, value in reference.state_dict().items():
                torch.testing.assert_close(engine.state_dict()[name], value, rtol=1e-5, atol=1e-7)


def noisy_graph() -> pf.LayerGraph:
    graph = pf.LayerGraph("noisy")
    noise = graph.add(
        "noise", nn.Dropout(0.5), graph.add("first", pf.lazy(nn.Linear, 8, 8), graph.input("x", ("B", 8)))
    )
    graph.loss("loss", square, graph.add("second", pf.lazy(nn.Linear, 8, 8), noise))
    return graph


def square(x: Tensor) -> Tensor:
    return x.square().mean()


def test_random_layers_draw_anew_in_each_call_and_alike_in_each_layout() -> None:
    graph = noisy_graph()
    batch = {"x": torch.ones(6, 8)}
    reference = pf.Reference(graph, sgd, num_microbatches=4, seed=5)
    plan = make_plan(graph, [(["first"], (0,)), (["noise"], (1, 2)), (["second", "loss"], (0,))])
    with pf.Engine(graph, plan, sgd, seed=5, num_threads=1) as engine:
        seen = [engine.accumulate(batch).loss, engine.accumulate(batch).loss, engine.step(batch).loss]
    assert len(set(seen)) == 3
    assert seen == [reference.accumulate(batch).loss, reference.accumulate(batch).loss, reference.step(batch).loss]


def test_a_share_that_is_none_is_refused() -> None:
    graph = forked_graph()
    with pf.Engine(graph, make_plan(graph, THREE_STAGES), sgd) as engine, pytest.raises(EngineError, match="share=0"):
        engine.accumulate(forked_batch(4), share=0.0)


def test_the_cut_is_part_of_the_key_of_random_numbers() -> None:
    """As docs/layers.md says: equal cuts draw alike wherever they run, other cuts draw others."""
    graph, batch = noisy_graph(), {"x": torch.ones(6, 8)}
    losses = {n: pf.Reference(graph, sgd, num_microbatches=n, seed=5).step(batch).loss for n in (1, 2, 3)}
    assert len(set(losses.values())) == 3
    for stages in ([(["first"], (0,)), (["noise"], (1, 2)), (["second", "loss"], (0,))], [(list(graph.layers), (0,))]):
        plan = make_plan(graph, stages, num_microbatches=3)
        with pf.Engine(graph, plan, sgd, seed=5, num_threads=1) as engine:
            assert engine.step(batch).loss == losses[3]
