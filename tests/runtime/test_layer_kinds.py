"""Layers that do more in forward or backward than call kernels: each trains as on one device, in every layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pipeflow as pf
from pipeflow.testing import check_layout_invariance, run_ranks
from pipeflow.testing.graphs import sample_batch
from tests.runtime.models import make_plan
from tests.runtime.test_known_cases import WIDTH, finish, linear, stages_of, start


def doubled(module: nn.Module, given: Any, wanted: Any) -> Any:
    return tuple(2 * g for g in given)


def full_backward_hook(register: bool = True) -> pf.LayerGraph:
    graph, h = start("hooked")
    module = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)
    nn.init.eye_(module.weight)
    nn.init.zeros_(module.bias)
    if register:
        module.register_full_backward_hook(doubled)
    return finish(graph, graph.add("hooked", module, h))


def tensor_hooks(x: Tensor) -> Tensor:
    """Hooks on what comes in and on what goes out, whose gradients arrive from another stage."""
    y = x * 1
    for tensor in (x, y):
        if tensor.requires_grad:
            tensor.register_hook(lambda gradient: gradient * 1.5)  # type: ignore[no-untyped-call]
    return y


def hooks_on_tensors() -> pf.LayerGraph:
    graph, h = start("tensor hooks")
    y = graph.add("hooks", tensor_hooks, h)
    joined = graph.add("join", torch.add, graph.add("one", linear(), y), graph.add("two", linear(), y))
    return finish(graph, graph.add("skip", torch.mul, joined, h))


class Weight(nn.Module):
    """Gives its weight beside its output, for another layer to use: tied without being shared."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(x), self.linear.weight


def weight_between_layers() -> pf.LayerGraph:
    graph, h = start("weight")
    h, weight = graph.add("give", pf.lazy(Weight), h)
    assert graph.specs["give:1"].shape == (WIDTH, WIDTH)
    for i in range(3):
        h = graph.add(f"use{i}", torch.matmul, graph.add(f"block{i}", linear(), h), weight)
    return finish(graph, h)


class Checkpointed(nn.Module):
    """Recomputes itself in backward, by torch's own means."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(WIDTH, WIDTH, dtype=torch.float64), nn.Tanh())

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.inner, x, use_reentrant=False)


class CheckpointedDropout(nn.Module):
    """Draws a mask in forward, and again in backward: one as torch does by default, one by nested backwards."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(WIDTH, WIDTH, dtype=torch.float64), nn.Dropout(0.4), nn.Tanh())
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.inner, x, use_reentrant=self.reentrant) if self.training else self.inner(x)


def checkpointed_dropout(reentrant: bool = False) -> pf.LayerGraph:
    """Checkpoints and dropout on every stage: the threads of all of them want the one generator there is."""
    graph, h = start("checkpointed dropout")
    for i in range(6):
        h = graph.add(f"checkpointed{i}", pf.lazy(CheckpointedDropout, reentrant), h)
        h = graph.add(f"dropped{i}", nn.Dropout(0.2), h)
    return finish(graph, h)


def reentrant_checkpoints() -> pf.LayerGraph:
    return checkpointed_dropout(reentrant=True)


def torch_checkpoint() -> pf.LayerGraph:
    graph, h = start("checkpoint")
    return finish(graph, graph.add("checkpointed", pf.lazy(Checkpointed), h))


def parametrized() -> pf.LayerGraph:
    graph, h = start("parametrized")
    module = nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH, dtype=torch.float64))
    return finish(graph, graph.add("normed", module, h))


def gradient_within(x: Tensor) -> Tensor:
    """A gradient in forward, which backward differentiates once more."""
    if not x.requires_grad:
        x = x.detach().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(x.pow(3).sum(), x, create_graph=True)
    return gradient


def second_derivative() -> pf.LayerGraph:
    graph, h = start("second derivative")
    return finish(graph, graph.add("within", gradient_within, h))


def off_the_mean(x: Tensor) -> tuple[Tensor, Tensor]:
    mean = x.mean()
    return x - mean, mean


class Counting(nn.Module):
    """Adds to a buffer, which has two names, and multiplies by it, so that backward needs it as it was."""

    seen: Tensor
    again: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.ones(WIDTH, dtype=torch.float64))
        self.register_buffer("again", self.seen)
        self.linear = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        self.seen += y.detach().square().mean(0)
        result: Tensor = y * self.again / self.seen.sum()
        return result


