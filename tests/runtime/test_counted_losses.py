"""Means over sample weights or unpadded tokens: over the whole batch, however it is cut."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import pipeflow as pf
from pipeflow.errors import BatchError, GraphError, PlanError
from pipeflow.testing import check_layout_invariance, run_ranks
from tests.runtime.models import make_plan, sgd


def masked_mean(logits: Tensor, label: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy over the positions that the mask counts; logits (B, T, C), the others (B, T)."""
    each = nn.functional.cross_entropy(logits.flatten(0, 1), label.flatten(), reduction="none")
    return (each * mask.flatten()).sum() / mask.sum()


def tokens_graph() -> pf.LayerGraph:
    graph = pf.LayerGraph("tokens")
    x = graph.input("x", ("B", 3, 4))
    label = graph.input("label", ("B", 3), dtype="int64")
    mask = graph.input("mask", ("B", 3))
    hidden = graph.add("hidden", pf.lazy(nn.Linear, 4, 8), x)
    logits = graph.add("logits", pf.lazy(nn.Linear, 8, 5), hidden)
    graph.loss("loss", masked_mean, logits, label, mask, count=mask)
    return graph


def tokens_batch(num_samples: int, *, padded: int = 0) -> dict[str, Tensor]:
    """The first `padded` samples are padding throughout; the others each of another length."""
    generator = torch.Generator().manual_seed(num_samples)
    length = torch.arange(num_samples) % 3 + 1
    mask = (torch.arange(3) < length[:, None]).float()
    mask[:padded] = 0
    x = torch.randn(num_samples, 3, 4, generator=generator)
    return {"x": x, "label": torch.randint(0, 5, (num_samples, 3), generator=generator), "mask": mask}


STAGES = [(["hidden"], (0,)), (["logits", "loss"], (1,))]
REPLICAS = [(["hidden"], (0, 1)), (["logits", "loss"], (1, 2, 0))]


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_is_the_mean_over_the_whole_batch(schedule: str) -> None:
    graph = tokens_graph()
    modules = graph.build()
    batch = tokens_batch(10, padded=3)  # the first micro-batch of 3 samples has nothing to count
    expected = masked_mean(modules["logits"](modules["hidden"](batch["x"])), batch["label"], batch["mask"])
    torch.autograd.backward(expected)
    for stages in (STAGES, REPLICAS):
        plan = make_plan(graph, stages, num_microbatches=4, schedule=schedule)
        with pf.Engine(graph, plan, lambda p: torch.optim.SGD(p, lr=1.0)) as engine:
            before = engine.state_dict()
            assert engine.evaluate(batch).loss == pytest.approx(float(expected.detach()), rel=1e-6)
            assert engine.step(batch).loss == pytest.approx(float(expected.detach()), rel=1e-6)
            after = engine.state_dict()
        for name in ("hidden", "logits"):
            for key, parameter in modules[name].named_parameters():  # type: ignore[attr-defined]
                step = before[f"{name}.{key}"] - after[f"{name}.{key}"]
                torch.testing.assert_close(step, parameter.grad, rtol=1e-4, atol=1e-6)


def test_is_bitwise_the_reference_for_any_batch() -> None:
    graph = tokens_graph()
    batches = [tokens_batch(10, padded=3), tokens_batch(2), tokens_batch(7, padded=6)]
    check_layout_invariance(graph, make_plan(graph, STAGES), batches)


def root(x: Tensor) -> Tensor:
    """Has no finite gradient at 0, where nothing may be propagated back."""
    return x.relu().square().sum(-1, keepdim=True).sqrt() * torch.ones(4)


def rooted_graph(dtype: str = "float32") -> pf.LayerGraph:
    """A layer whose backward turns zeros into what is no number, before one that is trained by two losses."""
    graph = pf.LayerGraph("rooted")
    x, mask = graph.input("x", ("B", 4), dtype), graph.input("mask", ("B",), dtype)
    hidden = graph.add("hidden", pf.lazy(nn.Linear, 4, 4, dtype=getattr(torch, dtype)), x)
    value = graph.add("root", root, graph.add("none", torch.mul, hidden, graph.add("some", column, mask)))
    graph.loss("loss", weighted_square, value, mask, count=mask)
    graph.loss("other", weighted_square, graph.add("twice", torch.add, hidden, hidden), mask, count=mask)
    return graph


