"""Training in phases: a GAN as one graph, in any layout as on one device, and as a plain loop of torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import pipeflow as pf
from pipeflow.errors import EngineError, GraphError, PlanError
from pipeflow.graphs.sharing import with_copies
from pipeflow.program import Mode, Send, Step
from pipeflow.testing import layer_graphs, plans, run_ranks, unit_costs
from pipeflow.testing.graphs import sample_batch
from pipeflow.wiring import wire
from tests.runtime.models import Stages, make_plan, sgd

WIDTH, NOISE = 6, 3


def real_or_not(logits: Tensor, truth: float) -> Tensor:
    return functional.binary_cross_entropy_with_logits(logits, torch.full_like(logits, truth))


def gan(dtype: torch.dtype = torch.float32, *, norm: bool = False) -> pf.LayerGraph:
    """Noise to samples; samples, and real ones, through one discriminator."""
    torch.manual_seed(0)
    graph = pf.LayerGraph("gan")
    z, real = graph.input("z", ("B", NOISE), dtype), graph.input("real", ("B", WIDTH), dtype)
    h = graph.add("generator.hidden", nn.Linear(NOISE, 8, dtype=dtype), z)
    if norm:
        h = graph.add("generator.norm", nn.BatchNorm1d(8, dtype=dtype), h)
    fake = graph.add("generator.out", nn.Linear(8, WIDTH, dtype=dtype), graph.add("generator.relu", torch.relu, h))
    first, last = nn.Linear(WIDTH, 8, dtype=dtype), nn.Linear(8, 1, dtype=dtype)
    for name, x in (("real", real), ("fake", fake)):
        hidden = graph.add(f"discriminator.{name}.relu", torch.relu, graph.add(f"discriminator.{name}", first, x))
        logits = graph.add(f"discriminator.{name}.out", last, hidden)
        graph.loss(f"says_{name}", real_or_not, logits, truth=float(name == "real"))
    graph.loss("fools", real_or_not, logits, truth=1.0)
    graph.phase("discriminator", losses=["says_real", "says_fake"], trains=["discriminator.*"])
    graph.phase("generator", losses=["fools"], trains=["generator.*"])
    return graph


def batch_of(size: int, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {
        "z": torch.randn(size, NOISE, generator=random, dtype=dtype),
        "real": torch.randn(size, WIDTH, generator=random, dtype=dtype) + 1,
    }


def names_of(graph: pf.LayerGraph, start: str) -> list[str]:
    return [name for name in graph.layers if name.startswith(start)]


def layouts(graph: pf.LayerGraph, replicas: bool) -> Stages:
    """The generator on one stage, the discriminator's hidden layers and the rest on others."""
    shared = [n for n in names_of(graph, "discriminator") if not n.endswith("out")]
    generator = names_of(graph, "generator")
    rest = [n for n in graph.layers if n not in shared and n not in generator]
    if replicas:
        return [(generator, (0, 1)), (shared, (2,)), (rest, (0, 1, 2))]
    return [(generator, (0,)), (shared, (1,)), (rest, (2,))]


OPTIMIZERS: dict[str, Any] = {
    "discriminator": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5),
    "generator": lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.9, nesterov=True),
}


def train(trainer: Any, dtype: torch.dtype = torch.float32) -> list[dict[str, float]]:
    losses = []
    for step in range(3):
        for phase in ("discriminator", "generator"):
            batch = batch_of(9 + step, 2 * step, dtype)
            losses.append(dict(trainer.step(batch, phase=phase).losses))
    losses.append(dict(trainer.evaluate(batch_of(5, 9, dtype)).losses))
    losses.append(dict(trainer.evaluate(batch_of(5, 9, dtype), phase="generator").losses))
    return losses


def check(graph: pf.LayerGraph, plan: pf.Plan, dtype: torch.dtype, tolerance: float) -> None:
    reference = pf.Reference(graph, OPTIMIZERS, num_microbatches=plan.num_microbatches, clip_norm=0.5)
    with pf.Engine(graph, plan, OPTIMIZERS, num_threads=1, clip_norm=0.5) as engine:
        for expected, seen in zip(train(reference, dtype), train(engine, dtype), strict=True):
            assert seen == (pytest.approx(expected, rel=tolerance) if tolerance else expected)
        state = engine.state_dict()
        for name, value in reference.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_a_gan_trains_as_on_one_device(schedule: str) -> None:
    graph = gan(norm=True)
    check(graph, make_plan(graph, layouts(graph, False), schedule=schedule), torch.float32, 0.0)
    graph = gan(torch.float64, norm=True)
    check(graph, make_plan(graph, layouts(graph, True), schedule=schedule), torch.float64, 1e-12)


