"""Batches of any length, and micro-batches that the user makes: trained as on one device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pipeflow as pf
from pipeflow.errors import BatchError, EngineError, LayerFailure, PipeflowError
from pipeflow.testing import check_layout_invariance, run_ranks
from tests.runtime.models import THREE_STAGES as FORKED_STAGES
from tests.runtime.models import forked_batch, forked_graph, make_plan, sgd
from tests.runtime.sequence_models import (
    MOLECULE_REPLICAS,
    MOLECULE_STAGES,
    REPLICAS,
    THREE_STAGES,
    language_model,
    masked_cross_entropy,
    molecule_model,
    molecules,
    tokens_batch,
)

Batches = list[Any]


def length_batches(dtype: torch.dtype = torch.float32) -> Batches:
    """Steps of other lengths, whole and in micro-batches of other sizes each, an empty one among them."""
    return [
        tokens_batch(8, 5, dtype=dtype),
        tokens_batch(3, 9, dtype=dtype),
        [tokens_batch(n, t, dtype=dtype) for n, t in ((2, 7), (5, 3), (0, 4), (1, 12))],
        [tokens_batch(4, 6, dtype=dtype)],
        tokens_batch(8, 5, seed=1, dtype=dtype),
    ]


def molecule_batches(dtype: torch.dtype = torch.float32) -> Batches:
    return [
        [molecules(n, seed=s, dtype=dtype) for s, n in enumerate(sizes)] for sizes in ((3, 1, 4, 2), (2, 0, 5), (1,))
    ]


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_any_length_at_any_step_trains_as_one_device_does(schedule: str) -> None:
    graph = language_model()
    check_layout_invariance(graph, make_plan(graph, THREE_STAGES, schedule=schedule), length_batches())
    graph = language_model(torch.float64)
    check_layout_invariance(graph, make_plan(graph, REPLICAS, schedule=schedule), length_batches(torch.float64))


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_graphs_of_any_size_are_micro_batches_of_their_own(schedule: str) -> None:
    graph = molecule_model()
    check_layout_invariance(graph, make_plan(graph, MOLECULE_STAGES, schedule=schedule), molecule_batches())
    graph = molecule_model(torch.float64)
    plan = make_plan(graph, MOLECULE_REPLICAS, schedule=schedule)
    check_layout_invariance(graph, plan, molecule_batches(torch.float64))


def irregular_ranks(rank: int) -> tuple[list[Any], int]:
    """All of the above with a process per rank; and how often shapes were worked out in equal steps."""
    for dtype, stages, others in (
        (torch.float32, THREE_STAGES, MOLECULE_STAGES),
        (torch.float64, REPLICAS, MOLECULE_REPLICAS),
    ):
        language, molecule = language_model(dtype), molecule_model(dtype)
        check_layout_invariance(language, make_plan(language, stages), length_batches(dtype))
        check_layout_invariance(molecule, make_plan(molecule, others), molecule_batches(dtype))
    graph = language_model()
    with pf.Engine(graph, make_plan(graph, REPLICAS), sgd) as engine:
        whole = engine.predict({"tokens": tokens_batch(7, 6)["tokens"]})
        parts = engine.predict([{"tokens": tokens_batch(n, t)["tokens"]} for n, t in ((2, 7), (0, 3), (1, 4))])
        engine.step(tokens_batch(8, 5))
        assert engine._remote is not None
        known = len(engine._remote._layouts)
        engine.step(tokens_batch(8, 5, seed=1))
        return [whole, parts], len(engine._remote._layouts) - known


def test_processes_agree_on_shapes_without_a_word() -> None:
    graph = language_model()
    reference = pf.Reference(graph, num_microbatches=4)
    whole = reference.predict({"tokens": tokens_batch(7, 6)["tokens"]})
    parts = reference.predict([{"tokens": tokens_batch(n, t)["tokens"]} for n, t in ((2, 7), (0, 3), (1, 4))])
    for result in run_ranks(irregular_ranks, 3):
        assert result.error is None, result.trace
        (seen_whole, seen_parts), new_layouts = result.value
        torch.testing.assert_close(seen_whole, whole, rtol=0, atol=0)
        torch.testing.assert_close(seen_parts, parts, rtol=0, atol=0)
        assert [p["head"].shape for p in seen_parts] == [(2, 7, 11), (0, 3, 11), (1, 4, 11)]
        assert new_layouts == 0


def test_the_loss_is_the_mean_over_all_tokens_of_all_micro_batches() -> None:
    graph = language_model()
    microbatches = [tokens_batch(2, 7), tokens_batch(5, 3), tokens_batch(1, 12)]
    with pf.Engine(graph, make_plan(graph, REPLICAS), sgd) as engine:
        predicted = engine.predict([{"tokens": m["tokens"]} for m in microbatches])
        total = sum(
            float(masked_cross_entropy(p["head"], m["label"], m["mask"]) * m["mask"].sum())
            for p, m in zip(predicted, microbatches, strict=True)
        )
        expected = total / sum(float(m["mask"].sum()) for m in microbatches)
        result = engine.evaluate(microbatches)
        assert result.num_samples == 8
        assert result.loss == pytest.approx(expected, rel=1e-5)


def test_own_micro_batches_of_even_sizes_are_the_batch_cut() -> None:
    graph, batch = forked_graph(), forked_batch(8)
    cut = [{name: value[i : i + 2] for name, value in batch.items()} for i in range(0, 8, 2)]
    plan = make_plan(graph, FORKED_STAGES)
    states = []
    for given in (batch, cut):
        with pf.Engine(graph, plan, sgd) as engine:
            assert engine.step(given).num_samples == 8
            states.append(engine.state_dict())
            joined = engine.predict({"x": batch["x"]})["s"]
            alone = engine.predict([{"x": part["x"]} for part in cut])
            assert torch.equal(torch.cat([part["s"] for part in alone]), joined)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_outputs_without_samples_are_given_for_each_micro_batch() -> None:
    graph = molecule_model()
    batch = [molecules(n, seed=n) for n in (3, 2)]
    with pf.Engine(graph, make_plan(graph, MOLECULE_STAGES)) as engine:
        assert graph.outputs == ("each", "head")
        for given, seen in zip(batch, engine.predict(batch), strict=True):
            assert seen["each"].shape == (len(given["x"]), 2)
            assert seen["head"].shape == (len(given["label"]), 3)


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ([tokens_batch(1, 3)] * 5, "5 micro-batches are given, and there is room for 4"),
        ([], "no samples"),
        ([tokens_batch(0, 3)], "no samples"),
        ([tokens_batch(1, 3), {}], "micro-batch 1: the batch lacks 'tokens'"),
        ([tokens_batch(1, 3) | {"mask": torch.ones(1, 4)}], "micro-batch 0: the batch has different lengths 'time'"),
        (tokens_batch(1, 3) | {"mask": torch.ones(2, 3)}, "different numbers of samples"),
        (torch.ones(3), "a mapping of tensors by input name, or a list of such"),
        ([tokens_batch(2, 3) | {"mask": torch.zeros(2, 3)}] * 2, "add up to 0"),
        (tokens_batch(2, 3) | {"tokens": torch.ones(2, 3, dtype=torch.int64, device="meta")}, "on the meta device"),
    ],
)
def test_what_is_no_batch_is_refused_before_anything_runs(batch: Any, words: str) -> None:
    graph = language_model()
    with pf.Engine(graph, make_plan(graph, THREE_STAGES), sgd) as engine:
        with pytest.raises(BatchError, match=words):
            engine.step(batch)
        engine.step(tokens_batch(2, 3))  # the engine goes on
    with pytest.raises(BatchError, match=words):
        pf.Reference(graph, sgd, num_microbatches=4).step(batch)


def test_what_cannot_be_cut_or_joined_is_refused() -> None:
    graph = molecule_model()
    with pf.Engine(graph, make_plan(graph, MOLECULE_STAGES)) as engine:
        with pytest.raises(
            BatchError, match=r"cannot be cut; give a list of micro-batches, of one if need be: \[batch\]"
        ):
            engine.evaluate(molecules(3))
        with pytest.raises(EngineError, match="output 'each' is .*cannot be joined"):
            engine.predict(molecules(3), ["each"])


def lacking_ranks(rank: int) -> list[str]:
    """The middle rank reads no input: what it has to be given, and what it is told where it is not."""
    graph = language_model()
    batch = tokens_batch(8, 5)
    mine: dict[str, Tensor] = {0: {"tokens": batch["tokens"]}, 2: {k: batch[k] for k in ("label", "mask")}}.get(
        rank, {"tokens": batch["tokens"].to("meta")}
    )
    with pf.Engine(graph, make_plan(graph, THREE_STAGES), sgd) as engine:
        losses = [engine.step(mine).loss, engine.evaluate(mine).loss]
        seen = [repr(losses)]
        try:
            engine.step({} if rank == 1 else mine)
        except PipeflowError as error:
            seen.append(str(error))
        return seen


def test_a_rank_needs_the_sizes_of_what_it_does_not_read_and_no_data() -> None:
    graph, batch = language_model(), tokens_batch(8, 5)
    reference = pf.Reference(graph, sgd, num_microbatches=4)
    losses = repr([reference.step(batch).loss, reference.evaluate(batch).loss])
    for result in run_ranks(lacking_ranks, 3, timeout=60):
        assert result.error is None, result.trace
        assert result.value[0] == losses
        assert (
            "nothing given tells the number of samples; give one of the inputs tokens, label, mask" in result.value[1]
        )


KINDS = ("samples", "length", "cut", "replicas alone")


def odd_ranks(rank: int) -> list[str]:
    """What each rank raises where rank 0 has other micro-batches than its peers."""
    seen = []
    for kind in KINDS:
        graph: pf.LayerGraph = language_model()
        stages: Any = [(list(graph.layers), (0, 1, 2))] if kind == "replicas alone" else THREE_STAGES
        with pf.Engine(graph, make_plan(graph, stages, num_microbatches=3), sgd) as engine:
            engine.step(tokens_batch(6, 5))
            batch: Any = tokens_batch(6, 5)
            if rank == 0:
                batch = {
                    "samples": tokens_batch(5, 5),
                    "length": tokens_batch(6, 6),
                    "cut": [tokens_batch(n, 5) for n in (1, 2, 3)],
                    "replicas alone": tokens_batch(9, 5),
                }[kind]
            try:
                engine.step(batch)
            except LayerFailure as error:
                seen.append(f"{error.phase}: {error}")
    return seen


def test_ranks_with_other_batches_end_with_a_clear_error_everywhere() -> None:
    for result in run_ranks(odd_ranks, 3, timeout=60):
        assert result.error is None, result.trace
        assert len(result.value) == len(KINDS), result.value
        for text in result.value:
            assert text.startswith("batch: ")
            assert "BatchError: the batch has " in text
            assert "every rank must be given the same" in text


def seen_by(rank: int) -> bool:
    """Whether evaluating left something of a graph behind."""
    graph = forked_graph()
    recorded: list[bool] = []

    with pf.Engine(graph, make_plan(graph, FORKED_STAGES), sgd) as engine:
        for replicas in engine._ranks.replicas.values():
            for replica in replicas.values():
                for module in replica.modules.values():
                    module.register_forward_hook(lambda *_: recorded.append(torch.is_grad_enabled()))
        batch = forked_batch(3)
        engine.evaluate(batch)
        outputs = engine.predict({"x": batch["x"]}, ["a", "s"])
        states = [e.state for by_rank in engine._ranks._executors.values() for e in by_rank.values()]
        held = [slots for state in states for stage in state.stages.values() for slots in stage.live]
        assert recorded
        assert not any(value.requires_grad for value in outputs.values())
        return any(recorded) or any(slots is not None for slots in held)


def test_evaluation_and_prediction_keep_no_graph() -> None:
    assert not seen_by(0)
    for result in run_ranks(seen_by, 3):
        assert result.error is None, result.trace
        assert result.value is False


def prediction_ranks(rank: int) -> list[Tensor]:
    graph = forked_graph()
    stages: Any = [(["a", "b"], (0, 1)), (["c", "d"], (1, 2, 0)), (["e", "p", "s", "loss"], (2,))]
    with pf.Engine(graph, make_plan(graph, stages)) as engine:
        return [engine.predict({"x": forked_batch(n)["x"]})["s"] for n in (1, 3, 10, 2)]


def test_predictions_of_any_batch_size_are_in_order_on_every_rank() -> None:
    modules: dict[str, Any] = forked_graph().build()

    def alone(x: Tensor) -> Tensor:
        a = modules["a"](x)
        return modules["e"](modules["c"](torch.tanh(a)) + a) + modules["p"](a)  # type: ignore[no-any-return]

    expected = [alone(forked_batch(n)["x"]).detach() for n in (1, 3, 10, 2)]
    seen = [prediction_ranks(0), *(result.value for result in run_ranks(prediction_ranks, 3))]
    for outputs in seen:
        for a, b in zip(outputs, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_counts_are_added_up_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeflow.runtime import microbatch, rank_state

    calls: list[str] = []

    def counting(module: Any) -> Any:
        factors = module.loss_factors

        def call(loss: Any, *args: Any) -> Any:
            calls.append(loss.name)
            return factors(loss, *args)

        return call

    for module in (microbatch, rank_state):
        monkeypatch.setattr(module, "loss_factors", counting(module))
    graph = language_model()
    with pf.Engine(graph, make_plan(graph, THREE_STAGES), sgd) as engine:
        engine.step(tokens_batch(8, 5))
        assert calls == ["loss"]
    calls.clear()
    forked = forked_graph()
    with pf.Engine(forked, make_plan(forked, FORKED_STAGES), sgd) as engine:
        for seed in range(3):
            engine.step(forked_batch(8, seed=seed))
        assert calls == ["loss"]  # equal batches need no second look


def test_a_derived_length_crosses_between_stages() -> None:
    """A strided convolution makes a length of its own, which no rank is told."""
    graph = audio_model()
    plan = make_plan(graph, AUDIO_STAGES)
    check_layout_invariance(graph, plan, [audio_batch(5, t) for t in (9, 10, 31)])
    for result in run_ranks(audio_ranks, 2):
        assert result.error is None, result.trace


def audio_ranks(rank: int) -> None:
    graph = audio_model()
    check_layout_invariance(graph, make_plan(graph, AUDIO_STAGES), [audio_batch(5, t) for t in (9, 10, 31)])


def test_a_length_that_layers_do_not_take_is_refused_before_anything_runs() -> None:
    graph = pf.LayerGraph("narrow")
    x = graph.input("x", ("B", 3, "time"))
    conv = graph.add("conv", pf.lazy(nn.Conv1d, 3, 4, 5, stride=2), x)
    graph.loss("loss", torch.mean, conv)
    with pf.Engine(graph, make_plan(graph, [(["conv", "loss"], (0,))]), sgd) as engine:
        with pytest.raises(
            BatchError, match=r"does not take a batch of time 3; say what it takes by pf.Length: layer 'conv'"
        ):
            engine.step({"x": torch.zeros(2, 3, 3)})
        engine.step({"x": torch.zeros(2, 3, 5)})


AUDIO_STAGES: Any = [(["first"], (0,)), (["second", "pool", "head", "loss"], (1,))]


def mean_over_time(x: Tensor) -> Tensor:
    return x.mean(2)


def audio_model() -> pf.LayerGraph:
    graph = pf.LayerGraph("audio")
    x = graph.input("x", ("B", 3, pf.Length("time", low=5)))
    y = graph.input("y", ("B",), dtype="int64")
    first = graph.add("first", pf.lazy(nn.Conv1d, 3, 4, 3, stride=2, padding=1), x)
    second = graph.add("second", pf.lazy(nn.Conv1d, 4, 4, 3, stride=3, padding=1), first)
    head = graph.add("head", pf.lazy(nn.Linear, 4, 2), graph.add("pool", mean_over_time, second))
    graph.loss("loss", nn.functional.cross_entropy, head, y)
    return graph


def audio_batch(num_samples: int, time: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(time)
    return {
        "x": torch.randn(num_samples, 3, time, generator=generator),
        "y": torch.randint(0, 2, (num_samples,), generator=generator),
    }
