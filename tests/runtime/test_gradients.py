"""Clipping, parameter groups, and what is not finite: the whole model's matter, in any layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import pipeflow as pf
from pipeflow.errors import EngineError, NonFiniteError
from pipeflow.testing import run_ranks
from tests.runtime.models import THREE_STAGES, Stages, forked_batch, forked_graph, make_plan, sgd

LAYOUTS: dict[str, Stages] = {
    "single": THREE_STAGES,
    "shared ranks": [(["a", "b"], (0,)), (["c", "d"], (1,)), (["e", "p", "s", "loss"], (0,))],
    "replicas": [(["a", "b"], (0, 1)), (["c", "d"], (2,)), (["e", "p", "s", "loss"], (0, 1, 2))],
}
OPTIONS: dict[str, dict[str, Any]] = {
    "norm": {"clip_norm": 0.05},
    "value": {"clip_value": 0.01},
    "both": {"clip_norm": 0.1, "clip_value": 0.02},
    "groups": {"parameter_groups": {"a.*": {"lr": 0.5}, "*.bias": {"lr": 0.0, "momentum": 0.0}}},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_does_as_one_device(layout: str, options: str) -> None:
    graph = forked_graph()
    reference = pf.Reference(graph, sgd, num_microbatches=4, **OPTIONS[options])
    with pf.Engine(graph, make_plan(graph, LAYOUTS[layout]), sgd, num_threads=1, **OPTIONS[options]) as engine:
        for seed in range(4):
            expected, seen = reference.step(forked_batch(8, seed=seed)), engine.step(forked_batch(8, seed=seed))
            if layout == "replicas":
                assert seen.loss == pytest.approx(expected.loss, rel=1e-5)
            else:
                assert seen == expected
        for name, value in reference.state_dict().items():
            tolerance = 1e-6 if layout == "replicas" else 0.0
            torch.testing.assert_close(engine.state_dict()[name], value, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("options", "clip"),
    [
        ({"clip_norm": 0.05}, lambda p: nn.utils.clip_grad_norm_(p, 0.05)),
        ({"clip_value": 0.01}, lambda p: nn.utils.clip_grad_value_(p, 0.01)),
    ],
)
def test_clips_as_torch_does(options: dict[str, float], clip: Callable[[list[nn.Parameter]], object]) -> None:
    graph = forked_graph()
    modules = graph.build()
    parameters = [p for m in modules.values() if isinstance(m, nn.Module) for p in m.parameters()]
    optimizer = sgd(parameters)
    with pf.Engine(graph, make_plan(graph, THREE_STAGES, num_microbatches=1), sgd, **options) as engine:  # type: ignore[arg-type]
        batch = forked_batch(8)
        a = modules["a"](batch["x"])
        logits = modules["e"](modules["c"](torch.tanh(a)) + a) + modules["p"](a)
        torch.autograd.backward(nn.functional.cross_entropy(logits, batch["y"]))
        before = float(torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm())
        clip(parameters)
        optimizer.step()
        result = engine.step(batch)
        if "clip_norm" in options:
            assert result.gradient_norm == pytest.approx(before, rel=1e-5)
        state = engine.state_dict()
    for name in ("a", "c", "e", "p"):
        for key, parameter in modules[name].named_parameters():  # type: ignore[attr-defined]
            torch.testing.assert_close(state[f"{name}.{key}"], parameter.detach(), rtol=1e-5, atol=1e-7)


class Times(torch.autograd.Function):
    """The value itself; its gradient is so many times as large."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient * ctx.factor, None


def steep_graph(factor: float) -> pf.LayerGraph:
    graph = pf.LayerGraph("steep")
    hidden = graph.add("first", pf.lazy(nn.Linear, 8, 8), graph.input("x", ("B", 8)))
    hidden = graph.add("steep", Times.apply, hidden, factor)
    graph.loss("loss", torch.mean, graph.add("second", pf.lazy(nn.Linear, 8, 4), hidden))
    return graph