def with_the_discriminator_apart(graph: pf.LayerGraph, schedule: str) -> pf.Plan:
    """Copies of the discriminator: what judges real samples on one stage, what judges made ones on others."""
    real = names_of(graph, "discriminator.real")
    generator = names_of(graph, "generator")
    made = [n for n in graph.layers if n not in real and n not in generator]
    stages: Stages = [(real, (2, 0)), (generator, (0, 1)), (made, (1, 2, 0))]
    plan = make_plan(graph, [(list(graph.layers), (0,))], schedule=schedule)
    replicated = tuple(pf.Stage.replicated(tuple(layers), tuple(ranks)) for layers, ranks in stages)
    changes = {"costs": with_copies(plan.costs), "cluster": pf.Cluster.uniform(3), "stages": replicated}
    return pf.Plan.model_validate({**dict(plan), **changes})


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_copies_of_the_discriminator_learn_in_its_phase_alone(schedule: str) -> None:
    graph = gan(torch.float64, norm=True)
    plan = with_the_discriminator_apart(graph, schedule)
    assert [str(r) for r in wire(plan.in_phase("discriminator"), Mode.TRAIN).shared] == ["reduce 0+2"]
    assert wire(plan.in_phase("generator"), Mode.TRAIN).shared == ()
    check(graph, plan, torch.float64, 1e-12)


def over_gloo(rank: int) -> None:
    torch.set_num_threads(1)
    for dtype, replicas in ((torch.float32, False), (torch.float64, True)):
        graph = gan(dtype, norm=True)
        check(graph, make_plan(graph, layouts(graph, replicas)), dtype, 1e-12 if replicas else 0.0)
    check(graph, with_the_discriminator_apart(graph, "1f1b"), torch.float64, 1e-12)


def test_a_gan_trains_as_on_one_device_over_processes() -> None:
    for result in run_ranks(over_gloo, 3):
        assert result.error is None, result.trace


def test_it_is_the_loop_that_one_writes_in_torch() -> None:
    graph = gan()
    modules = graph.build()
    generator = [modules["generator.hidden"], modules["generator.out"]]
    judge = [modules["discriminator.real"], modules["discriminator.real.out"]]
    learners = {
        phase: OPTIMIZERS[phase]([p for m in of for p in m.parameters()])  # type: ignore[attr-defined]
        for phase, of in (("generator", generator), ("discriminator", judge))
    }

    def make(batch: dict[str, Tensor]) -> Tensor:
        return generator[1](torch.relu(generator[0](batch["z"])))  # type: ignore[no-any-return]

    def judged(x: Tensor) -> Tensor:
        return judge[1](torch.relu(judge[0](x)))  # type: ignore[no-any-return]

    with pf.Engine(graph, make_plan(graph, layouts(graph, False), num_microbatches=1), OPTIMIZERS) as engine:
        for step in range(3):
            batch = batch_of(8, step)
            says = real_or_not(judged(batch["real"]), 1.0) + real_or_not(judged(make(batch).detach()), 0.0)
            learners["discriminator"].zero_grad()
            says.backward()  # type: ignore[no-untyped-call]
            learners["discriminator"].step()
            assert engine.step(batch, phase="discriminator").loss == pytest.approx(says.item(), rel=1e-5)
            fools = real_or_not(judged(make(batch)), 1.0)
            learners["generator"].zero_grad()
            fools.backward()  # type: ignore[no-untyped-call]
            learners["generator"].step()
            assert engine.step(batch, phase="generator").loss == pytest.approx(fools.item(), rel=1e-5)


def test_nothing_is_sent_back_to_what_does_not_learn() -> None:
    graph = gan()
    plan = make_plan(graph, layouts(graph, False))
    sends = {
        phase: {
            (a.route.direction.value, a.route.source, a.route.target)
            for actions in pf.lower(plan.in_phase(phase)).actions_by_rank
            for a in actions
            if isinstance(a, Send)
        }
        for phase in graph.phases
    }
    steps = {
        phase: {
            a.stage
            for actions in pf.lower(plan.in_phase(phase)).actions_by_rank
            for a in actions
            if isinstance(a, Step)
        }
        for phase in graph.phases
    }
    assert sends["discriminator"] == {("F", 0, 1), ("F", 1, 2), ("B", 2, 1)}
    assert sends["generator"] == {("F", 0, 1), ("F", 1, 2), ("B", 2, 1), ("B", 1, 0)}
    assert steps == {"discriminator": {1, 2}, "generator": {0}}
    narrow = plan.in_phase("generator")
    assert pf.verify(pf.lower(narrow, mode=Mode.INFER), plan=narrow).num_ranks == 3


def test_what_a_phase_does_not_train_stays_as_it_is_and_gradients_do_not_mix() -> None:
    graph = gan()
    with pf.Engine(graph, make_plan(graph, layouts(graph, False)), OPTIMIZERS) as engine:
        before = engine.state_dict()
        engine.accumulate(batch_of(4, 0), phase="generator")
        with pytest.raises(EngineError, match="gradients of phase 'generator' wait for their step"):
            engine.step(batch_of(4, 0), phase="discriminator")
        engine.step(batch_of(4, 1), phase="generator")
        changed = {n for n, v in engine.state_dict().items() if not torch.equal(v, before[n])}
        assert changed == {n for n in before if n.startswith("generator")}
        engine.step(batch_of(4, 0), phase="discriminator")


