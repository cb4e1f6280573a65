"""Means over sample weights or unpadded tokens: over the whole batch, however it is cut."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pipeflow as pf
from pipeflow.errors import BatchError, GraphError, LayerFailure
from pipeflow.testing import check_layout_invariance, run_ranks
from pipeflow.testing.graphs import sample_batch
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


def test_micro_batches_that_count_nothing_are_refused_where_replicas_would_wait_for_them() -> None:
    graph = pf.LayerGraph("both")
    x, mask = graph.input("x", ("B", 4)), graph.input("mask", ("B",))
    graph.loss("loss", weighted_square, graph.add("norm", pf.lazy(nn.BatchNorm1d, 4), x), mask, count=mask)
    batch, bad = rooted_batch(torch.float32, 8, 8), rooted_batch(torch.float32, 8, 3)
    plan = make_plan(graph, [(["norm", "loss"], (0, 1))])
    with pf.Engine(graph, plan, sgd, batch_norm="synchronised") as engine:
        with pytest.raises(BatchError, match="micro-batch 2 counts nothing in loss 'loss', by 'mask'"):
            engine.step(bad)
        engine.step(batch)
        engine.evaluate(bad)
    with pf.Engine(graph, make_plan(graph, [(["norm", "loss"], (0,))]), sgd, batch_norm="synchronised") as engine:
        engine.step(bad)


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


# -- torch's own means over labels -------------------------------------------------------------

CLASSES, STEPS = 5, 3
WEIGHTS = torch.tensor([0.5, 2.0, 1.0, 0.0, 3.0], dtype=torch.float64)


def log_likelihood(scores: Tensor, label: Tensor) -> Tensor:
    return nn.functional.nll_loss(scores.log_softmax(1), label)


def flat(scores: Tensor, label: Tensor) -> Tensor:
    """(B, classes, steps) as a language model's rows."""
    return nn.functional.cross_entropy(scores.transpose(1, 2).flatten(0, 1), label.flatten())


LABEL_MEANS: dict[str, tuple[object, int]] = {
    "function": (nn.functional.cross_entropy, -100),
    "module": (nn.CrossEntropyLoss(ignore_index=2), 2),
    "recipe": (pf.lazy(nn.CrossEntropyLoss, ignore_index=0, label_smoothing=0.2), 0),
    "weights": (nn.CrossEntropyLoss(weight=WEIGHTS), -100),
    "both": (pf.lazy(nn.CrossEntropyLoss, weight=WEIGHTS, ignore_index=1), 1),
    "smoothed": (partial(nn.functional.cross_entropy, label_smoothing=0.1), -100),
    "partial": (partial(nn.functional.cross_entropy, ignore_index=4), 4),
    "within": (log_likelihood, -100),
    "rows": (flat, -100),
}


def labelled(loss: object) -> pf.LayerGraph:
    """Scores (B, classes, steps) of labels (B, steps), in float64."""
    graph = pf.LayerGraph("labelled")
    x = graph.input("x", ("B", 4, STEPS), "float64")
    label = graph.input("label", ("B", STEPS), dtype="int64")
    hidden = graph.add("hidden", pf.lazy(nn.Conv1d, 4, 8, 1, dtype=torch.float64), x)
    logits = graph.add("logits", pf.lazy(nn.Conv1d, 8, CLASSES, 1, dtype=torch.float64), hidden)
    graph.loss("loss", loss, logits, label)
    return graph


def labelled_batch(num_samples: int, ignored: int, *, padded: int = 3) -> dict[str, Tensor]:
    """The first `padded` samples have no label that counts, others lose some."""
    batch = sample_batch(labelled(nn.functional.cross_entropy), num_samples, seed=num_samples)
    label = batch["label"]
    label[torch.arange(STEPS) > torch.arange(num_samples)[:, None] % STEPS] = ignored
    label[:padded] = ignored
    return batch


@pytest.mark.parametrize("name", LABEL_MEANS)
def test_ignored_labels_and_weights_of_classes_count_as_in_torch(name: str) -> None:
    """Over the whole batch; the first of four micro-batches has nothing to count."""
    loss, ignored = LABEL_MEANS[name]
    graph = labelled(loss)
    modules: dict[str, Any] = graph.build()
    batch = labelled_batch(10, ignored)
    scores = modules["logits"](modules["hidden"](batch["x"]))
    expected = modules["loss"](scores, batch["label"])
    torch.autograd.backward(expected)
    for stages in (STAGES, REPLICAS):
        with pf.Engine(graph, make_plan(graph, stages), lambda p: torch.optim.SGD(p, lr=1.0)) as engine:
            before = engine.state_dict()
            assert engine.evaluate(batch).loss == pytest.approx(float(expected.detach()), rel=1e-12)
            assert engine.step(batch).loss == pytest.approx(float(expected.detach()), rel=1e-12)
            after = engine.state_dict()
        for layer in ("hidden", "logits"):
            for key, parameter in modules[layer].named_parameters():
                torch.testing.assert_close(before[f"{layer}.{key}"] - after[f"{layer}.{key}"], parameter.grad)


