"""What an engine promises beside the law: results, predictions, state, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import pipeflow as pf
from pipeflow.errors import BatchError, CheckpointError, EngineError, LayerFailure, PlanError
from tests.runtime.models import (
    THREE_STAGES,
    bomb_batch,
    bomb_graph,
    bomb_plan,
    forked_batch,
    forked_graph,
    make_plan,
    sgd,
)

ALL = [name for layers, _ in THREE_STAGES for name in layers]


def test_trains_as_a_plain_loop_of_torch() -> None:
    """The oracle itself against a loop that anybody would write, without pipeflow."""
    graph = forked_graph()
    modules = graph.build()
    parameters = [p for m in modules.values() if isinstance(m, nn.Module) for p in m.parameters()]
    optimizer = sgd(parameters)
    with pf.Engine(graph, make_plan(graph, THREE_STAGES), sgd, num_threads=1) as engine:
        for size in (8, 10, 3):
            batch = forked_batch(size, seed=size)
            total = 0.0
            for x, y in zip(batch["x"].tensor_split(4), batch["y"].tensor_split(4), strict=True):
                if len(x):
                    a = modules["a"](x)
                    d = torch.add(modules["c"](torch.tanh(a)), a)
                    logits = torch.add(modules["e"](d), modules["p"](a))
                    loss = nn.functional.cross_entropy(logits, y) * (len(x) / size)
                    torch.autograd.backward(loss)
                    total += float(loss.detach())
            optimizer.step()
            optimizer.zero_grad()
            assert engine.step(batch).loss == pytest.approx(total, rel=1e-6)
        state = engine.state_dict()
    for name, module in modules.items():
        if isinstance(module, nn.Module):
            for key, parameter in module.named_parameters():
                torch.testing.assert_close(state[f"{name}.{key}"], parameter.detach())


def test_initial_weights_are_those_of_the_modules_which_stay_as_they_are() -> None:
    torch.manual_seed(3)
    module = nn.Linear(4, 4)
    before = module.weight.detach().clone()
    graph = pf.LayerGraph("own")
    graph.loss("loss", nn.MSELoss(), graph.add("layer", module, graph.input("x", ("B", 4))), graph.input("y", ("B", 4)))
    with pf.Engine(graph, make_plan(graph, [(["layer"], (0,)), (["loss"], (1,))]), sgd) as engine:
        assert torch.equal(engine.state_dict()["layer.weight"], before)
        engine.step({"x": torch.ones(4, 4), "y": torch.zeros(4, 4)})
        assert not torch.equal(engine.state_dict()["layer.weight"], before)
    assert torch.equal(module.weight, before)


def test_predict_needs_no_labels_and_keeps_the_order() -> None:
    graph = forked_graph()
    plan = make_plan(graph, [(["a", "b"], (0, 1)), (["c", "d"], (2,)), (["e", "p", "s", "loss"], (0, 2))])
    reference = pf.Reference(graph)
    with pf.Engine(graph, plan, num_threads=1) as engine:
        for size in (1, 3, 11):
            batch = {"x": forked_batch(size)["x"]}
            assert graph.outputs == ("s",)
            torch.testing.assert_close(engine.predict(batch)["s"], reference.predict(batch)["s"])
            assert set(engine.predict(batch, ["a", "d"])) == {"a", "d"}
        with pytest.raises(EngineError, match="'nowhere' is computed by no layer"):
            engine.predict(batch, ["nowhere"])
        for call in (engine.predict, reference.predict):
            with pytest.raises(EngineError, match=r"outputs='s' is text; give a list of names, for example \['s'\]"):
                call(batch, "s")
        with pytest.raises(EngineError, match="outputs='s' is text"):
            engine.decode(2, "s")


def test_losses_and_learning_rates_follow_the_schedule() -> None:
    graph = forked_graph()

    def scheduler(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.1)

    reference = pf.Reference(graph, sgd, lr_scheduler=scheduler, num_microbatches=4)
    with pf.Engine(graph, make_plan(graph, THREE_STAGES), sgd, lr_scheduler=scheduler, num_threads=1) as engine:
        for seed in range(5):
            assert engine.step(forked_batch(8, seed=seed)).losses == reference.step(forked_batch(8, seed=seed)).losses


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b.pop("y"), "lacks 'y'"),
        (lambda b: b.update(z=torch.ones(8)), "'z', which is no input"),
        (lambda b: b.update(x=b["x"].double()), r"\.to\(torch\.float32\)"),
        (lambda b: b.update(x=b["x"][:, :4]), r"must be float32 \(B, 8\)"),
        (lambda b: b.update(y=b["y"][:4]), "different numbers of samples"),
        (lambda b: b.update(x=b["x"][:0], y=b["y"][:0]), "no samples"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused_and_the_engine_goes_on(change, message) -> None:  # type: ignore[no-untyped-def]
    graph = forked_graph()
    with pf.Engine(graph, make_plan(graph, THREE_STAGES), sgd) as engine:
        batch = forked_batch(8)
        change(batch)
        with pytest.raises(BatchError, match=message):
            engine.step(batch)
        assert engine.step(forked_batch(8)).loss > 0


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize("phase", ["forward", "backward"])
@pytest.mark.parametrize(("layer", "rank"), [("first", 0), ("second", 1), ("third", 2)])
def test_a_layer_that_raises_is_named_with_its_rank_stage_and_microbatch(
    layer: str, rank: int, phase: str, schedule: str
) -> None:
    graph = bomb_graph(layer, phase)
    for microbatch in (0, 3):
        with pf.Engine(graph, bomb_plan(graph, schedule), sgd) as engine:
            engine.step(bomb_batch(None))
            with pytest.raises(LayerFailure, match=f"{phase} went wrong") as caught:
                engine.step(bomb_batch(microbatch))
            failure = caught.value
            assert (failure.rank, failure.stage, failure.layer) == (rank, rank, layer)
            assert (failure.microbatch, failure.step, failure.phase) == (microbatch, 1, phase)
            assert isinstance(failure.__cause__, ZeroDivisionError)
            with pytest.raises(EngineError, match="cannot run any more"):
                engine.step(bomb_batch(None))


def test_a_plan_for_another_graph_is_refused() -> None:
    graph, other = forked_graph(), bomb_graph("first", "never")
    with pytest.raises(PlanError, match="the plan is for the graph"):
        pf.Engine(other, make_plan(graph, THREE_STAGES), sgd)


def test_what_the_optimizer_cannot_do_is_refused() -> None:
    graph = forked_graph()
    plan = make_plan(graph, [(ALL, (0,))])
    with pytest.raises(EngineError, match="LBFGS"):
        pf.Engine(graph, plan, torch.optim.LBFGS)
    with pytest.raises(EngineError, match="left out"):
        pf.Engine(graph, plan, lambda parameters: sgd(parameters[:1]))
    with pf.Engine(graph, plan) as engine, pytest.raises(EngineError, match="no optimizer"):
        engine.step(forked_batch(4))


def test_a_closed_engine_says_so() -> None:
    graph = forked_graph()
    engine = pf.Engine(graph, make_plan(graph, THREE_STAGES), sgd)
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.step(forked_batch(4))


def test_state_of_another_model_is_refused() -> None:
    graph = forked_graph()
    with pf.Engine(graph, make_plan(graph, THREE_STAGES)) as engine:
        state = engine.state_dict()
        engine.load_state_dict(state)
        with pytest.raises(CheckpointError, match="lacks"):
            engine.load_state_dict({k: v for k, v in state.items() if k != "a.bias"})
        with pytest.raises(CheckpointError, match="which the model has not"):
            engine.load_state_dict({**state, "ghost": torch.ones(1)})
        with pytest.raises(CheckpointError, match="'a.bias'"):
            engine.load_state_dict({**state, "a.bias": torch.ones(3)})


def test_measured_tells_seconds_by_stage() -> None:
    graph = forked_graph()
    with pf.Engine(graph, make_plan(graph, THREE_STAGES), sgd, measure=True) as engine:
        with pytest.raises(EngineError, match="no step was measured"):
            engine.measured()
        for _ in range(3):
            engine.step(forked_batch(8))
        measured = engine.measured()
    assert measured.num_steps == 2  # in one of the three bytes were counted instead
    assert all(peak > 0 for peak in measured.peak_bytes_by_rank)
    assert len(measured.peak_bytes_by_rank) == len(measured.predicted_bytes_by_rank) == 3
    assert all(s > 0 for s in (*measured.forward_seconds, *measured.backward_seconds))
    assert measured.iteration_seconds > max(measured.forward_seconds)


def test_a_batch_of_the_shapes_of_the_one_before_is_looked_at_all_the_same() -> None:
    graph = forked_graph()
    batch = forked_batch(8)
    with pf.Engine(graph, make_plan(graph, THREE_STAGES), sgd) as engine:
        expected = engine.evaluate(batch).loss
        for _ in range(2):
            with pytest.raises(BatchError, match="'x' of the batch requires grad"):
                engine.evaluate({**batch, "x": batch["x"].clone().requires_grad_()})
            with pytest.raises(BatchError, match=r"'x' of the batch is a torch.sparse_coo tensor"):
                engine.evaluate({**batch, "x": batch["x"].to_sparse()})
            assert engine.evaluate(batch).loss == expected
        with torch.inference_mode():
            made = {name: value + 0 for name, value in batch.items()}
        assert engine.step(made).loss == expected
