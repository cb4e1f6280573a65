"""Synchronised norms: R replicas with M micro-batches train as one device with M / R larger ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn

import pipeflow as pf
from pipeflow.errors import LayerFailure, PlanError, VerificationError
from pipeflow.lowering import lower
from pipeflow.program import Compute, Kind, Placement
from pipeflow.runtime.cut import even_cut
from pipeflow.runtime.reference import Reference
from pipeflow.schedules import ComputeOrder
from pipeflow.testing.graphs import sample_batch
from pipeflow.testing.processes import run_ranks
from tests.runtime.models import make_plan, sgd
from tests.runtime.test_running_statistics import CASES, CHANNELS, OwnForward, instance_norm, no_statistics, normed

SYNCHRONISED = [case for case in CASES if case not in (instance_norm, no_statistics)]
NUM_MICROBATCHES = 5


def equal_replicas(graph: pf.LayerGraph, schedule: str = "1f1b") -> pf.Plan:
    """Two stages with two replicas each, the norms on the second."""
    first, *norms, out, loss = graph.layers
    stages = [([first], (0, 1)), ([*norms, out, loss], (3, 2))]
    return make_plan(graph, stages, num_microbatches=NUM_MICROBATCHES, schedule=schedule)


def unequal_replicas(graph: pf.LayerGraph, schedule: str = "1f1b") -> pf.Plan:
    """Norms on three replicas."""
    first, *rest = graph.layers
    stages = [([first], (0,)), (rest, (1, 3, 2))]
    return make_plan(graph, stages, num_microbatches=NUM_MICROBATCHES, schedule=schedule)


def grouped(batch: Mapping[str, Tensor], num_replicas: int) -> list[dict[str, Tensor]]:
    """The micro-batches that replicas run at the same time, joined."""
    sizes = even_cut(len(next(iter(batch.values()))), NUM_MICROBATCHES).sizes
    joined = [sum(sizes[i : i + num_replicas]) for i in range(0, len(sizes), num_replicas)]
    parts = {name: torch.split(value, joined) for name, value in batch.items()}
    return [{name: parts[name][i] for name in batch} for i in range(len(joined))]


def check_as_one_device(graph: pf.LayerGraph, plan: pf.Plan, *, num_replicas: int) -> None:
    """Batches of unequal micro-batches, of fewer than there are, and one sample in each."""
    batches = [sample_batch(graph, n, seed=n) for n in (12, 4, 7)]
    reference = Reference(graph, sgd, num_microbatches=NUM_MICROBATCHES)
    with pf.Engine(graph, plan, sgd, batch_norm="synchronised") as engine:
        for batch in batches:
            expected = reference.step(grouped(batch, num_replicas)).loss
            assert engine.step(batch).loss == pytest.approx(expected, rel=1e-12, abs=0)
        reference.accumulate(grouped(batches[0], num_replicas))
        engine.accumulate(batches[0])
        assert engine.evaluate(batches[1]).loss == pytest.approx(reference.evaluate(batches[1]).loss, rel=1e-12)
        state = engine.state_dict()
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-12, atol=1e-14, msg=name)


@pytest.mark.parametrize("schedule", pf.SCHEDULES)
@pytest.mark.parametrize("case", SYNCHRONISED, ids=lambda case: case.__name__)
def test_replicas_divide_by_what_all_of_them_see(case: Callable[[], pf.LayerGraph], schedule: str) -> None:
    graph = case()
    check_as_one_device(graph, equal_replicas(graph, schedule), num_replicas=2)
    check_as_one_device(graph, unequal_replicas(graph, schedule), num_replicas=3)


@pytest.mark.parametrize("case", SYNCHRONISED, ids=lambda case: case.__name__)
def test_norms_that_are_computed_again_divide_by_the_same(case: Callable[[], pf.LayerGraph]) -> None:
    graph = case()
    plan = equal_replicas(graph)
    again = tuple(stage.with_recompute([n for n in stage.layers if n != "loss"]) for stage in plan.stages)
    check_as_one_device(graph, plan.model_copy(update={"stages": again}), num_replicas=2)


def masked_norms() -> pf.LayerGraph:
    """Random numbers before, between and after norms of one layer, and in others."""
    norms = [pf.lazy(nn.BatchNorm1d, CHANNELS, dtype=torch.float64) for _ in range(2)]
    drops = [pf.lazy(nn.Dropout, 0.3) for _ in range(3)]
    return normed(pf.lazy(nn.Sequential, drops[0], norms[0], drops[1], norms[1], drops[2]), nn.Dropout(0.2))


@pytest.mark.parametrize("again", [False, True])
def test_norms_of_random_layers_wait_without_keeping_the_generator(again: bool) -> None:
    """There is one generator for all threads: a norm that waits for one which needs it would wait forever."""
    graph = masked_norms()
    plan = unequal_replicas(graph)
    if again:
        stages = tuple(stage.with_recompute([n for n in stage.layers if n != "loss"]) for stage in plan.stages)
        plan = plan.model_copy(update={"stages": stages})
    runs: list[list[float]] = []
    for _ in range(2):
        torch.manual_seed(len(runs))
        state = torch.get_rng_state()
        with pf.Engine(graph, plan, sgd, batch_norm="synchronised") as engine:
            runs.append([engine.step(sample_batch(graph, n, seed=n)).loss for n in (12, 4, 7)])
        assert torch.equal(torch.get_rng_state(), state)
    assert runs[0] == runs[1]


def over_gloo(rank: int) -> None:
    for case in SYNCHRONISED:
        graph = case()
        check_as_one_device(graph, equal_replicas(graph), num_replicas=2)
        check_as_one_device(graph, unequal_replicas(graph, "gpipe"), num_replicas=3)


def test_replicas_divide_by_what_all_of_them_see_over_processes() -> None:
    for result in run_ranks(over_gloo, 4):
        assert result.error is None, result.trace


def masked_over_gloo(rank: int) -> list[float]:
    graph = masked_norms()
    with pf.Engine(graph, unequal_replicas(graph), sgd, batch_norm="synchronised") as engine:
        return [engine.step(sample_batch(graph, n, seed=n)).loss for n in (12, 4, 7)]


def test_norms_of_random_layers_draw_alike_in_threads_and_processes() -> None:
    graph = masked_norms()
    with pf.Engine(graph, unequal_replicas(graph), sgd, batch_norm="synchronised") as engine:
        expected = [engine.step(sample_batch(graph, n, seed=n)).loss for n in (12, 4, 7)]
    for result in run_ranks(masked_over_gloo, 4):
        assert result.value == pytest.approx(expected, rel=1e-12), result.trace


def test_single_replicas_and_instance_norms_are_as_they_were() -> None:
    """A group of one micro-batch is that micro-batch, bit for bit; an instance is normalised by itself."""
    graph = normed(pf.lazy(nn.BatchNorm1d, CHANNELS, dtype=torch.float64))
    first, *rest = graph.layers
    losses = []
    for choice in ("microbatch", "synchronised"):
        plan = make_plan(graph, [([first], (0, 1)), (rest, (2,))])
        with pf.Engine(graph, plan, sgd, batch_norm=choice) as engine:
            losses.append([engine.step(sample_batch(graph, 9)).loss for _ in range(3)])
    assert losses[0] == losses[1]
    graph = instance_norm()
    reference = Reference(graph, sgd, num_microbatches=NUM_MICROBATCHES)
    with pf.Engine(graph, equal_replicas(graph), sgd, batch_norm="synchronised") as engine:
        for n in (12, 4):
            batch = sample_batch(graph, n)
            assert engine.step(batch).loss == pytest.approx(reference.step(batch).loss, rel=1e-12)
        state = engine.state_dict()
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-12, atol=1e-14, msg=name)


@pytest.mark.parametrize("precision", [pf.Precision(autocast="bfloat16"), pf.Precision(parameters="bfloat16")])
def test_half_types_are_normalised_in_float32(precision: pf.Precision) -> None:
    """Compared with one device in the same types, as far as those resolve."""
    graph = pf.LayerGraph("half")
    h = graph.add("mix", pf.lazy(nn.Linear, 8, CHANNELS), graph.input("x", ("B", 8)))
    h = graph.add("norm", pf.lazy(nn.BatchNorm1d, CHANNELS), h)
    graph.loss("loss", square, graph.add("out", pf.lazy(nn.Linear, CHANNELS, 4), h))
    plan = make_plan(graph, [(["mix"], (0,)), (["norm", "out", "loss"], (1, 2))], num_microbatches=NUM_MICROBATCHES)
    reference = Reference(graph, sgd, num_microbatches=NUM_MICROBATCHES, precision=precision)
    with pf.Engine(graph, plan, sgd, batch_norm="synchronised", precision=precision) as engine:
        for n in (16, 10):
            batch = sample_batch(graph, n)
            assert engine.step(batch).loss == pytest.approx(reference.step(grouped(batch, 2)).loss, rel=2e-2)
        state = engine.state_dict()
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=2e-2, atol=2e-2, msg=name)


def square(x: Tensor) -> Tensor:
    return (x.float() - 1).square().mean()


def of_two_minds(placement: Placement, num_microbatches: int) -> ComputeOrder:
    """All forwards, then all backwards; but the last replica goes back after each forward."""
    order: list[list[Compute]] = [[] for _ in range(4)]
    for stage, ranks in enumerate(placement):
        for replica, rank in enumerate(ranks):
            mine = range(replica, num_microbatches, len(ranks))
            turns = [(Kind.FORWARD, m) for m in mine] + [(Kind.BACKWARD, m) for m in mine]
            if stage and replica:
                turns.sort(key=lambda turn: turn[1])
            order[rank] += [Compute(kind, stage, m) for kind, m in turns]
    return tuple(map(tuple, order))


def test_schedules_whose_replicas_would_wait_for_each_other_are_refused() -> None:
    """Without synchronised norms the same order of work runs: no replica waits for another."""
    graph = normed(pf.lazy(nn.BatchNorm1d, CHANNELS, dtype=torch.float64))
    plan = equal_replicas(graph)
    program = lower(plan, schedule=of_two_minds)
    pf.verify(program, plan=plan)
    with pytest.raises(VerificationError, match="cyclic wait of 2 ranks") as refused:
        pf.verify(program, plan=plan, lockstep=[1])
    assert refused.value.counterexample == (
        "rank 2 waits at '1B1' for rank 3",
        "rank 3 waits at '1F2' for rank 2",
    )


def test_an_engine_is_not_made_for_a_plan_that_would_wait_in_a_circle() -> None:
    graph = normed(pf.lazy(nn.BatchNorm1d, CHANNELS, dtype=torch.float64))
    first, *rest = graph.layers
    stages = [([first], (0, 1)), (rest[:-2], (1, 2, 0)), (rest[-2:], (3,))]
    plan = make_plan(graph, stages, num_microbatches=NUM_MICROBATCHES)
    pf.Engine(graph, plan, sgd).close()
    with pytest.raises(VerificationError, match="cyclic wait of 2 ranks: rank 0 waits at 'recv 1>0B0 mix' for rank 1"):
        pf.Engine(graph, plan, sgd, batch_norm="synchronised")


def test_norms_that_would_stay_as_they_are_are_refused() -> None:
    graph = no_statistics()
    with pytest.raises(PlanError, match="'norm0' has a BatchNorm1d without running statistics, which cannot be sync"):
        pf.Engine(graph, equal_replicas(graph), sgd, batch_norm="synchronised")
    graph = normed(pf.lazy(OwnForward, CHANNELS, track_running_stats=False, dtype=torch.float64))
    with pytest.raises(PlanError, match="'norm0' has a OwnForward without running statistics"):
        pf.Engine(graph, equal_replicas(graph), sgd, batch_norm="synchronised")


def test_a_replica_that_fails_ends_those_that_wait_for_it() -> None:
    graph = normed(pf.lazy(FailsAt, 3))
    with (
        pf.Engine(graph, equal_replicas(graph), sgd, batch_norm="synchronised") as engine,
        pytest.raises(LayerFailure, match="layer 'norm0', micro-batch 1") as failed,
    ):
        engine.step(marked(graph))
    assert (failed.value.rank, failed.value.stage, failed.value.phase) == (2, 1, "forward")


def failing_over_gloo(rank: int) -> str:
    graph = normed(pf.lazy(FailsAt, 3))
    with pf.Engine(graph, equal_replicas(graph), sgd, batch_norm="synchronised") as engine:
        try:
            engine.step(marked(graph))
        except LayerFailure as failure:
            return f"{failure.rank} {failure.layer} {failure.microbatch}"
    return "no failure"


def test_a_replica_that_fails_ends_those_that_wait_for_it_over_processes() -> None:
    for result in run_ranks(failing_over_gloo, 4, timeout=60):
        assert result.value == "2 norm0 1", result.trace


def marked(graph: pf.LayerGraph) -> dict[str, Tensor]:
    """Three samples in each micro-batch; those of the second are large."""
    batch = sample_batch(graph, 15)
    batch["x"][3:6] += 100
    return batch


class FailsAt(nn.Module):
    """A norm that refuses samples that are large before it is reached."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(channels, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        if type(x) is Tensor and bool((x > 0.999).all()):
            raise ValueError("too large")
        result: Tensor = self.norm(x)
        return result


def test_one_value_in_each_channel_is_refused_as_torch_refuses_it() -> None:
    graph = pf.LayerGraph("flat")
    h = graph.add("norm", pf.lazy(nn.BatchNorm1d, CHANNELS), graph.input("x", ("B", CHANNELS)))
    graph.loss("loss", square, h)
    with pf.Engine(
        graph,
        make_plan(graph, [(["norm", "loss"], (0, 1))], num_microbatches=2),
        sgd,
        batch_norm="synchronised",
    ) as engine:
        engine.step(sample_batch(graph, 2))  # one sample in each of two micro-batches
        with pytest.raises(LayerFailure, match="Expected more than 1 value per channel"):
            engine.step(sample_batch(graph, 1))