@pytest.mark.parametrize("name", LABEL_MEANS)
def test_labels_train_bitwise_as_on_one_device_whichever_are_ignored(name: str) -> None:
    """Batches of the same sizes with and without, so that what is kept between steps shows."""
    loss, ignored = LABEL_MEANS[name]
    graph = labelled(loss)
    whole = sample_batch(graph, 10, seed=1)
    pieces = [labelled_batch(n, ignored, padded=p) for n, p in ((4, 4), (2, 1), (3, 0))]
    batches: list[Any] = [whole, labelled_batch(10, ignored), whole, pieces, labelled_batch(3, ignored, padded=2)]
    for stages in (STAGES, REPLICAS):
        check_layout_invariance(graph, make_plan(graph, stages), batches)


def labels_over_gloo(rank: int) -> None:
    for loss, ignored in LABEL_MEANS.values():
        graph = labelled(loss)
        check_layout_invariance(graph, make_plan(graph, REPLICAS), [labelled_batch(10, ignored)])


def test_labels_count_over_processes() -> None:
    for result in run_ranks(labels_over_gloo, 3):
        assert result.error is None, result.trace


def test_weights_of_classes_that_were_loaded_count() -> None:
    graph = labelled(nn.CrossEntropyLoss(weight=torch.ones(CLASSES, dtype=torch.float64)))
    batch = labelled_batch(10, -100)
    reference = pf.Reference(labelled(nn.CrossEntropyLoss(weight=WEIGHTS)))
    with pf.Engine(graph, make_plan(graph, STAGES)) as engine:
        assert engine.evaluate(batch).loss != pytest.approx(reference.evaluate(batch).loss)
        engine.load_state_dict(reference.state_dict())
        assert engine.evaluate(batch).loss == pytest.approx(reference.evaluate(batch).loss, rel=1e-12)


def test_labels_of_which_none_counts_or_that_have_no_weight_are_refused() -> None:
    graph = labelled(nn.CrossEntropyLoss(weight=WEIGHTS))
    for trainer in (pf.Reference(graph), pf.Engine(graph, make_plan(graph, STAGES))):
        with pytest.raises(BatchError, match="labels other than -100, by the weights of their classes, 'label' of"):
            trainer.evaluate(labelled_batch(4, -100, padded=4))
        batch = labelled_batch(4, -100)
        batch["label"][3, 0] = 7
        with pytest.raises(BatchError, match="lie between .* and 7, and there are weights for 5 classes"):
            trainer.evaluate(batch)


def halved(scores: Tensor, label: Tensor, **options: Any) -> Tensor:
    """A mean over labels, and something besides, that is one over samples."""
    return nn.functional.cross_entropy(scores, label, **options) / 2 + scores.square().mean()


def test_means_over_labels_that_cannot_be_weighed_are_refused() -> None:
    with pytest.raises(GraphError, match="'loss' takes a mean over labels with ignore_index=0.*pass count="):
        labelled(partial(halved, ignore_index=0))

    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weights", WEIGHTS)

        def forward(self, scores: Tensor, label: Tensor) -> Tensor:
            return halved(scores, label, weight=self.weights)

    with pytest.raises(GraphError, match="with classes that count unequally.*pass count="):
        labelled(Weighted())


def test_ignored_labels_of_a_mean_that_cannot_be_weighed_are_refused_when_they_come() -> None:
    """Of a sum of two means, of labels that a layer computes, and where torch itself divides by two numbers."""
    computed = pf.LayerGraph("computed")
    scores = computed.add(
        "hidden", pf.lazy(nn.Linear, 4, 3, dtype=torch.float64), computed.input("x", ("B", 4), "float64")
    )
    labels = computed.add("label", torch.clone, computed.input("given", ("B",), "int64"))
    computed.loss("loss", nn.functional.cross_entropy, scores, labels)
    smoothed = labelled(nn.CrossEntropyLoss(weight=WEIGHTS, label_smoothing=0.1))
    for graph, name in ((labelled(halved), "label"), (computed, "given"), (smoothed, "label")):
        reference, batch = pf.Reference(graph, num_microbatches=2), sample_batch(graph, 6)
        reference.evaluate(batch)
        with pf.Engine(graph, make_plan(graph, [(list(graph.layers), (0,))])) as engine:
            engine.evaluate(batch)
            batch[name][0] = -100
            with pytest.raises(BatchError, match="given labels of -100.*pass count="):
                reference.evaluate(batch)
            with pytest.raises(LayerFailure, match="given labels of -100.*pass count="):
                engine.evaluate(batch)


def test_counts_come_before_what_labels_say() -> None:
    graph = labelled(halved)
    mask = graph.input("mask", ("B",), "float64")
    graph.loss("counted", partial(halved, ignore_index=0), "logits", "label", count=mask)
    assert graph.layers["counted"].counted == "mask"
    assert (graph.layers["loss"].counted, graph.layers["loss"].barred_label) == (None, -100)
