"""Autocast, scaled losses, float32 masters, sums in a chosen type: as one device, in any layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import pipeflow as pf
from pipeflow.errors import EngineError
from pipeflow.program import Route
from pipeflow.runtime.threads import ThreadTransport
from pipeflow.runtime.transport import Payload
from pipeflow.testing import check_layout_invariance, layer_graphs, plans, run_ranks, unit_costs
from pipeflow.testing.drawn_options import precisions
from pipeflow.testing.graphs import sample_batch
from tests.runtime.models import THREE_STAGES, Stages, forked_batch, forked_graph, make_plan, mean_square, sgd

LAYOUTS: dict[str, Stages] = {
    "single": THREE_STAGES,
    "shared ranks": [(["a", "b"], (0,)), (["c", "d"], (1,)), (["e", "p", "s", "loss"], (0,))],
    "replicas": [(["a", "b"], (0, 1)), (["c", "d"], (2,)), (["e", "p", "s", "loss"], (0, 1, 2))],
}
SCALE = pf.LossScale(initial=2.0**22, growth_interval=2)
PRECISIONS = {
    "bf16 autocast": pf.Precision(autocast="bfloat16"),
    "fp16 autocast, scaled": pf.Precision(autocast="float16", loss_scale=SCALE),
    "bf16 parameters": pf.Precision(parameters="bfloat16"),
    "bf16 sums of micro-batches": pf.Precision(parameters="bfloat16", accumulate="parameters"),
    "fp16 parameters, scaled": pf.Precision(parameters="float16", loss_scale=SCALE),
    "bf16 all over": pf.Precision(autocast="bfloat16", parameters="bfloat16", reduce="bfloat16"),
}


def run_layout(rank: int, layout: str, precision: str, transport: str) -> tuple[list[pf.StepResult], dict[str, Tensor]]:
    """Four steps of a batch that no number of micro-batches divides."""
    graph = forked_graph()
    plan = make_plan(graph, LAYOUTS[layout])
    options: dict[str, Any] = {"precision": PRECISIONS[precision], "clip_norm": 1.0, "transport": transport}
    with pf.Engine(graph, plan, sgd, num_threads=1, **options) as engine:
        return [engine.step(forked_batch(10, seed=seed)) for seed in range(4)], engine.state_dict()


def check_layout(seen: tuple[list[pf.StepResult], dict[str, Tensor]], layout: str, precision: str) -> None:
    chosen = PRECISIONS[precision]
    reference = pf.Reference(forked_graph(), sgd, num_microbatches=4, precision=chosen, clip_norm=1.0)
    # The losses of the first step are the same everywhere; later, sums over replicas have rounded otherwise.
    tolerance = 0.0 if layout != "replicas" else 2e-2 if chosen.reduce else 4e-3
    for step, result in enumerate(seen[0]):
        expected = reference.step(forked_batch(10, seed=step))
        assert result.loss == pytest.approx(expected.loss, rel=tolerance if step else 0.0)
        assert (result.loss_scale, result.skipped) == (expected.loss_scale, expected.skipped)
    for name, value in reference.state_dict().items():
        assert seen[1][name].dtype == value.dtype == torch.float32
        torch.testing.assert_close(seen[1][name], value, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_does_as_one_device(layout: str, precision: str) -> None:
    check_layout(run_layout(0, layout, precision, "threads"), layout, precision)


def run_layouts(rank: int) -> list[tuple[list[pf.StepResult], dict[str, Tensor]]]:
    return [run_layout(rank, layout, p, "distributed") for layout in ("single", "replicas") for p in PRECISIONS]


def test_every_layout_of_processes_does_as_one_device() -> None:
    cases = [(layout, precision) for layout in ("single", "replicas") for precision in PRECISIONS]
    for result in run_ranks(run_layouts, 3):
        assert result.error is None, result.trace
        for seen, (layout, precision) in zip(result.value, cases, strict=True):
            check_layout(seen, layout, precision)


@given(data=st.data())
@settings(max_examples=60)
def test_half_types_are_bitwise_the_reference(data: st.DataObject) -> None:
    graph = data.draw(layer_graphs(allow_random=True, allow_shared=True, allow_buffers=True))
    plan = data.draw(plans(unit_costs(graph), max_ranks=4, max_replicas=1, copies=False, graph_digest=graph.digest))
    sizes = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=3))
    batches = [sample_batch(graph, size, seed=i) for i, size in enumerate(sizes)]
    options = {"precision": data.draw(precisions(graph))}
    check_layout_invariance(graph, plan, batches, options=options, num_accumulated=data.draw(st.integers(0, 1)))


@given(data=st.data())
@settings(max_examples=40)
def test_replicas_of_half_types_differ_by_roundings_of_one_sum(data: st.DataObject) -> None:
    """After one step from the same weights; the tolerance is that of docs/precision.md."""
    graph = data.draw(layer_graphs(allow_random=True, allow_shared=True))
    plan = data.draw(plans(unit_costs(graph), max_ranks=6, max_replicas=3, copies=False, graph_digest=graph.digest))
    precision = data.draw(precisions(graph))
    rounded = "bfloat16" if precision.accumulate == "parameters" else precision.reduce or "float32"
    tolerance = 10 * torch.finfo(getattr(torch, rounded)).eps
    batch = sample_batch(graph, data.draw(st.integers(1, 12)))
    reference = pf.Reference(graph, sgd, num_microbatches=plan.num_microbatches, precision=precision)
    expected, before = reference.step(batch), pf.Reference(graph, sgd).state_dict()
    with pf.Engine(graph, plan, sgd, num_threads=1, precision=precision) as engine:
        seen, state = engine.step(batch), engine.state_dict()
    assert seen.losses == expected.losses
    assert seen.skipped == expected.skipped
    for name, value in reference.state_dict().items():
        moved = float((value - before[name]).abs().max())
        assert float((state[name] - value).abs().max()) <= tolerance * moved + 1e-6 * float(value.abs().max())


def spy_on_sends(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[torch.dtype, ...]]]:
    """Every send between threads from here on: its route, and the types of what it carries."""
    seen: list[tuple[str, tuple[torch.dtype, ...]]] = []
    sender = ThreadTransport.sender

    def spy(self: ThreadTransport, route: Route, peer: int) -> Callable[[int, Payload], None]:
        send = sender(self, route, peer)

        def noted(microbatch: int, payload: Payload) -> None:
            seen.append((str(route), tuple(tensor.dtype for tensor in payload or () if tensor is not None)))
            send(microbatch, payload)

        return noted

    monkeypatch.setattr(ThreadTransport, "sender", spy)
    return seen


@pytest.mark.parametrize("precision", ["bf16 autocast", "bf16 parameters"])
def test_half_types_travel_between_stages(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sends = spy_on_sends(monkeypatch)
    run_layout(0, "single", precision, "threads")
    floats = {dtype for _, dtypes in sends for dtype in dtypes if dtype.is_floating_point}
    assert sends
    assert floats == {torch.bfloat16}


def small_steps(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-4)


def test_masters_keep_steps_too_small_for_bfloat16() -> None:
    graph = forked_graph()
    plan = make_plan(graph, THREE_STAGES)
    plain = pf.Reference(graph, small_steps, num_microbatches=4)
    with pf.Engine(graph, plan, small_steps, precision=pf.Precision(parameters="bfloat16")) as engine:
        before = engine.state_dict()
        for seed in range(20):
            engine.step(forked_batch(8, seed=seed))
            plain.step(forked_batch(8, seed=seed))
        after, expected = engine.state_dict(), plain.state_dict()
    for name, value in after.items():
        moved = value - before[name]
        assert moved.abs().max() < 2.0**-9 * before[name].abs().max()  # bfloat16 would have stayed where it was
        assert (moved - (expected[name] - before[name])).norm() < 0.05 * moved.norm()


def test_checkpoints_hold_masters_and_the_scale_and_load_under_any_plan(tmp_path: Path) -> None:
    graph = forked_graph()
    precision = pf.Precision(parameters="float16", loss_scale=SCALE)
    reference = pf.Reference(graph, sgd, num_microbatches=4, precision=precision)
    expected = [reference.step(forked_batch(8, seed=seed)) for seed in range(6)]
    with pf.Engine(graph, make_plan(graph, THREE_STAGES), sgd, precision=precision) as engine:
        for seed in range(3):
            engine.step(forked_batch(8, seed=seed))
        scale = engine.loss_scale
        engine.save(tmp_path / "saved")
    with pf.Engine(graph, make_plan(graph, LAYOUTS["shared ranks"]), sgd, precision=precision) as engine:
        engine.load(tmp_path / "saved")
        assert engine.loss_scale == scale
        for seed in range(3, 6):
            result = engine.step(forked_batch(8, seed=seed))
            assert (result.loss, result.loss_scale) == (expected[seed].loss, expected[seed].loss_scale)
        for name, value in reference.state_dict().items():
            assert torch.equal(engine.state_dict()[name], value)
    with pf.Engine(graph, make_plan(graph, THREE_STAGES), sgd) as engine:  # and without any of it
        engine.load(tmp_path / "saved")
        assert engine.loss_scale is None
        assert engine.step(forked_batch(8)).loss > 0


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"accumulate": "parameters"}, "accumulate='parameters' without parameters="),
        ({"autocast": "float16", "parameters": "bfloat16"}, "give both the same type"),
    ],
)
def test_choices_that_contradict_each_other_are_refused(choices: dict[str, Any], words: str) -> None:
    with pytest.raises(EngineError, match=words):
        pf.Precision(**choices)


def test_autocast_on_devices_of_several_kinds_is_refused() -> None:
    graph, chosen = forked_graph(), PRECISIONS["bf16 autocast"]
    with pytest.raises(EngineError, match="on devices of the kinds cpu and cuda"):
        pf.Engine(graph, make_plan(graph, THREE_STAGES), sgd, devices=["cpu", "cuda:0", "cpu"], precision=chosen)


def test_a_graph_is_described_in_its_own_types_whatever_is_around() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = forked_graph()
    assert inside.specs == forked_graph().specs


class Total(nn.Module):
    """A learned running total over the steps; reads whatever type it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(None, x)[0]

    def decode(self, state: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor]:
        total = self.mix(x).cumsum(1) if state is None else self.mix(x).cumsum(1) + state
        return total, total[:, -1:]