class Replacing(nn.Module):
    """Another buffer after each forward; and one that changes in evaluation alone."""

    seen: Tensor
    evaluated: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.ones(WIDTH, dtype=torch.float64))
        self.register_buffer("evaluated", torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen = self.seen * 0.5 + x.detach().mean(0)
        else:
            self.evaluated += 1
        return x * self.seen / self.evaluated


def buffers_in_backward() -> pf.LayerGraph:
    graph, h = start("buffers")
    for i in range(3):
        h = graph.add(f"counting{i}", pf.lazy(Counting), h)
        h = graph.add(f"replacing{i}", pf.lazy(Replacing), h)
    return finish(graph, h)


class NoisyInEvaluation(nn.Module):
    """Draws where torch's dropout does not."""

    def forward(self, x: Tensor) -> Tensor:
        return x if self.training else x * torch.rand_like(x)


def random_in_evaluation() -> pf.LayerGraph:
    graph, h = start("noisy evaluation")
    for i in range(3):
        h = graph.add(f"noisy{i}", pf.lazy(NoisyInEvaluation), h)
    return finish(graph, h)


def number_between_layers() -> pf.LayerGraph:
    """A tensor without dimensions, one for each micro-batch."""
    graph, h = start("number")
    h, mean = graph.add("off", off_the_mean, h)
    return finish(graph, graph.add("scale", torch.mul, graph.add("second", linear(), h), mean))


CASES: list[Callable[[], pf.LayerGraph]] = [
    full_backward_hook,
    hooks_on_tensors,
    weight_between_layers,
    torch_checkpoint,
    checkpointed_dropout,
    reentrant_checkpoints,
    parametrized,
    second_derivative,
    random_in_evaluation,
    number_between_layers,
]


NOT_REPLICABLE = [buffers_in_backward]


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize("case", [*CASES, *NOT_REPLICABLE], ids=lambda case: case.__name__)
def test_trains_as_on_one_device(case: Callable[[], pf.LayerGraph], schedule: str) -> None:
    graph = case()
    stages = stages_of(graph)
    single = [(layers, (i % 3,)) for i, layers in enumerate(stages)]
    replicas = [(layers, (0, 1, 2)[: 1 + i % 3]) for i, layers in enumerate(stages)]
    for layout in (single,) if case in NOT_REPLICABLE else (single, replicas):
        plan = make_plan(graph, layout, num_microbatches=4, schedule=schedule)
        check_layout_invariance(graph, plan, [sample_batch(graph, n, seed=n) for n in (10, 3)])


def over_gloo(rank: int) -> None:
    for case in CASES:
        graph = case()
        layout = [(layers, (0, 1, 2)[: 1 + i % 3] if i % 2 else (i % 3,)) for i, layers in enumerate(stages_of(graph))]
        plan = make_plan(graph, layout, num_microbatches=4)
        check_layout_invariance(graph, plan, [sample_batch(graph, n, seed=n) for n in (10, 3)])


def test_trains_as_on_one_device_over_processes() -> None:
    for result in run_ranks(over_gloo, 3):
        assert result.error is None, result.trace


def test_a_backward_hook_goes_with_the_copies() -> None:
    """The reference copies modules as the engine does: that the hook runs at all is seen here."""
    moved = []
    for register in (False, True):
        graph = full_backward_hook(register)
        reference = pf.Reference(graph, lambda parameters: torch.optim.SGD(parameters, lr=1.0))
        before = reference.state_dict()["first.weight"]
        reference.step(sample_batch(graph, 4))
        moved.append(reference.state_dict()["first.weight"] - before)
    torch.testing.assert_close(moved[1], 2 * moved[0])


def test_checkpoints_of_all_ranks_take_turns_at_the_generator() -> None:
    """Two draws at once would be of one state: what comes out would differ from run to run."""
    graph = checkpointed_dropout()
    stages = [(layers, (i,)) for i, layers in enumerate(stages_of(graph))]
    plan = make_plan(graph, stages, num_microbatches=16)
    check_layout_invariance(graph, plan, [sample_batch(graph, 16, seed=n) for n in range(8)])
