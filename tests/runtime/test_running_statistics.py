"""Norms with running statistics train and evaluate on replicas as on one device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import pipeflow as pf
from pipeflow.errors import EngineError, LayerFailure, NonFiniteError, PlanError
from pipeflow.program import Reduce
from pipeflow.runtime.reference import Reference
from pipeflow.runtime.threads import ThreadTransport
from pipeflow.testing import check_layout_invariance
from pipeflow.testing.graphs import sample_batch
from pipeflow.testing.processes import run_ranks
from tests.runtime.models import make_plan, mean_square, sgd

CHANNELS = 3


def normed(*norms: object, shape: tuple[int, ...] = (5,)) -> pf.LayerGraph:
    """A layer that learns, the norms one after another, and a loss; inputs are (B, CHANNELS, *shape), float64."""
    graph = pf.LayerGraph("normed")
    h = graph.add("mix", pf.lazy(Scale, CHANNELS), graph.input("x", ("B", CHANNELS, *shape), "float64"))
    for i, norm in enumerate(norms):
        h = graph.add(f"norm{i}", norm, graph.add(f"act{i}", torch.tanh, h))
    graph.loss("loss", mean_square, graph.add("out", pf.lazy(Scale, CHANNELS), h))
    return graph


class Scale(nn.Module):
    """A weight per channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, channels, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.view(-1, *(1 for _ in x.shape[2:]))


class Twice(nn.Module):
    """One norm called twice, inside a layer, and another between."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(CHANNELS, dtype=torch.float64)
        self.other = nn.BatchNorm1d(CHANNELS, momentum=0.3, affine=False, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.norm(self.other(torch.sin(self.norm(x))))
        return result


class KeptInEvaluation(nn.Module):
    """A norm that is never in training, as models with pre-trained statistics have."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(CHANNELS, dtype=torch.float64)

    def train(self, mode: bool = True) -> KeptInEvaluation:
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.norm(x)
        return result


def one_dimension() -> pf.LayerGraph:
    return normed(pf.lazy(nn.BatchNorm1d, CHANNELS, dtype=torch.float64))


def two_dimensions_cumulative() -> pf.LayerGraph:
    return normed(pf.lazy(nn.BatchNorm2d, CHANNELS, momentum=None, dtype=torch.float64), shape=(2, 3))


def three_dimensions() -> pf.LayerGraph:
    return normed(pf.lazy(nn.BatchNorm3d, CHANNELS, momentum=0.5, dtype=torch.float64), shape=(2, 2, 2))


def instance_norm() -> pf.LayerGraph:
    return normed(pf.lazy(nn.InstanceNorm1d, CHANNELS, track_running_stats=True, affine=True, dtype=torch.float64))


def called_twice() -> pf.LayerGraph:
    return normed(pf.lazy(Twice), pf.lazy(nn.Sequential, pf.lazy(Twice), pf.lazy(nn.Tanh)))


def one_norm_in_two_layers() -> pf.LayerGraph:
    norm = nn.BatchNorm1d(CHANNELS, dtype=torch.float64)
    return normed(norm, nn.Sequential(nn.Tanh(), norm))


def without_weights() -> pf.LayerGraph:
    """The norm's stage has nothing to train, and so no gradients to reduce; its statistics move all the same."""
    return normed(pf.lazy(nn.BatchNorm1d, CHANNELS, affine=False, dtype=torch.float64))


def kept_in_evaluation() -> pf.LayerGraph:
    return normed(pf.lazy(KeptInEvaluation), pf.lazy(nn.BatchNorm1d, CHANNELS, dtype=torch.float64))


def no_statistics() -> pf.LayerGraph:
    return normed(pf.lazy(nn.BatchNorm1d, CHANNELS, track_running_stats=False, dtype=torch.float64))


CASES: list[Callable[[], pf.LayerGraph]] = [
    one_dimension,
    two_dimensions_cumulative,
    three_dimensions,
    instance_norm,
    called_twice,
    one_norm_in_two_layers,
    without_weights,
    kept_in_evaluation,
    no_statistics,
]


def layouts(graph: pf.LayerGraph, schedule: str) -> list[pf.Plan]:
    """Norms on two and three replicas, beside stages of one; of three ranks."""
    first, *norms, out, loss = graph.layers
    unequal = [([first], (0, 1)), (norms, (0, 1, 2)), ([out, loss], (2,))]
    shared = [([first, *norms], (2, 0)), ([out, loss], (1, 2))]
    return [make_plan(graph, stages, num_microbatches=5, schedule=schedule) for stages in (unequal, shared)]


