"""Cases in which pipelines are known to break, each told once, under every schedule and layout.

Written anew from their descriptions in the issue trackers and test suites of other engines.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pipeflow as pf
from pipeflow.errors import GraphError, PlanError
from pipeflow.testing import check_layout_invariance, run_ranks, unit_costs
from pipeflow.testing.graphs import RunningShift, concatenate, sample_batch
from tests.runtime.models import make_plan

WIDTH = 6


def linear(width: int = WIDTH) -> Any:
    return pf.lazy(nn.Linear, WIDTH, width, dtype=torch.float64)


def start(name: str) -> tuple[pf.LayerGraph, Any]:
    graph = pf.LayerGraph(name)
    return graph, graph.add("first", linear(), graph.input("x", ("B", WIDTH), dtype="float64"))


def finish(graph: pf.LayerGraph, value: Any) -> pf.LayerGraph:
    head = graph.add("head", linear(), value)
    graph.loss("loss", nn.functional.mse_loss, head, graph.input("target", ("B", WIDTH), dtype="float64"))
    return graph


def constant_crosses_a_boundary() -> pf.LayerGraph:
    """A tensor that needs no gradient, made on one stage and read on another."""
    graph, h = start("constant")
    constant = graph.add("constant", torch.full_like, h, fill_value=0.5)
    return finish(graph, graph.add("scale", torch.mul, graph.add("second", linear(), h), constant))


class Alias(nn.Module):
    """One parameter under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)
        self.two = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.two(torch.tanh(self.one(x)))
        return result


def parameter_alias() -> pf.LayerGraph:
    graph, h = start("alias")
    return finish(graph, graph.add("alias", Alias(), h))


def several_inputs_with_kwargs() -> pf.LayerGraph:
    graph, h = start("kwargs")
    other = graph.add("other", linear(), graph.input("y", ("B", WIDTH), dtype="float64"))
    return finish(graph, graph.add("add", torch.add, h, other, alpha=0.25))


def output_is_a_view() -> pf.LayerGraph:
    graph, h = start("view")
    return finish(graph, graph.add("flatten", nn.Flatten(), graph.add("fold", nn.Unflatten(1, (2, 3)), h)))


def shared_weight_used_twice() -> pf.LayerGraph:
    """The same module in two layers: they share a stage, and its gradient is one sum."""
    module = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)
    graph, h = start("twice")
    again = graph.add("again", module, graph.add("between", torch.tanh, graph.add("once", module, h)))
    return finish(graph, again)


def shared_weight_first_used_where_nothing_learns() -> pf.LayerGraph:
    """The first layer that has the weight is a dead end; the weight is trained through the second."""
    module = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)
    graph = pf.LayerGraph("dead end")
    x = graph.input("x", ("B", WIDTH), dtype="float64")
    graph.add("dead", module, x)
    return finish(graph, graph.add("used", module, x))


