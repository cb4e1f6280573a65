"""The law that everything is for: any valid plan trains as one device does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pipeflow.engine import Engine
from pipeflow.execution_plan import Plan
from pipeflow.graphs.layer_graph import LayerGraph
from pipeflow.graphs.sharing import shared_groups
from pipeflow.runtime.microbatch import Batch
from pipeflow.runtime.reference import Reference
from pipeflow.runtime.replica import OptimizerFactory

Trajectory = tuple[list[dict[str, float]], dict[str, Tensor]]
"""The losses of every step (the last entry: of an evaluation), and the state after."""


def train_reference(
    graph: LayerGraph,
    batches: Sequence[Batch],
    optimizer: OptimizerFactory,
    *,
    num_microbatches: int,
    seed: int = 0,
    num_accumulated: int = 0,
    options: Mapping[str, Any] | None = None,
) -> Trajectory:
    """What one device makes of the batches."""
    reference = Reference(graph, optimizer, num_microbatches=num_microbatches, seed=seed, **(options or {}))
    losses = _train(reference, batches, num_accumulated)
    losses.append(dict(reference.evaluate(batches[0]).losses))
    return losses, reference.state_dict()


def train_plan(
    graph: LayerGraph,
    plan: Plan,
    batches: Sequence[Batch],
    optimizer: OptimizerFactory,
    *,
    seed: int = 0,
    num_accumulated: int = 0,
    options: Mapping[str, Any] | None = None,
) -> Trajectory:
    """What the engine makes of them: in threads, or on this rank of a process group."""
    with Engine(graph, plan, optimizer, seed=seed, num_threads=1, **(options or {})) as engine:
        losses = _train(engine, batches, num_accumulated)
        losses.append(dict(engine.evaluate(batches[0]).losses))
        return losses, engine.state_dict()


def _train(trainer: Engine | Reference, batches: Sequence[Batch], num_accumulated: int) -> list[dict[str, float]]:
    """The losses of every batch; after each `num_accumulated` without a step comes one with."""
    losses = []
    for i, batch in enumerate(batches):
        last = i % (num_accumulated + 1) == num_accumulated or i == len(batches) - 1
        losses.append(dict((trainer.step if last else trainer.accumulate)(batch).losses))
    return losses


def compare_trajectories(expected: Trajectory, seen: Trajectory, *, tolerance: float | None, story: str) -> None:
    """Raises AssertionError where two trajectories differ.

    Args:
        tolerance: relative, on losses and on the norm of each tensor; None for equality to the last bit.
        story: what was run, for the message.
    """
    for step, (a, b) in enumerate(zip(expected[0], seen[0], strict=True)):
        for name in a:
            close = tolerance is not None and abs(a[name] - b[name]) <= tolerance * max(1.0, abs(a[name]))
            same = a[name] == b[name] or close or (a[name] != a[name] and b[name] != b[name])
            assert same, f"{story}: loss {name!r} of step {step} is {b[name]!r}, on one device {a[name]!r}"
    assert expected[1].keys() == seen[1].keys(), f"{story}: the state has other names than on one device"
    for name, value in expected[1].items():
        other = seen[1][name]
        if tolerance is None or not value.is_floating_point():
            assert torch.equal(value, other), f"{story}: {name!r} differs by {(value - other).abs().max():.3g}"
        else:
            exact = value.to(torch.float64)
            error = (exact - other.to(torch.float64)).norm() / max(1.0, float(exact.norm()))
            assert error <= tolerance, f"{story}: {name!r} differs by {float(error):.3g} relative"


def _keeps_copies(plan: Plan) -> bool:
    return bool(shared_groups(plan.costs, [stage.layers for stage in plan.stages]))


def check_layout_invariance(
    graph: LayerGraph,
    plan: Plan,
    batches: Sequence[Batch],
    *,
    optimizer: OptimizerFactory | None = None,
    seed: int = 0,
    num_accumulated: int = 0,
    options: Mapping[str, Any] | None = None,
    tolerance: float | None = None,
) -> None:
    """Raises AssertionError unless the plan trains the graph as one device does.

    Compares the losses of every step, of an evaluation after, and all parameters and buffers:
    to the last bit where every stage has one replica and none a copy of another's parameter, else
    within `tolerance`.

    Args:
        graph: the model. Use float64 with several replicas, and with copies of shared parameters.
        plan: for it.
        batches: training steps to take, of any sizes, each whole or in micro-batches.
        optimizer: by default SGD with momentum and weight decay, which moves what has a gradient of zeros and
            leaves alone what has none; with several replicas in small steps, so that
            rounding is not blown up, and else in larger ones, so that a gradient's last bit shows.
        num_accumulated: batches whose gradients are only added up, before each that steps.
        options: further keyword options that engine and reference share (`training_options`).
        tolerance: relative; by default 1e-12, which float64 holds.
    """

    def sgd(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.05 if single else 1e-3, momentum=0.9, weight_decay=0.01)

    factory = optimizer or sgd
    single = all(stage.num_replicas == 1 for stage in plan.stages) and not _keeps_copies(plan)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # kernels may add in another order with more
    try:
        expected = train_reference(
            graph,
            batches,
            factory,
            num_microbatches=plan.num_microbatches,
            seed=seed,
            num_accumulated=num_accumulated,
            options=options,
        )
        seen = train_plan(graph, plan, batches, factory, seed=seed, num_accumulated=num_accumulated, options=options)
    finally:
        torch.set_num_threads(threads)
    story = f"{plan.schedule} of {len(plan.stages)} stages on {plan.placement}, {plan.num_microbatches} micro-batches"
    story += "".join(f", {name}={value!r}" for name, value in (options or {}).items())
    compare_trajectories(expected, seen, tolerance=None if single else tolerance or 1e-12, story=story)
