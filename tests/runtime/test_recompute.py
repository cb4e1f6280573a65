"""Recomputed layers train as kept ones do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import pipeflow as pf
from pipeflow.errors import LayerFailure
from pipeflow.execution_plan import Plan
from pipeflow.testing import check_layout_invariance, layer_graphs, plans, unit_costs
from pipeflow.testing.graphs import sample_batch
from tests.runtime.test_layer_kinds import buffers_in_backward


def recomputing(plan: Plan, names: Sequence[str] | None = None) -> Plan:
    """The plan with these layers recomputed, or all."""
    stages = tuple(
        s.with_recompute(s.layers if names is None else set(names).intersection(s.layers)) for s in plan.stages
    )
    return plan.model_copy(update={"stages": stages})


def planned(graph: pf.LayerGraph, num_stages: int = 2, num_microbatches: int = 4, schedule: str = "1f1b") -> Plan:
    return pf.plan(
        graph,
        unit_costs(graph),
        pf.Cluster.uniform(num_stages),
        batch_size=8,
        num_stages=num_stages,
        num_microbatches=num_microbatches,
        schedule=schedule,
    )


def chain(*layers: Callable[[Tensor], Tensor] | nn.Module) -> pf.LayerGraph:
    graph = pf.LayerGraph("chain")
    value: Any = graph.input("x", ("B", 4))
    for i, layer in enumerate(layers):
        value = graph.add(f"l{i}", layer, value)
    graph.loss("loss", lambda y: y.square().mean(), value)
    return graph


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@given(data=st.data())
@settings(max_examples=40)
def test_any_layers_recomputed_train_as_one_device_does(schedule: str, data: st.DataObject) -> None:
    graph = data.draw(layer_graphs(allow_random=True, allow_shared=True, allow_buffers=True))
    drawn = plans(unit_costs(graph), max_ranks=4, max_replicas=1, schedules=[schedule], graph_digest=graph.digest)
    plan = data.draw(drawn)
    plan = recomputing(
        plan, data.draw(st.lists(st.sampled_from(list(graph.layers)))) if data.draw(st.booleans()) else None
    )
    check_layout_invariance(graph, plan, [sample_batch(graph, data.draw(st.integers(1, 12)), seed=i) for i in range(2)])


def test_dropout_draws_the_same_mask_twice() -> None:
    graph = chain(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 4))
    batches = [sample_batch(graph, size, seed=size) for size in (8, 5, 3)]
    for num_stages in (1, 2, 3):
        check_layout_invariance(graph, recomputing(planned(graph, num_stages)), batches)


class Remembers(nn.Module):
    """Its output depends on a buffer that each forward changes."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        out = self.scale * (x - self.mean)
        with torch.no_grad():
            self.mean.lerp_(x.mean(0), 0.5)
        return out.tanh()


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_buffers_are_updated_once_and_read_as_they_were(schedule: str) -> None:
    graph = chain(nn.Linear(4, 4), nn.BatchNorm1d(4), Remembers(), nn.Linear(4, 4), nn.BatchNorm1d(4))
    batches = [sample_batch(graph, 8, seed=i) for i in range(3)]
    for num_stages in (1, 2):
        check_layout_invariance(graph, recomputing(planned(graph, num_stages, schedule=schedule)), batches)
        check_layout_invariance(graph, recomputing(planned(graph, num_stages), ["l1", "l2", "l4"]), batches)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_buffers_that_backward_needs_are_those_of_their_micro_batch(schedule: str) -> None:
    """Some are replaced in forward, some are added to, by one of the two names that they have."""
    graph = buffers_in_backward()
    for num_stages in (1, 3):
        plan = recomputing(planned(graph, num_stages, schedule=schedule))
        check_layout_invariance(graph, plan, [sample_batch(graph, 8, seed=i) for i in range(3)])


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += type(x) is Tensor  # shapes are inferred on fake ones
        return x.sin()


def test_recomputed_layers_run_twice_in_training_and_once_in_inference() -> None:
    graph = chain(nn.Linear(4, 4), Counts(), nn.Linear(4, 4))
    plan = recomputing(planned(graph, 1), ["l1"])
    with pf.Engine(graph, plan, lambda p: torch.optim.SGD(p, lr=0.1)) as engine:
        counts = engine._ranks.replicas[0][0].modules["l1"]
        engine.step(sample_batch(graph, 8))
        assert counts.calls == 2 * 4
        engine.predict(sample_batch(graph, 8))
        engine.evaluate(sample_batch(graph, 8))
        assert counts.calls == 2 * 4 + 4 + 4


class FailsWhen(nn.Module):
    """Raises on its n-th training forward."""

    def __init__(self, call: int) -> None:
        super().__init__()
        self.left = call

    def forward(self, x: Tensor) -> Tensor:
        self.left -= type(x) is Tensor  # shapes are inferred on fake ones
        if not self.left:
            raise ArithmeticError("out of luck")
        return x.cos()


@pytest.mark.parametrize(("call", "phase"), [(3, "forward"), (4, "backward")])
def test_a_failure_names_its_layer_in_either_forward(call: int, phase: str) -> None:
    graph = chain(nn.Linear(4, 4), nn.Tanh(), FailsWhen(call), nn.Linear(4, 4))
    plan = recomputing(planned(graph, 1), ["l0", "l1", "l2"])
    with pf.Engine(graph, plan, lambda p: torch.optim.SGD(p, lr=0.1)) as engine:
        with pytest.raises(LayerFailure, match="out of luck") as caught:
            engine.step(sample_batch(graph, 8))
        assert (caught.value.layer, caught.value.phase) == ("l2", phase)