class Half(torch.autograd.Function):
    """Passes half of the gradient on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient / 2


def half(x: Tensor) -> Tensor:
    result: Tensor = Half.apply(x)  # type: ignore[no-untyped-call]
    return result


def custom_autograd_function() -> pf.LayerGraph:
    graph, h = start("custom")
    return finish(graph, graph.add("half", half, h))


def multi_output_intermediates() -> pf.LayerGraph:
    """Parts of one output go to different stages; one of them nobody reads."""
    graph, h = start("parts")
    one, two, _ = graph.add("parts", torch.chunk, h, chunks=3, dim=1)
    left = graph.add("left", pf.lazy(nn.Linear, 2, WIDTH, dtype=torch.float64), one)
    right = graph.add("right", pf.lazy(nn.Linear, 2, WIDTH, dtype=torch.float64), two)
    return finish(graph, graph.add("sum", torch.add, left, right))


def skip_one_to_three() -> pf.LayerGraph:
    """A skip that three later stages read, whose gradients add up as on one device."""
    graph, h = start("skip")
    value = h
    for i in range(3):
        value = graph.add(f"join{i}", torch.add, graph.add(f"block{i}", linear(), value), h)
    return finish(graph, value)


def integers_and_booleans_between_stages() -> pf.LayerGraph:
    graph, h = start("integers")
    best = graph.add("best", torch.argmax, h, dim=1, keepdim=True)
    mask = graph.add("mask", torch.gt, h, other=0.0)
    gated = graph.add("gated", torch.where, mask, graph.add("second", linear(), h), h)
    return finish(graph, graph.add("shift", shifted, gated, best))


def shifted(x: Tensor, index: Tensor) -> Tensor:
    return x + x.gather(1, index)


def input_and_loss_on_every_stage() -> pf.LayerGraph:
    """Inputs enter, and losses leave, at different stages."""
    graph, h = start("many")
    for i in range(2):
        target = graph.input(f"target{i}", ("B", WIDTH), dtype="float64")
        graph.loss(f"aux{i}", nn.functional.mse_loss, h, target, weight=0.5, reduction="sum" if i else "mean")
        h = graph.add(f"block{i}", linear(), h)
    return finish(graph, h)


def parallel_branches() -> pf.LayerGraph:
    """Branches that could run at the same time, read in another order than they are declared."""
    graph, h = start("branches")
    branches = [graph.add(f"branch{i}", linear(), h) for i in range(3)]
    return finish(
        graph, graph.add("join", torch.add, graph.add("late", torch.add, branches[2], branches[0]), branches[1])
    )


def nobody_reads_an_output() -> pf.LayerGraph:
    graph, h = start("unread")
    graph.add("dead", linear(), h)
    return finish(graph, graph.add("second", linear(), h))


def read_twice_by_one_layer() -> pf.LayerGraph:
    """A layer that reads a tensor in two places adds those gradients up before anybody else's."""
    graph, h = start("both")
    both = graph.add("both", pf.lazy(nn.Bilinear, WIDTH, WIDTH, WIDTH, dtype=torch.float64), h, h)
    target = graph.input("other", ("B", WIDTH), dtype="float64")
    graph = finish(graph, both)
    graph.loss("side", nn.functional.mse_loss, graph.add("tail", linear(), h), target)
    return graph


def gradient_is_a_view() -> pf.LayerGraph:
    """What `cat` gives back is a part of a larger tensor; over it, kernels add in another order."""
    graph, h = start("cat")
    other = graph.input("x0", ("B", 5), dtype="float64")
    joined = graph.add("join", concatenate, other, graph.add("mlp", linear(), h))
    return finish(graph, graph.add("narrow", pf.lazy(nn.Linear, WIDTH + 5, WIDTH, dtype=torch.float64), joined))


