"""Any optimizer and scheduler of torch's that steps each parameter by itself, stage by stage."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler as rates
from torch.optim.swa_utils import SWALR

import pipeflow as pf
from pipeflow.errors import EngineError
from pipeflow.testing import run_ranks
from tests.runtime.models import THREE_STAGES, Stages, forked_batch, forked_graph, make_plan, sgd

OTHER_STAGES: Stages = [(["a", "b", "c"], (0,)), (["d", "e", "p", "s", "loss"], (1,))]
REPLICAS: Stages = [(["a", "b"], (0, 1)), (["c", "d"], (2,)), (["e", "p", "s", "loss"], (0, 1, 2))]

FIRST_ORDER = ["ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop"]
FIRST_ORDER += ["Rprop", "SGD"]
FUSED = ["Adagrad", "Adam", "AdamW", "SGD"]
OPTIMIZERS: dict[str, Callable[[list[Any]], torch.optim.Optimizer]] = {
    **{name: partial(getattr(torch.optim, name), lr=1e-2) for name in FIRST_ORDER},
    **{f"{name}, foreach": partial(getattr(torch.optim, name), lr=1e-2, foreach=True) for name in FIRST_ORDER},
    **{f"{name}, fused": partial(getattr(torch.optim, name), lr=1e-2, fused=True) for name in FUSED},
    "Adam, amsgrad": partial(torch.optim.Adam, amsgrad=True),
    "SGD, Nesterov, maximize": partial(torch.optim.SGD, lr=1e-2, momentum=0.9, nesterov=True, maximize=True),
    "SGD, rate in a tensor": partial(torch.optim.SGD, lr=torch.tensor(0.1)),
}


def test_every_optimizer_of_torch_is_here_or_apart() -> None:
    """A new one has to be looked at: whether it mixes parameters, or needs more than dense gradients."""
    known = {name for name in dir(torch.optim) if isinstance(getattr(torch.optim, name), type)}
    assert known == {*FIRST_ORDER, "Optimizer", "LBFGS", "Muon", "SparseAdam"}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_as_on_one_device(name: str) -> None:
    graph, optimizer = forked_graph(), OPTIMIZERS[name]
    reference = pf.Reference(graph, optimizer, num_microbatches=4)
    with pf.Engine(graph, make_plan(graph, THREE_STAGES), optimizer, num_threads=1) as engine:
        for seed in range(3):
            assert engine.step(forked_batch(8, seed=seed)) == reference.step(forked_batch(8, seed=seed))
        for key, value in reference.state_dict().items():
            assert torch.equal(engine.state_dict()[key], value)


def run_optimizers(rank: int) -> list[dict[str, Tensor]]:
    states = []
    for name in FIRST_ORDER:
        graph = forked_graph()
        with pf.Engine(graph, make_plan(graph, REPLICAS), OPTIMIZERS[name]) as engine:
            engine.step(forked_batch(8))
            states.append(engine.state_dict())
    return states


def test_replicas_in_processes_step_as_on_one_device() -> None:
    for result in run_ranks(run_optimizers, 3):
        assert result.error is None, result.trace
        for name, state in zip(FIRST_ORDER, result.value, strict=True):
            reference = pf.Reference(forked_graph(), OPTIMIZERS[name], num_microbatches=4)
            reference.step(forked_batch(8))
            for key, value in reference.state_dict().items():
                torch.testing.assert_close(state[key], value, rtol=1e-3, atol=1e-4, msg=f"{name}: {key}")


def square(x: Tensor) -> Tensor:
    return x.square().mean()


def test_muon_steps_a_model_of_matrices() -> None:
    """It is torch's rule that each of its parameters is a matrix; it looks at one at a time."""
    graph = pf.LayerGraph("matrices")
    hidden = graph.add("first", pf.lazy(nn.Linear, 8, 8, bias=False), graph.input("x", ("B", 8)))
    graph.loss("loss", square, graph.add("second", pf.lazy(nn.Linear, 8, 4, bias=False), hidden))
    reference = pf.Reference(graph, torch.optim.Muon, num_microbatches=4)
    plan = make_plan(graph, [(["first"], (0,)), (["second", "loss"], (1,))])
    with pf.Engine(graph, plan, torch.optim.Muon, num_threads=1) as engine:
        for _ in range(3):
            assert engine.step({"x": torch.ones(8, 8)}) == reference.step({"x": torch.ones(8, 8)})
        for key, value in reference.state_dict().items():
            assert torch.equal(engine.state_dict()[key], value)