@pytest.mark.parametrize("precision", ["bf16 autocast", "bf16 parameters"])
def test_sequences_are_decoded_in_half_types(precision: str) -> None:
    """Its inputs come straight from the batch, in float32, and `decode` is called beside `forward`."""
    graph, chosen = pf.LayerGraph("totals"), PRECISIONS[precision]
    total = graph.add("total", pf.lazy(Total), graph.input("x", ("B", "time", 4)))
    graph.loss("loss", mean_square, graph.add("head", pf.lazy(nn.Linear, 4, 2), total))
    x = torch.randn(5, 6, 4, generator=torch.Generator().manual_seed(0))
    reference = pf.Reference(graph, num_microbatches=2, precision=chosen)
    plan = make_plan(graph, [(["total"], (0,)), (["head", "loss"], (1,))], num_microbatches=2)
    with pf.Engine(graph, plan, precision=chosen) as engine:
        whole = engine.predict({"x": x})["head"]
        assert whole.dtype == torch.bfloat16
        with engine.decode(5) as seen, reference.decode(5) as expected:
            for part, piece in zip(torch.split(x, 2, 1), torch.split(whole, 2, 1), strict=True):
                result = seen.step({"x": part})["head"]
                assert torch.equal(result, expected.step({"x": part})["head"])
                torch.testing.assert_close(result, piece, rtol=5e-2, atol=5e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", PRECISIONS)
def test_on_a_gpu(precision: str) -> None:
    """All ranks on one GPU, beside the reference on it."""
    graph, chosen = forked_graph(), PRECISIONS[precision]
    reference = pf.Reference(graph, sgd, num_microbatches=4, precision=chosen, device="cuda")
    with pf.Engine(graph, make_plan(graph, THREE_STAGES), sgd, devices=["cuda:0"] * 3, precision=chosen) as engine:
        for seed in range(4):
            expected, seen = reference.step(forked_batch(10, seed=seed)), engine.step(forked_batch(10, seed=seed))
            assert seen.loss == pytest.approx(expected.loss, rel=4e-3)
            assert (seen.loss_scale, seen.skipped) == (expected.loss_scale, expected.skipped)