class NoGradient(torch.autograd.Function):
    """Gives its value and takes no gradient back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> None:
        return None


def gradient_that_is_not_given() -> pf.LayerGraph:
    """What is before has none then, on one device: not one of zeros, by which weights would decay."""
    graph, h = start("none")
    other = graph.add("side", linear(), h)
    stopped = graph.add("stop", NoGradient.apply, graph.add("alone", linear(), h))
    return finish(graph, graph.add("join", torch.add, other, graph.add("after", linear(), stopped)))


CASES: list[Callable[[], pf.LayerGraph]] = [
    constant_crosses_a_boundary,
    parameter_alias,
    several_inputs_with_kwargs,
    output_is_a_view,
    shared_weight_used_twice,
    shared_weight_first_used_where_nothing_learns,
    custom_autograd_function,
    multi_output_intermediates,
    skip_one_to_three,
    integers_and_booleans_between_stages,
    input_and_loss_on_every_stage,
    parallel_branches,
    nobody_reads_an_output,
    read_twice_by_one_layer,
    gradient_is_a_view,
    gradient_that_is_not_given,
]
SIZES = [(10,), (8, 4, 12), (3, 1)]


def stages_of(graph: pf.LayerGraph) -> list[list[str]]:
    """Each layer a stage of its own, but for those that share parameters."""
    names = list(graph.layers)
    bounds = list(range(len(names)))
    for group in graph.colocated:
        first, last = names.index(group[0]), names.index(group[-1])
        bounds = [b for b in bounds if not first < b <= last]
    return [names[a:b] for a, b in zip(bounds, [*bounds[1:], len(names)], strict=True)]


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_trains_as_on_one_device(case: Callable[[], pf.LayerGraph], schedule: str) -> None:
    graph = case()
    stages = stages_of(graph)
    single = [(layers, (i % 3,)) for i, layers in enumerate(stages)]
    replicas = [(layers, (0, 1, 2)[: 1 + i % 3]) for i, layers in enumerate(stages)]
    for layout in (single, replicas):
        plan = make_plan(graph, layout, num_microbatches=4, schedule=schedule)
        for sizes in SIZES:
            check_layout_invariance(graph, plan, [sample_batch(graph, n, seed=n) for n in sizes])


def over_gloo(rank: int) -> None:
    for case in CASES:
        graph = case()
        layout = [(layers, (0, 1, 2)[: 1 + i % 3] if i % 2 else (i % 3,)) for i, layers in enumerate(stages_of(graph))]
        plan = make_plan(graph, layout, num_microbatches=4)
        assert plan.num_ranks == 3
        check_layout_invariance(graph, plan, [sample_batch(graph, n, seed=n) for n in (10, 3)])


def test_trains_as_on_one_device_over_processes() -> None:
    for result in run_ranks(over_gloo, 3):
        assert result.error is None, result.trace


def test_layers_that_share_weights_are_not_split() -> None:
    graph = shared_weight_used_twice()
    names = list(graph.layers)
    with pytest.raises(PlanError, match="share parameters and must share a stage"):
        make_plan(graph, [(names[:2], (0,)), (names[2:], (1,))])
    assert pf.plan(graph, unit_costs(graph), pf.Cluster.uniform(2), batch_size=4).stages


def test_costs_that_know_of_no_parameters_are_refused() -> None:
    graph = parameter_alias()
    costs = unit_costs(graph)
    bare = costs.model_copy(
        update={"layers": tuple(layer.model_copy(update={"parameter_bytes": 0}) for layer in costs.layers)}
    )
    plan = pf.plan(None, bare, pf.Cluster.uniform(2), batch_size=4, num_stages=2)
    with pytest.raises(PlanError, match=r"has \d+ bytes of parameters, but by the plan's costs"):
        pf.Engine(graph, plan, torch.optim.SGD)


def test_a_layer_that_changes_its_input_is_refused() -> None:
    graph, h = start("inplace")
    with pytest.raises(GraphError, match="inplace|in place"):
        graph.add("relu", nn.ReLU(inplace=True), h)


def test_unknown_buffers_are_not_replicated() -> None:
    graph, h = start("running")
    graph = finish(graph, graph.add("shift", pf.lazy(RunningShift, WIDTH, dtype=torch.float64), h))
    names = list(graph.layers)
    plan = make_plan(graph, [(names[:2], (0, 1)), (names[2:], (1,))])
    with pytest.raises(PlanError, match="layer 'shift' would not train as on one device with several"):
        pf.Engine(graph, plan, torch.optim.SGD)
    check_layout_invariance(
        graph,
        make_plan(graph, [(names[:1], (0,)), (names[1:2], (1,)), (names[2:], (0,))]),
        [sample_batch(graph, n) for n in (8, 12)],
    )


def test_what_passes_between_layers_is_contiguous() -> None:
    """The view of a gradient used to reach the layer before the cut as it was, and its copy after."""
    seen: list[bool] = []

    class Spy(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            seen.append(gradient.is_contiguous())
            return gradient

    def spy(x: Tensor) -> Tensor:
        result: Tensor = Spy.apply(x)  # type: ignore[no-untyped-call]
        return result

    graph, h = start("spied")
    joined = graph.add("join", concatenate, graph.input("x0", ("B", 5), dtype="float64"), graph.add("spy", spy, h))
    turned = graph.add("turned", torch.transpose, graph.add("wide", nn.Unflatten(1, (1, -1)), joined), dim0=1, dim1=2)
    flat = graph.add("flat", nn.Flatten(), turned)
    graph = finish(graph, graph.add("narrow", pf.lazy(nn.Linear, WIDTH + 5, WIDTH, dtype=torch.float64), flat))
    names = list(graph.layers)
    assert 1 in graph.layers["join"].strided_gradients
    seen.clear()
    plan = make_plan(graph, [(names[:2], (0,)), (names[2:], (1,))], num_microbatches=2)
    check_layout_invariance(graph, plan, [sample_batch(graph, 6)])
    assert len(seen) == 4
    assert all(seen)