def column(mask: Tensor) -> Tensor:
    return mask[:, None]


def weighted_square(x: Tensor, mask: Tensor) -> Tensor:
    return ((x - 1).square().mean(-1) * mask).sum() / mask.sum()


def rooted_batch(dtype: torch.dtype, num_samples: int, num_counted: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(num_samples)
    x = torch.randn(num_samples, 4, generator=generator, dtype=dtype)
    return {"x": x, "mask": (torch.arange(num_samples) < num_counted).to(dtype)}


ROOTED = [(["hidden", "some", "none"], (0,)), (["root"], (1,)), (["twice", "other"], (0,)), (["loss"], (2,))]
ROOTED_REPLICAS = [(["hidden", "some", "none"], (0, 2)), (["root", "loss"], (1, 2, 0)), (["twice", "other"], (1, 0))]


def check_nothing_goes_back(rank: int = 0) -> None:
    """Micro-batches that count nothing have no gradient on any stage, not one of zeros."""
    for schedule in pf.SCHEDULES:
        graph = rooted_graph()
        batches = [rooted_batch(torch.float32, n, k) for n, k in ((8, 4), (10, 1), (2, 1))]
        check_layout_invariance(graph, make_plan(graph, ROOTED, schedule=schedule), batches)
        graph = rooted_graph("float64")
        batches = [rooted_batch(torch.float64, n, k) for n, k in ((8, 4), (10, 1), (2, 1))]
        check_layout_invariance(graph, make_plan(graph, ROOTED_REPLICAS, schedule=schedule), batches)


def test_a_micro_batch_that_counts_nothing_sends_no_gradient() -> None:
    check_nothing_goes_back()


def test_a_micro_batch_that_counts_nothing_sends_no_gradient_over_processes() -> None:
    for result in run_ranks(check_nothing_goes_back, 3):
        assert result.error is None, result.trace


def test_counted_losses_and_synchronised_norms_are_refused_together() -> None:
    graph = pf.LayerGraph("both")
    x, mask = graph.input("x", ("B", 4)), graph.input("mask", ("B",))
    graph.loss("loss", weighted_square, graph.add("norm", pf.lazy(nn.BatchNorm1d, 4), x), mask, count=mask)
    plan = make_plan(graph, [(["norm", "loss"], (0, 1))])
    with pytest.raises(PlanError, match="'synchronised' with loss 'loss', a mean over counts"):
        pf.Engine(graph, plan, sgd, batch_norm="synchronised")
    pf.Engine(graph, make_plan(graph, [(["norm", "loss"], (0,))]), sgd, batch_norm="synchronised").close()


def test_predicting_needs_no_counts() -> None:
    graph = tokens_graph()
    with pf.Engine(graph, make_plan(graph, STAGES)) as engine:
        assert engine.predict({"x": tokens_batch(5)["x"]})["logits"].shape == (5, 3, 5)


def test_counts_that_make_no_mean_are_refused() -> None:
    graph = tokens_graph()
    with pf.Engine(graph, make_plan(graph, STAGES), sgd) as engine:
        with pytest.raises(BatchError, match="add up to 0"):
            engine.step(tokens_batch(4, padded=4))
        batch = tokens_batch(4)
        batch["mask"][0] = -5.0
        with pytest.raises(BatchError, match="at least 0"):
            engine.step(batch)


def test_counts_that_come_too_late_or_make_no_sense_are_refused() -> None:
    graph = tokens_graph()
    with pytest.raises(GraphError, match="count='hidden' is computed by a layer"):
        graph.loss("other", masked_mean, "logits", "label", "mask", count="hidden")
    with pytest.raises(GraphError, match="counts are for a"):
        graph.loss("other", masked_mean, "logits", "label", "mask", count="mask", reduction="sum")


def test_survives_a_file(tmp_path) -> None:  # type: ignore[no-untyped-def]
    graph = tokens_graph()
    graph.save(tmp_path / "graph.json")
    loaded = pf.LayerGraph.load(tmp_path / "graph.json", allow=["tests.runtime.test_counted_losses"])
    assert loaded.layers["loss"].count == "mask"
    assert loaded.digest == graph.digest