def test_a_phase_goes_on_under_another_plan(tmp_path: Path) -> None:
    graph = gan()
    rates: Any = lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)  # noqa: E731
    reference = pf.Reference(graph, OPTIMIZERS, lr_scheduler=rates, num_microbatches=4)
    whole = make_plan(graph, [(list(graph.layers), (0,))])
    with pf.Engine(graph, make_plan(graph, layouts(graph, False)), OPTIMIZERS, lr_scheduler=rates) as engine:
        expected, _ = train(reference), train(engine)
        engine.save(tmp_path / "checkpoint")
    with pf.Engine(graph, whole, OPTIMIZERS, lr_scheduler=rates, num_threads=1) as engine:
        engine.load(tmp_path / "checkpoint")
        assert len(expected) == 8
        assert train(engine) == train(reference)


def test_survives_a_file(tmp_path: Path) -> None:
    graph = pf.LayerGraph("two heads")
    x = graph.input("x", ("B", 4))
    trunk = graph.add("trunk", pf.lazy(nn.Linear, 4, 4), x)
    graph.loss("left", torch.mean, graph.add("a", pf.lazy(nn.Linear, 4, 1), trunk))
    graph.loss("right", torch.mean, graph.add("b", pf.lazy(nn.Linear, 4, 1), trunk))
    plain = graph.digest
    graph.phase("only_left", losses=["left"], trains=["*"])
    assert graph.digest != plain
    graph.save(tmp_path / "graph.json")
    again = pf.LayerGraph.load(tmp_path / "graph.json")
    assert again.phases == graph.phases
    assert again.digest == graph.digest
    plan = pf.plan(graph, unit_costs(graph), pf.Cluster.uniform(2), batch_size=4, num_stages=2)
    plan.save(tmp_path / "plan.json")
    assert pf.Plan.load(tmp_path / "plan.json") == plan


@given(data=st.data())
@settings(max_examples=40)
def test_drawn_phases_train_as_one_device_does(data: st.DataObject) -> None:
    graph = data.draw(layer_graphs(allow_random=True, allow_shared=True, allow_buffers=True))
    patterns = st.lists(st.sampled_from([f"{name}*" for name in graph.layers]), min_size=1, max_size=4, unique=True)
    for name in ("first", "second"):
        losses = data.draw(st.lists(st.sampled_from(graph.losses), min_size=1, unique=True))
        try:
            graph.phase(name, losses=losses, trains=data.draw(patterns))
        except GraphError:
            graph.phase(name, losses=losses, trains=["*"])
    plan = data.draw(plans(unit_costs(graph), max_ranks=4, max_replicas=1, graph_digest=graph.digest))
    reference = pf.Reference(graph, sgd, num_microbatches=plan.num_microbatches)
    with pf.Engine(graph, plan, sgd, num_threads=1) as engine:
        for seed, phase in enumerate(data.draw(st.lists(st.sampled_from(["first", "second"]), min_size=1, max_size=3))):
            batch = sample_batch(graph, data.draw(st.integers(1, 9)), seed=seed)
            expected, seen = reference.step(batch, phase=phase), engine.step(batch, phase=phase)
            assert repr(expected) == repr(seen)  # not a number is itself
        state = engine.state_dict()
        for name, value in reference.state_dict().items():
            assert torch.equal(value, state[name]) or value.isnan().any(), name


def test_what_is_no_phase_is_refused() -> None:
    graph = gan()
    plan = make_plan(graph, layouts(graph, False))
    for losses, trains, words in (
        ([], ["*"], "has no loss"),
        (["no"], ["*"], "is no loss of graph"),
        (["fools"], [], "trains nothing"),
        (["fools"], ["nobody.*"], "fits no parameter"),
        (["says_real"], ["generator.*"], "no parameter that it trains reaches its loss 'says_real'"),
    ):
        with pytest.raises(GraphError, match=words):
            graph.phase("other", losses=losses, trains=trains)
    with pytest.raises(GraphError, match="already names a phase"):
        graph.phase("generator", losses=["fools"], trains=["*"])
    with pytest.raises(EngineError, match="for each phase of the graph: 'discriminator', 'generator'"):
        pf.Engine(graph, plan, {"generator": sgd})
    with pf.Engine(graph, plan, sgd) as engine:
        with pytest.raises(EngineError, match="say which: phase='discriminator' or 'generator'"):
            engine.step(batch_of(4, 0))
        with pytest.raises(EngineError, match="no phase 'judge'; it has discriminator, generator"):
            engine.step(batch_of(4, 0), phase="judge")
    bare = plan.model_copy(update={"costs": plan.costs.model_copy(update={"phases": ()}), "graph_digest": ""})
    with pytest.raises(PlanError, match="profile the graph again"):
        pf.Engine(graph, bare, sgd)
