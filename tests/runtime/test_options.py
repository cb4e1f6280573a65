"""Options that an engine cannot follow are refused while it is made, with the value, the rule and the remedy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import pipeflow as pf
from pipeflow.errors import EngineError
from tests.runtime.models import THREE_STAGES, forked_batch, forked_graph, make_plan, sgd


def halving(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)


MADE = sgd([nn.Parameter(torch.ones(1))])
NAN = float("nan")

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"transport": "pigeon"}, "transport='pigeon'; it is 'threads'"),
    ({"num_threads": 0}, "num_threads=0; .* whole number of at least 1"),
    ({"num_threads": 1.5}, "num_threads=1.5"),
    ({"num_threads": True}, "num_threads=True"),
    ({"seed": "7"}, "seed='7'; it is a whole number"),
    ({"seed": -1}, "seed=-1"),
    ({"clip_norm": NAN}, "clip_norm=nan; it must be positive"),
    ({"clip_norm": "1"}, "clip_norm='1'"),
    ({"clip_norm": True}, "clip_norm=True"),
    ({"clip_value": -2}, "clip_value=-2"),
    ({"clip_value": torch.ones(2)}, "clip_value=tensor"),
    ({"nonfinite": "stop"}, "nonfinite='stop'; it is 'ignore', 'raise' or 'skip'"),
    ({"batch_norm": "often"}, "batch_norm='often'"),
    ({"optimizer": MADE}, "optimizer is a SGD; .*lambda parameters"),
    ({"lr_scheduler": halving(MADE)}, "lr_scheduler is a StepLR; .*lambda optimizer"),
    ({"optimizer": lambda parameters: None}, "the optimizer factory gave a NoneType"),
    ({"lr_scheduler": lambda optimizer: None}, "the lr_scheduler factory gave a NoneType"),
    ({"optimizer": torch.optim.SparseAdam}, "SparseAdam .* use Adam"),
    ({"optimizer": torch.optim.LBFGS}, "LBFGS needs a closure"),
    ({"optimizer": None, "lr_scheduler": halving}, "lr_scheduler is given and no optimizer"),
    ({"optimizer": None, "clip_norm": 1.0}, "clip_norm is given and no optimizer"),
    ({"optimizer": None, "clip_value": 1.0}, "clip_value is given and no optimizer"),
    ({"optimizer": None, "nonfinite": "skip"}, "nonfinite is given and no optimizer"),
    ({"optimizer": None, "parameter_groups": {"*.bias": {"lr": 0.1}}}, "parameter_groups is given and no optimizer"),
    ({"optimizer": None, "precision": pf.Precision(loss_scale=pf.LossScale())}, "a loss scale is given and no optimiz"),
    ({"devices": ["cpu"]}, "1 devices for 3 ranks; give one for each"),
    ({"devices": "cpu"}, "devices='cpu'; give a list"),
    ({"devices": ["cpu", "cpu", "toaster"]}, "'toaster' among devices= is no device of torch"),
    ({"devices": ["cpu", "cpu", "cuda:99"]}, "'cuda:99' among devices= is not there"),
    ({"devices": ["cpu", "cpu", "meta"]}, "'meta' among devices= is not there"),
]


@pytest.mark.parametrize(("options", "words"), REFUSED)
def test_an_option_that_cannot_be_followed_is_refused_while_the_engine_is_made(
    options: dict[str, Any], words: str
) -> None:
    graph = forked_graph()
    with pytest.raises(EngineError, match=words):
        pf.Engine(graph, make_plan(graph, THREE_STAGES), **({"optimizer": sgd} | options))


def test_options_at_the_edge_of_what_is_refused_are_taken() -> None:
    graph = forked_graph()
    options: dict[str, Any] = {"clip_norm": float("inf"), "clip_value": 1, "num_threads": 1, "devices": ["cpu"] * 3}
    with pf.Engine(graph, make_plan(graph, THREE_STAGES), sgd, **options) as engine:
        assert engine.step(forked_batch(8)).loss > 0


@pytest.mark.parametrize("share", [float("nan"), "1", True, -1.0])
def test_a_share_that_is_no_number_above_0_is_refused(share: Any) -> None:
    graph = forked_graph()
    with pf.Engine(graph, make_plan(graph, THREE_STAGES), sgd) as engine:
        with pytest.raises(EngineError, match="share="):
            engine.step(forked_batch(8), share=share)
        engine.step(forked_batch(8))


class Turn(nn.Module):
    """Multiplies by complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, dtype=torch.complex64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.weight).abs()


def test_elements_of_complex_gradients_cannot_be_cut() -> None:
    graph = pf.LayerGraph("complex")
    graph.loss("loss", torch.mean, graph.add("turn", pf.lazy(Turn), graph.input("x", ("B", 4))))
    plan = make_plan(graph, [(["turn", "loss"], (0,))])
    with pytest.raises(EngineError, match=r"clip_value=1\.0 with the complex parameter 'turn\.weight'.*clip_norm"):
        pf.Engine(graph, plan, sgd, clip_value=1.0)
    with pytest.raises(EngineError, match=r"clip_value=1\.0 with the complex parameter"):
        pf.Reference(graph, sgd, clip_value=1.0)
    with pf.Engine(graph, plan, sgd, clip_norm=1.0) as engine:
        engine.step({"x": torch.ones(4, 4)})
