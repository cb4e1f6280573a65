"""What a profile says, apart from how long things take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import nn

from pipeflow.errors import BatchError, CostError, FormatError, GraphError
from pipeflow.graphs import GraphCosts, LayerGraph, profile
from pipeflow.graphs.stopwatch import spread
from pipeflow.testing.graphs import layer_graphs, sample_batch

QUICK: dict[str, Any] = {"num_repeats": 1, "warmup": 0}


def chain() -> LayerGraph:
    graph = LayerGraph("chain")
    graph.input("x", ("B", 8))
    graph.input("y", ("B", 4))
    shared = nn.Linear(8, 8)
    graph.add("a", shared, "x")
    graph.add("relu", torch.relu, "a")
    graph.add("tanh", torch.tanh, "relu")
    graph.add("b", nn.Sequential(shared), "tanh")
    graph.add("norm", nn.BatchNorm1d(8), "b")
    graph.add("c", nn.Linear(8, 4), "norm")
    graph.add("aside", nn.Linear(8, 4), "norm")
    graph.loss("loss", nn.functional.mse_loss, "c", "y")
    return graph


def batch(samples: int = 6) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(samples, 8), "y": torch.randn(samples, 4)}


def test_a_profile_has_the_graphs_structure_and_bytes() -> None:
    graph = chain()
    costs = profile(graph, batch(), **QUICK)
    assert costs.samples == 6
    assert [layer.name for layer in costs.layers] == list(graph.layers)
    by_name = costs.layer_by_name
    assert by_name["a"].parameter_bytes == 4 * (64 + 8)
    assert by_name["b"].parameter_bytes == 0  # it is a's
    assert costs.colocated == (("a", "b"),)
    assert all(layer.replicable for layer in costs.layers)
    assert by_name["norm"].statistics_bytes == 2 * 8 * 8
    assert all(by_name[n].statistics_bytes == 0 for n in by_name if n != "norm")
    assert by_name["c"].outputs[0].bytes == 6 * 4 * 4
    assert by_name["c"].outputs[0].gradient_bytes == 6 * 4 * 4
    assert by_name["aside"].outputs[0].gradient_bytes == 0
    assert not by_name["aside"].has_backward
    assert by_name["c"].kind == "Linear"
    assert costs.inputs[0].gradient_bytes == 0
    assert not by_name["loss"].outputs[0].scales


def test_saved_bytes_count_each_tensor_once_and_no_parameters() -> None:
    by_name = profile(chain(), batch(), **QUICK).layer_by_name
    size = 6 * 8 * 4
    assert by_name["a"].saved_bytes == size  # its input; the weight is a parameter
    assert by_name["relu"].saved_bytes == size  # what it gives
    assert by_name["tanh"].saved_bytes == size
    assert by_name["b"].saved_bytes == 0  # its input is what tanh keeps already


def test_backward_is_timed_only_where_there_is_one() -> None:
    by_name = profile(chain(), batch(), **QUICK).layer_by_name
    assert by_name["a"].backward_input_seconds == 0  # the batch needs no gradient
    assert by_name["a"].backward_weight_seconds > 0
    assert by_name["relu"].backward_input_seconds > 0
    assert by_name["relu"].backward_weight_seconds == 0
    assert by_name["aside"].backward_weight_seconds == 0
    assert all(layer.forward_seconds > 0 for layer in by_name.values())


@settings(max_examples=8)
@given(layer_graphs(allow_random=True, allow_shared=True, allow_buffers=True, max_layers=7))
def test_every_graph_can_be_profiled(graph: LayerGraph) -> None:
    state = torch.get_rng_state()
    costs = profile(graph, sample_batch(graph, 3), **QUICK)
    assert torch.equal(state, torch.get_rng_state())
    for layer in costs.layers:
        assert 0 <= layer.fixed_fraction <= 1
        assert layer.has_backward == graph.layers[layer.name].has_backward
        for tensor in layer.outputs:
            assert (tensor.gradient_bytes > 0) == (tensor.name in graph.differentiable)
    assert costs.at(6).samples == 6


@pytest.mark.parametrize("samples", [1, 2, 5])
def test_any_number_of_samples_will_do(samples: int) -> None:
    graph = LayerGraph("g")
    graph.input("x", ("B", 4))
    graph.add("a", nn.Linear(4, 4), "x")
    costs = profile(graph, {"x": torch.ones(samples, 4)}, **QUICK)
    assert costs.samples == samples


def test_threads_and_weights_are_as_before() -> None:
    graph, before = chain(), torch.get_num_threads()
    weights = {n: p.clone() for n, p in graph.layers["c"].source.module.named_parameters()}  # type: ignore[union-attr]
    profile(graph, batch(), **QUICK)
    assert torch.get_num_threads() == before
    for name, parameter in graph.layers["c"].source.module.named_parameters():  # type: ignore[union-attr]
        assert torch.equal(parameter, weights[name])
        assert parameter.grad is None


def test_what_cannot_be_profiled_is_refused() -> None:
    with pytest.raises(BatchError, match="lacks 'y'"):
        profile(chain(), {"x": torch.zeros(4, 8)})
    with pytest.raises(BatchError, match="float64"):
        profile(chain(), {**batch(), "x": torch.zeros(6, 8).double()})
    with pytest.raises(GraphError, match="no layers"):
        profile(LayerGraph("empty"), {})
    with pytest.raises(CostError, match="0 repeats"):
        profile(chain(), batch(), num_repeats=0)


class Failing(nn.Module):
    """Raises in forward or in backward, where there is a value to look at."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * 1
        if type(x) is torch.Tensor:
            if self.where == "forward":
                raise RuntimeError("boom")
            if x.requires_grad:
                x.register_hook(self.fail)  # type: ignore[no-untyped-call]
        return x

    def fail(self, gradient: torch.Tensor) -> None:
        raise RuntimeError("boom")


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_layer_that_fails_is_named(where: str) -> None:
    graph = LayerGraph("g")
    hidden = graph.add("first", nn.Linear(4, 4), graph.input("x", ("B", 4)))
    graph.loss("loss", torch.mean, graph.add("bad", Failing(where), hidden))
    with pytest.raises(CostError, match="layer 'bad' cannot be measured: RuntimeError: boom") as caught:
        profile(graph, {"x": torch.ones(2, 4)})
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize("device", ["cuda:99", "meta", "nothing", 3.5])
def test_a_device_that_is_not_there_is_refused(device: Any) -> None:
    with pytest.raises(CostError, match="device"):
        profile(chain(), batch(), device)