@pytest.mark.parametrize("schedule", pf.SCHEDULES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_statistics_are_those_of_one_device(case: Callable[[], pf.LayerGraph], schedule: str) -> None:
    """Micro-batches of unequal sizes, and fewer than there are: replicas without any have the statistics too."""
    graph = case()
    batches = [sample_batch(graph, n, seed=n) for n in (12, 2, 7)]
    for num_accumulated, plan in enumerate(layouts(graph, schedule)):
        check_layout_invariance(graph, plan, batches, num_accumulated=num_accumulated)
        check_layout_invariance(graph, plan, batches, options={"batch_norm": "deferred"})


def test_a_norm_that_is_computed_again_has_been_seen_once() -> None:
    graph = called_twice()
    for plan in layouts(graph, "1f1b"):
        again = [stage.with_recompute([name for name in stage.layers if name != "loss"]) for stage in plan.stages]
        check_layout_invariance(
            graph, plan.model_copy(update={"stages": tuple(again)}), [sample_batch(graph, n) for n in (12, 2)]
        )


def over_gloo(rank: int) -> None:
    for case in CASES:
        graph = case()
        for plan in layouts(graph, "1f1b"):
            check_layout_invariance(graph, plan, [sample_batch(graph, n) for n in (12, 2)], num_accumulated=1)
        check_layout_invariance(graph, plan, [sample_batch(graph, 12)], options={"batch_norm": "deferred"})


def test_statistics_are_those_of_one_device_over_processes() -> None:
    for result in run_ranks(over_gloo, 3):
        assert result.error is None, result.trace


def test_replicas_have_the_same_bits_and_evaluate_after_accumulating() -> None:
    """The statistics of a batch are there when its call returns, without a step."""
    graph = called_twice()
    plan = layouts(graph, "1f1b")[0]
    reference = Reference(graph, sgd, num_microbatches=5)
    batch = sample_batch(graph, 11)
    with pf.Engine(graph, plan, sgd) as engine:
        for _ in range(2):
            engine.accumulate(batch)
            reference.accumulate(batch)
            assert engine.evaluate(batch).loss == pytest.approx(reference.evaluate(batch).loss, rel=1e-12)
        held = [engine._ranks.replicas[rank][1].tensors() for rank in (0, 1, 2)]
    for name, value in held[0].items():
        assert all(torch.equal(value, other[name]) for other in held)
        assert name not in reference.state_dict() or value.allclose(reference.state_dict()[name], rtol=1e-12)
    assert int(held[0]["norm0.norm.num_batches_tracked"]) == 2 * 2 * 5


@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
def test_a_step_that_is_left_out_has_been_seen(nonfinite: str) -> None:
    """As in torch: the forward updates statistics, whatever becomes of its gradients."""
    graph = pf.LayerGraph("scaled")
    x, weight = graph.input("x", ("B", CHANNELS, 5), "float64"), graph.input("weight", ("B",), "float64")
    h = graph.add("norm", pf.lazy(nn.BatchNorm1d, CHANNELS, dtype=torch.float64), x)
    graph.loss("loss", weighted, graph.add("out", pf.lazy(Scale, CHANNELS), h), weight)
    plan = make_plan(graph, [(["norm"], (0, 1)), (["out", "loss"], (1,))], num_microbatches=3)
    batches = [sample_batch(graph, 6, seed=seed) for seed in range(3)]
    batches[1]["weight"][4] = float("inf")
    states = []
    reference = Reference(graph, sgd, num_microbatches=3, nonfinite=nonfinite)  # type: ignore[arg-type]
    with pf.Engine(graph, plan, sgd, nonfinite=nonfinite) as engine:  # type: ignore[arg-type]
        for trainer in (reference, engine):
            left_out = 0
            for batch in batches:
                try:
                    left_out += trainer.step(batch).skipped
                except NonFiniteError:
                    left_out += 1
            assert left_out == 1
            states.append(trainer.state_dict())
    assert int(states[1]["norm.num_batches_tracked"]) == 9
    for name, value in states[0].items():
        assert states[1][name].allclose(value, rtol=1e-12), name


def weighted(x: Tensor, weight: Tensor) -> Tensor:
    return (x.square().mean((1, 2)) * weight).mean()


def test_a_norm_called_more_often_than_described_is_refused() -> None:
    graph = normed(pf.lazy(Moody))
    with (
        pf.Engine(graph, layouts(graph, "gpipe")[0], sgd) as engine,
        pytest.raises(LayerFailure, match="called 2 times in a micro-batch, and 1 times"),
    ):
        engine.step(sample_batch(graph, 10))


class Moody(nn.Module):
    """Calls its norm twice on real numbers that are positive on average, once on tensors without data."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(CHANNELS, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        twice = type(x) is Tensor
        result: Tensor = self.norm(self.norm(x)) if twice else self.norm(x)
        return result


def test_stages_without_norms_tell_nothing() -> None:
    """One sum of gradients and no other message; a stage with norms has one more, beside it."""
    sums: list[int] = []
    start = ThreadTransport.start_reduce

    def counted(self: ThreadTransport, stage: int, tensor: Tensor) -> Callable[[], Tensor]:
        sums.append(stage)
        return start(self, stage, tensor)

    graph = one_dimension()
    first, *norms, out, loss = graph.layers
    plan = make_plan(graph, [([first], (0, 1)), (norms, (0, 1)), ([out, loss], (0,))])
    with pf.Engine(graph, plan, sgd) as engine, pytest.MonkeyPatch.context() as patch:
        patch.setattr(ThreadTransport, "start_reduce", counted)
        engine.step(sample_batch(graph, 8))
    assert (sums.count(0), sums.count(1)) == (2, 4)


def test_a_stage_with_nothing_but_statistics_has_a_reduction() -> None:
    graph = without_weights()
    first, *norms, out, loss = graph.layers
    plan = make_plan(graph, [([first], (0,)), (norms, (0, 1)), ([out, loss], (1,))])
    pf.verify(plan)
    timeline = pf.simulate(plan)
    assert {event.rank for event in timeline.events if event.action == Reduce(1)} == {0, 1}


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.InstanceNorm1d])
def test_deferred_statistics_move_as_torch_moves_them_for_the_whole_batch(
    kind: Callable[..., nn.Module], momentum: float | None
) -> None:
    """On the inputs of a model, where nothing before depends on how a batch is cut, torch itself is the oracle."""
    graph = pf.LayerGraph("first")
    x = graph.input("x", ("B", CHANNELS, 5), "float64")
    norm = pf.lazy(kind, CHANNELS, momentum=momentum, track_running_stats=True, dtype=torch.float64)
    graph.loss("loss", mean_square, graph.add("out", pf.lazy(Scale, CHANNELS), graph.add("norm", norm, x)))
    plan = make_plan(graph, [(["norm"], (0, 1, 2)), (["out", "loss"], (1,))], num_microbatches=5)
    batches = [sample_batch(graph, n, seed=n) for n in (13, 3, 8)]
    whole = kind(CHANNELS, momentum=momentum, track_running_stats=True, dtype=torch.float64)
    with pf.Engine(graph, plan, sgd, batch_norm="deferred") as engine:
        for batch in batches:
            engine.step(batch)
            whole(batch["x"])
        state = engine.state_dict()
    for name, value in whole.named_buffers():
        assert state[f"norm.{name}"].allclose(value, rtol=1e-12), name
    assert int(state["norm.num_batches_tracked"]) == (3 if kind is nn.BatchNorm1d else 0)


def test_choices_that_cannot_be_kept_are_refused() -> None:
    graph = normed(pf.lazy(OwnForward, CHANNELS, dtype=torch.float64))
    plan = make_plan(graph, [(list(graph.layers), (0,))])
    with pytest.raises(PlanError, match="OwnForward with a forward of its own, which cannot be deferred"):
        pf.Engine(graph, plan, sgd, batch_norm="deferred")
    with pytest.raises(EngineError, match="batch_norm='sync'; running statistics move after each 'microbatch'"):
        pf.Engine(graph, plan, sgd, batch_norm="sync")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="would not train as on one device with several"):
        pf.Engine(graph, make_plan(graph, [(list(graph.layers), (0, 1))]), sgd)


class OwnForward(nn.BatchNorm1d):
    """A norm that does something of its own with its statistics."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input * 2)