def test_an_optimizer_that_records_its_steps_is_refused() -> None:
    graph = forked_graph()
    with pytest.raises(EngineError, match="differentiable=True"):
        pf.Engine(graph, make_plan(graph, THREE_STAGES), partial(torch.optim.Adam, differentiable=True))


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "StepLR": lambda o: rates.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: rates.MultiStepLR(o, [1, 5], 0.5),
    "ConstantLR": lambda o: rates.ConstantLR(o, total_iters=4),
    "LinearLR": lambda o: rates.LinearLR(o, total_iters=4),
    "ExponentialLR": lambda o: rates.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: rates.PolynomialLR(o),
    "CosineAnnealingLR": lambda o: rates.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: rates.CosineAnnealingWarmRestarts(o, 3),
    "OneCycleLR": lambda o: rates.OneCycleLR(o, 0.1, total_steps=10),
    "CyclicLR": lambda o: rates.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "LambdaLR": lambda o: rates.LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda o: rates.MultiplicativeLR(o, lambda _: 0.9),
    "SequentialLR": lambda o: rates.SequentialLR(
        o, [rates.LinearLR(o, total_iters=4), rates.LambdaLR(o, lambda epoch: 0.8**epoch)], [4]
    ),
    "ChainedScheduler": lambda o: rates.ChainedScheduler([rates.LinearLR(o), rates.ExponentialLR(o, 0.9)], optimizer=o),
    "ReduceLROnPlateau": lambda o: rates.ReduceLROnPlateau(o, patience=0, factor=0.5, min_lr=1e-3),
    "SWALR": lambda o: SWALR(o, 0.05, anneal_epochs=4),
}
GROUPS = {"a.*": {"lr": 0.2}, "*.bias": {"weight_decay": 0.1}}


def test_every_scheduler_of_torch_is_here() -> None:
    known = {name for name in dir(rates) if isinstance(getattr(rates, name), type) and name in rates.__all__}
    assert known - {"LRScheduler"} == SCHEDULERS.keys() - {"SWALR"}


@pytest.mark.parametrize("groups", [None, GROUPS], ids=["one group", "groups"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_go_on_under_another_plan(name: str, groups: Any, tmp_path: Path) -> None:
    graph, options = forked_graph(), {"lr_scheduler": SCHEDULERS[name], "parameter_groups": groups, "clip_norm": 1e3}
    reference = pf.Reference(graph, sgd, num_microbatches=4, **options)
    with pf.Engine(graph, make_plan(graph, THREE_STAGES), sgd, num_threads=1, **options) as engine:
        for seed in range(3):
            assert engine.step(forked_batch(8, seed=seed)) == reference.step(forked_batch(8, seed=seed))
        engine.save(tmp_path / "saved")
    with pf.Engine(graph, make_plan(graph, OTHER_STAGES), sgd, num_threads=1, **options) as engine:
        engine.load(tmp_path / "saved")
        for seed in range(3, 8):
            assert engine.step(forked_batch(8, seed=seed)) == reference.step(forked_batch(8, seed=seed))
        for key, value in reference.state_dict().items():
            assert torch.equal(engine.state_dict()[key], value)


def halves(optimizer: torch.optim.Optimizer) -> Any:
    return rates.ReduceLROnPlateau(optimizer, patience=0, factor=0.5, threshold=10.0, threshold_mode="abs")


def run_plateau(rank: int) -> list[float]:
    """No loss ever falls by 10, so the rate halves at each step but the first."""
    graph, seen = forked_graph(), []
    with pf.Engine(graph, make_plan(graph, REPLICAS), sgd, lr_scheduler=halves) as engine:
        for seed in range(4):
            engine.step(forked_batch(8, seed=seed))
            replicas = engine._ranks.replicas[rank].values()
            seen.append({r.optimizer.param_groups[0]["lr"] for r in replicas if r.optimizer}.pop())
    return seen


def test_rates_follow_the_loss_alike_in_all_processes() -> None:
    for result in run_ranks(run_plateau, 3):
        assert result.error is None, result.trace
        assert result.value == [0.05, 0.025, 0.0125, 0.00625]