@pytest.mark.parametrize("factor", [1e25, float("inf")])
def test_large_and_infinite_gradients_are_clipped_as_torch_clips_them(factor: float) -> None:
    """Finite ones are, though their squares are not; an infinite norm leaves of finite gradients nothing."""
    graph = steep_graph(factor)
    plan = make_plan(graph, [(["first"], (0,)), (["steep"], (1,)), (["second", "loss"], (2,))], num_microbatches=1)
    batch = {"x": forked_batch(1)["x"]}
    nonfinite = "skip" if factor == 1e25 else "ignore"
    reference = pf.Reference(graph, sgd, clip_norm=1.0, nonfinite=nonfinite)  # type: ignore[arg-type]
    with pf.Engine(graph, plan, sgd, clip_norm=1.0, nonfinite=nonfinite) as engine:  # type: ignore[arg-type]
        before = engine.state_dict()
        assert engine.step(batch) == reference.step(batch)
        after = engine.state_dict()
    torch.testing.assert_close(after, reference.state_dict(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(after["second.weight"], before["second.weight"])  # scaled by next to nothing, or by 0
    assert bool(after["first.weight"].isnan().any()) == (factor == float("inf"))
    if factor == 1e25:
        assert not torch.equal(after["first.weight"], before["first.weight"])


class Complex(nn.Module):
    """A weight that is complex."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.complex(torch.linspace(0, 1, 8), torch.linspace(1, 3, 8)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.weight).abs()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_complex_gradients_keep_their_imaginary_part_in_sums_of_a_chosen_type(dtype: str) -> None:
    graph = pf.LayerGraph("complex")
    hidden = graph.add("times", pf.lazy(Complex), graph.input("x", ("B", 8)))
    graph.loss("loss", torch.mean, hidden)
    batch = {"x": forked_batch(8)["x"]}
    reference = pf.Reference(graph, sgd, num_microbatches=4)
    plan = make_plan(graph, [(["times"], (0, 1)), (["loss"], (0,))])
    with pf.Engine(graph, plan, sgd, precision=pf.Precision(reduce=dtype)) as engine:  # type: ignore[arg-type]
        for _ in range(3):
            assert engine.step(batch).loss == pytest.approx(reference.step(batch).loss, rel=1e-6)


def poisoned(size: int) -> dict[str, torch.Tensor]:
    batch = forked_batch(size)
    batch["x"][-1] = float("inf")
    return batch


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_that_is_not_finite_is_skipped_and_training_goes_on(layout: str) -> None:
    graph = forked_graph()
    reference = pf.Reference(graph, sgd, num_microbatches=4, nonfinite="skip")
    with pf.Engine(graph, make_plan(graph, LAYOUTS[layout]), sgd, nonfinite="skip") as engine:
        for batch in (forked_batch(8), poisoned(8), forked_batch(8, seed=1)):
            before = engine.state_dict()
            result = engine.step(batch)
            assert result.skipped == reference.step(batch).skipped == (not torch.isfinite(batch["x"]).all())
            unchanged = all(torch.equal(before[n], v) for n, v in engine.state_dict().items())
            assert unchanged == result.skipped
        for name, value in reference.state_dict().items():
            torch.testing.assert_close(engine.state_dict()[name], value, rtol=1e-6, atol=1e-6)


def stop(rank: int, transport: str) -> tuple[str, bool, float]:
    graph = forked_graph()
    with pf.Engine(graph, make_plan(graph, LAYOUTS["replicas"]), sgd, nonfinite="raise", transport=transport) as engine:  # type: ignore[arg-type]
        engine.step(forked_batch(8))
        before = engine.state_dict()
        with pytest.raises(NonFiniteError) as caught:
            engine.step(poisoned(8))
        unchanged = all(torch.equal(before[n], v) for n, v in engine.state_dict().items())
        return str(caught.value), unchanged, engine.step(forked_batch(8)).loss


def test_a_step_that_is_not_finite_is_refused_with_names() -> None:
    message, unchanged, _ = stop(0, "threads")
    assert "step 1 has loss 'loss', gradient of 'a.weight'" in message
    assert unchanged


def test_all_processes_stop_at_the_same_step_and_go_on() -> None:
    results = run_ranks(stop, 3, "distributed")
    for result in results:
        assert result.error is None, result.trace
    assert len({result.value for result in results}) == 1
    assert results[0].value[1]


def test_what_makes_no_sense_is_refused() -> None:
    graph = forked_graph()
    plan = make_plan(graph, THREE_STAGES)
    with pytest.raises(EngineError, match=r"'x\.\*', which fits no parameter"):
        pf.Engine(graph, plan, sgd, parameter_groups={"x.*": {"lr": 1.0}})
    with pytest.raises(EngineError, match="clip_norm=0"):
        pf.Engine(graph, plan, sgd, clip_norm=0.0)
    with pytest.raises(EngineError, match="nonfinite='maybe'"):
        pf.Engine(graph, plan, sgd, nonfinite="maybe")  # type: ignore[arg-type]


def flattened(groups: list[Any]) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for group in groups for p in group["params"]], lr=0.1)


@pytest.mark.parametrize(
    ("groups", "optimizer", "words"),
    [
        (
            {"*.bias": {"weigth_decay": 0.0}},
            sgd,
            "'weigth_decay' for 'a.bias', which is no option of SGD; it has lr, mom",
        ),
        ({"*.bias": {"lr": 0.5}}, flattened, r"lr=0\.5 for 'a\.bias', but .* made with lr=0\.1; .* hand them on"),
        ({"*.bias": 0.5}, sgd, "give options by pattern"),
        ([{"lr": 0.5}], sgd, "give options by pattern"),
    ],
)
def test_options_that_no_optimizer_takes_are_refused(groups: Any, optimizer: Any, words: str) -> None:
    """A group's unknown key is kept by torch and read by nobody."""
    graph = forked_graph()
    for make in (
        lambda: pf.Engine(graph, make_plan(graph, THREE_STAGES), optimizer, parameter_groups=groups),
        lambda: pf.Reference(graph, optimizer, parameter_groups=groups),
    ):
        with pytest.raises(EngineError, match=words):
            make()


def test_options_that_are_given_as_they_stand_in_the_defaults_are_no_mistake() -> None:
    graph = forked_graph()
    pf.Reference(graph, flattened, parameter_groups={"*.bias": {"lr": 0.1}})
    rate = torch.tensor(0.5)
    pf.Reference(graph, sgd, parameter_groups={"*.bias": {"lr": rate}})


def tied_graph() -> pf.LayerGraph:
    embed, head = nn.Linear(8, 8), nn.Linear(8, 8)
    head.weight = embed.weight
    graph = pf.LayerGraph("tied")
    x, y = graph.input("x", ("B", 8)), graph.input("y", ("B",), dtype="int64")
    hidden = graph.add("head", head, graph.add("embed", embed, x))
    graph.loss("loss", nn.functional.cross_entropy, hidden, y)
    return graph


@pytest.mark.parametrize(
    ("groups", "kept"),
    [
        ({"head.*": {"lr": 0.0}}, {"embed.weight", "head.bias"}),
        ({"head.weight": {"lr": 0.0}}, {"embed.weight"}),
        ({"embed.*": {"lr": 0.0}, "head.*": {"lr": 0.0}}, {"embed.weight", "embed.bias", "head.bias"}),
        ({"*.weight": {"lr": 0.0}, "head.*": {"lr": 0.5}}, {"embed.weight"}),
    ],
)
def test_a_shared_parameter_goes_by_each_of_its_names(groups: dict[str, Any], kept: set[str]) -> None:
    graph = tied_graph()
    plan = make_plan(graph, [(["embed", "head", "loss"], (0,))])
    for trained in (
        pf.Engine(graph, plan, sgd, parameter_groups=groups),
        pf.Reference(graph, sgd, parameter_groups=groups),
    ):
        before = trained.state_dict()
        trained.step(forked_batch(8))
        after = trained.state_dict()
        assert {name for name, value in before.items() if torch.equal(value, after[name])} == kept


def test_names_of_one_parameter_may_not_be_asked_for_unlike_options() -> None:
    groups = {"embed.*": {"lr": 0.0}, "head.*": {"lr": 0.5}}
    with pytest.raises(EngineError, match=r"'embed\.weight' and 'head\.weight', which they fit, are one parameter"):
        pf.Reference(tied_graph(), sgd, parameter_groups=groups)


def test_frozen_layers_cost_nothing_and_stay_as_they_are() -> None:
    """No gradient is computed for them, none is sent to what lies before them, none is summed."""
    frozen = nn.Linear(8, 8).requires_grad_(False)
    graph = pf.LayerGraph("frozen")
    x, y = graph.input("x", ("B", 8)), graph.input("y", ("B",), dtype="int64")
    hidden = graph.add("second", nn.Tanh(), graph.add("first", frozen, x))
    graph.loss("loss", nn.functional.cross_entropy, graph.add("head", nn.Linear(8, 4), hidden), y)
    plan = make_plan(graph, [(["first"], (0, 1)), (["second"], (2,)), (["head", "loss"], (1,))])
    program = str(pf.lower(plan))
    assert ">0B" not in program
    assert "0B0" not in program
    assert "reduce" not in program
    assert "step 0" not in program
    reference = pf.Reference(graph, sgd, num_microbatches=4)
    with pf.Engine(graph, plan, sgd, num_threads=1) as engine:
        assert engine.step(forked_batch(8)).loss == reference.step(forked_batch(8)).loss
        for name, value in reference.state_dict().items():
            torch.testing.assert_close(engine.state_dict()[name], value)
        assert torch.equal(engine.state_dict()["first.weight"], frozen.weight)
