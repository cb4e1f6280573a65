"""Losses scaled for float16: torch's rule, and one decision for all ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pipeflow as pf
from pipeflow.errors import EngineError
from tests.runtime.models import THREE_STAGES, Stages, forked_batch, forked_graph, make_plan, sgd

REPLICAS: Stages = [(["a", "b"], (0, 1)), (["c", "d"], (2,)), (["e", "p", "s", "loss"], (0, 1, 2))]
SCALE = pf.LossScale(initial=2.0**22, growth_interval=2)


def test_scales_skips_and_steps_as_torch_does() -> None:
    """Beside a plain loop with `torch.amp.GradScaler`; the first scales are too large, then it grows."""
    graph = forked_graph()
    modules: Any = graph.build()
    parameters = [p for name in "acep" for p in modules[name].parameters()]
    optimizer = sgd(parameters)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22, growth_interval=2)
    precision = pf.Precision(autocast="float16", loss_scale=SCALE)
    plan = make_plan(graph, THREE_STAGES, num_microbatches=1)
    skipped = []
    with pf.Engine(graph, plan, sgd, precision=precision, clip_norm=0.5) as engine:
        for seed in range(12):
            batch = forked_batch(8, seed=seed)
            with torch.autocast("cpu", dtype=torch.float16):
                a = modules["a"](batch["x"])
                logits = modules["e"](modules["c"](torch.tanh(a)) + a) + modules["p"](a)
                loss = nn.functional.cross_entropy(logits, batch["y"])
            assert engine.loss_scale == scaler.get_scale()
            scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(parameters, 0.5)
            scaler.step(optimizer)
            before, scale = scaler.get_scale(), engine.loss_scale
            scaler.update()
            optimizer.zero_grad()
            result = engine.step(batch)
            assert result.loss_scale == scale
            assert result.skipped == (scaler.get_scale() < before)
            assert result.loss == pytest.approx(float(loss.detach()), rel=1e-3)
            skipped.append(result.skipped)
        assert engine.loss_scale == scaler.get_scale()
        assert 1 <= sum(skipped) < 12
        state = engine.state_dict()
    for name in "acep":
        for key, parameter in modules[name].named_parameters():
            torch.testing.assert_close(state[f"{name}.{key}"], parameter.detach(), rtol=1e-2, atol=1e-3)


def test_overflow_on_one_stage_leaves_all_untouched() -> None:
    """Only the last stage's gradients overflow; the others' are zero or finite, and they skip all the same."""
    graph = forked_graph()
    precision = pf.Precision(loss_scale=pf.LossScale(initial=2.0**100))
    with pf.Engine(graph, make_plan(graph, REPLICAS), sgd, precision=precision) as engine:
        before = engine.state_dict()
        engine.accumulate(forked_batch(8), share=0.5)
        huge = forked_batch(8)
        huge["x"] *= 1e12
        result = engine.step(huge, share=0.5)
        assert result.skipped
        assert (result.loss_scale, engine.loss_scale) == (2.0**100, 2.0**99)
        assert all(torch.equal(before[name], value) for name, value in engine.state_dict().items())
        assert not engine.step(forked_batch(8)).skipped


class Squeeze(nn.Module):
    """Gives a float16 tensor whatever it is given, so that small gradients vanish on the way."""

    def forward(self, x: Tensor) -> Tensor:
        return x.half()


def small_mean(x: Tensor) -> Tensor:
    return x.float().mean() * 1e-8


def large_steps(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e8)


def test_scaled_losses_keep_gradients_that_would_vanish() -> None:
    graph = pf.LayerGraph("small")
    hidden = graph.add("first", pf.lazy(nn.Linear, 4, 4), graph.input("x", ("B", 4)))
    hidden = graph.add("squeeze", pf.lazy(Squeeze), hidden)
    graph.loss("loss", small_mean, hidden)
    plan = make_plan(graph, [(["first"], (0,)), (["squeeze", "loss"], (1,))])
    for scale, moved in ((None, 0.0), (pf.LossScale(initial=2.0**16), 0.25)):
        with pf.Engine(graph, plan, large_steps, precision=pf.Precision(loss_scale=scale)) as engine:
            before = engine.state_dict()["first.bias"]
            engine.step({"x": torch.ones(8, 4)})
            after = engine.state_dict()["first.bias"]
            torch.testing.assert_close(before - after, torch.full((4,), moved), rtol=1e-2, atol=0)


def test_a_scale_that_cannot_move_is_refused() -> None:
    with pytest.raises(EngineError, match="growth_factor=1.0; the scale grows by a factor above 1"):
        pf.LossScale(growth_factor=1.0)
    with pytest.raises(EngineError, match="backoff_factor=2.0; the scale is lowered by a factor below 1"):
        pf.LossScale(backoff_factor=2.0)


def test_raising_on_what_is_not_finite_is_refused_with_a_scale() -> None:
    graph = forked_graph()
    with pytest.raises(EngineError, match="nonfinite='raise' with a loss scale"):
        pf.Engine(
            graph, make_plan(graph, THREE_STAGES), sgd, nonfinite="raise", precision=pf.Precision(loss_scale=SCALE)
        )
