"""Trains a recipe by a plan, and on one device for comparison. Decides nothing; says what happened.

Under `torchrun` every rank calls these with the same arguments, and the same batches come from
the recipe on each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from statistics import median
from typing import TYPE_CHECKING

import torch

from pipeflow.engine import Engine
from pipeflow.report.run import Comparison, Epoch, Run, stage_seconds
from pipeflow.runtime.reference import Reference
from pipeflow.simulator import simulate

if TYPE_CHECKING:
    from torch import Tensor

    from pipeflow.execution_plan import Plan
    from pipeflow.graphs.layer_graph import LayerGraph
    from pipeflow.recipe import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is trained, and how long.

    Attributes:
        num_epochs: passes over the training data.
        seed: of initial weights, of random layers and of the order of samples.
        num_threads: threads of torch inside each rank, and on the one device it is compared with:
            sums inside an operation may be ordered by them.
    """

    recipe: Recipe
    graph: LayerGraph
    plan: Plan
    num_epochs: int
    seed: int
    num_threads: int

    def steps(self, epoch: int) -> Iterator[tuple[Mapping[str, Tensor], str | None]]:
        """(batch, phase) of every training step: each batch serves all phases in turn."""
        for batch in self.recipe.train_batches(epoch, self.seed):
            for phase in tuple(self.graph.phases) or (None,):
                yield batch, phase


def train(
    job: Job,
    *,
    is_distributed: bool,
    on_step: Callable[[float], None] = lambda loss: None,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
) -> tuple[Run, dict[str, Tensor]]:
    """Trains, and tests after every epoch.

    Returns:
        The run without a comparison, and the parameters at the end.
    """
    recipe = job.recipe
    losses: list[float] = []
    epochs: list[Epoch] = []
    with Engine(
        job.graph,
        job.plan,
        recipe.optimizer,
        lr_scheduler=recipe.lr_scheduler,
        seed=job.seed,
        num_threads=job.num_threads,
        measure=True,
    ) as engine:
        for index in range(job.num_epochs):
            start, total, num_samples = time.perf_counter(), 0.0, 0
            for batch, phase in job.steps(index):
                result = engine.step(batch, phase=phase)
                losses.append(result.loss)
                total += result.loss * result.num_samples
                num_samples += result.num_samples
                on_step(result.loss)
            seconds = time.perf_counter() - start
            epochs.append(Epoch(index, total / max(num_samples, 1), *_test(recipe, engine), seconds))
            on_epoch(epochs[-1])
        measured = engine.measured()
        state = engine.state_dict()
    timeline = simulate(job.plan)
    run = Run(
        name=recipe.name,
        digest=job.plan.digest,
        num_ranks=job.plan.num_ranks,
        ranks_are="processes" if is_distributed else "ranks of one process",
        epochs=tuple(epochs),
        losses=tuple(losses),
        stages=stage_seconds(job.plan, timeline, measured),
        predicted_iteration_seconds=timeline.makespan,
        measured_iteration_seconds=measured.iteration_seconds,
        predicted_bytes_by_rank=measured.predicted_bytes_by_rank,
        measured_bytes_by_rank=measured.peak_bytes_by_rank,
        metric_name=recipe.metric_name,
        metric_goal=recipe.metric_goal if job.num_epochs >= recipe.num_epochs else None,
        comparison=None,
    )
    return run, state


def _test(recipe: Recipe, engine: Engine) -> tuple[float, float | None]:
    """(mean loss, mean metric) over the test samples."""
    loss, metric, num_samples = 0.0, 0.0, 0
    for batch in recipe.test_batches():
        result = engine.evaluate(batch)
        loss += result.loss * result.num_samples
        num_samples += result.num_samples
        if recipe.metric is not None:
            metric += recipe.metric(engine.predict(batch), batch) * result.num_samples
    count = max(num_samples, 1)
    return loss / count, None if recipe.metric is None else metric / count


def compare(
    job: Job, run: Run, state: Mapping[str, Tensor], *, on_step: Callable[[float], None] = lambda loss: None
) -> Comparison:
    """Takes the same steps on one device and says how far the run is from it.

    Args:
        run, state: what `train` returned.
    """
    kind = job.plan.cluster.devices[0].kind
    before = torch.get_num_threads()
    torch.set_num_threads(job.num_threads)
    try:
        reference = Reference(
            job.graph,
            job.recipe.optimizer,
            lr_scheduler=job.recipe.lr_scheduler,
            num_microbatches=job.plan.num_microbatches,
            seed=job.seed,
            device=kind if kind == "cuda" else "cpu",
        )
        differences, seconds = [], []
        steps = chain.from_iterable(job.steps(epoch) for epoch in range(job.num_epochs))
        for (batch, phase), loss in zip(steps, run.losses, strict=True):
            start = time.perf_counter()
            own = reference.step(batch, phase=phase).loss
            seconds.append(time.perf_counter() - start)
            differences.append(abs(own - loss))
            on_step(own)
    finally:
        torch.set_num_threads(before)
    largest = max(differences, default=0.0)
    return Comparison(
        num_steps=len(differences),
        largest_loss_difference=largest,
        at_step=differences.index(largest) if differences else 0,
        largest_parameter_difference=max(
            (
                (tensor.cpu().double() - state[name].double()).abs().max().item()
                for name, tensor in reference.state_dict().items()
                if tensor.numel()
            ),
            default=0.0,
        ),
        iteration_seconds=median(seconds) if seconds else 0.0,
    )