def test_a_cache_is_read_for_the_same_question_only(tmp_path: Path) -> None:
    cache = tmp_path / "costs.json"
    options: dict[str, Any] = {**QUICK, "cache": cache}
    first = profile(chain(), batch(), **options)
    assert profile(chain(), batch(), **options) == first
    other = profile(chain(), batch(4), **options)
    assert other.samples == 4
    changed = chain()
    changed.add("more", torch.relu, "c")
    assert "more" in profile(changed, batch(), **options).layer_by_name
    assert profile(chain(), batch(), **options) == first
    assert len(json.loads(cache.read_text())["entries"]) == 3
    assert list(tmp_path.iterdir()) == [cache]


def test_costs_for_another_torch_are_measured_anew(tmp_path: Path) -> None:
    cache = tmp_path / "costs.json"
    profile(chain(), batch(), cache=cache, **QUICK)
    data = json.loads(cache.read_text())
    for entry in data["entries"].values():
        entry["key"]["torch"] = "1.0"
        entry["costs"]["layers"][0]["forward_seconds"] = 1000.0
    cache.write_text(json.dumps(data))
    assert profile(chain(), batch(), cache=cache, **QUICK).layers[0].forward_seconds < 1000


@pytest.mark.parametrize(
    "content", [b"", b"{", b'{"format": "other"}', b"\xff\xfe", b'{"entries": {"a": {"key": {}}}}']
)
def test_a_damaged_cache_is_not_guessed_at(content: bytes, tmp_path: Path) -> None:
    cache = tmp_path / "costs.json"
    cache.write_bytes(content)
    with pytest.raises(FormatError, match=r"(?s)costs\.json is not a file that keeps costs.*delete it"):
        profile(chain(), batch(), cache=cache, **QUICK)
    assert cache.read_bytes() == content


def test_profiles_are_values() -> None:
    costs = profile(chain(), batch(), **QUICK)
    assert GraphCosts.model_validate_json(costs.model_dump_json()) == costs


def test_spread_is_relative() -> None:
    assert spread([1.0]) == 0
    assert spread([1.0, 1.0, 1.0]) == 0
    assert spread([1.0, 2.0, 3.0]) == pytest.approx(0.5)


@pytest.mark.gpu
def test_a_profile_on_a_gpu() -> None:
    costs = profile(chain(), batch(), "cuda", **QUICK)
    assert costs.device.startswith("cuda")
    assert all(layer.forward_seconds > 0 for layer in costs.layers)
