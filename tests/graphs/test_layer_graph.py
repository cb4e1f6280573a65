"""Examples of what can and cannot be declared, and of what inference finds."""

from __future__ import annotations

import contextlib
import io
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from pipeflow.errors import BatchError, GraphError, ShapeError
from pipeflow.graphs import LayerGraph, TensorSpec, lazy
from pipeflow.graphs.layer import Lazy

functional = nn.functional


def tiny() -> LayerGraph:
    graph = LayerGraph("tiny")
    x = graph.input("x", ("B", 8))
    label = graph.input("label", ("B",), dtype=torch.int64)
    hidden = graph.add("hidden", lazy(nn.Linear, 8, 16), x)
    left, right = graph.add("halves", torch.chunk, hidden, chunks=2, dim=1)
    joined = graph.add("joined", torch.add, left, right)
    logits = graph.add("logits", nn.Linear(8, 3), joined)
    graph.loss("loss", functional.cross_entropy, logits, label, weight=0.5)
    return graph.check()


def test_a_graph_knows_its_parts() -> None:
    graph = tiny()
    assert list(graph.inputs) == ["x", "label"]
    assert list(graph.layers) == ["hidden", "halves", "joined", "logits", "loss"]
    assert graph.layers["halves"].outputs == ("halves:0", "halves:1")
    assert graph.specs["halves:1"] == TensorSpec(("B", 8), requires_grad=True)
    assert graph.losses == ("loss",)
    assert graph.outputs == ("logits",)
    assert graph.layers["loss"].weight == 0.5
    assert graph.layers["hidden"].kind == "Linear"
    assert graph.differentiable == {"hidden", "halves:0", "halves:1", "joined", "logits", "loss"}
    assert list(graph.parameters) == ["hidden.weight", "hidden.bias", "logits.weight", "logits.bias"]
    assert graph.parameters["logits.weight"].shape == (3, 8)
    assert all(layer.has_backward for layer in graph.layers.values())


def test_networkx_sees_tensors_on_edges_and_cannot_change_them() -> None:
    graph = tiny()
    assert dict(graph.nx.edges["halves", "joined"]["tensors"]) == {
        "halves:0": graph.specs["halves:0"],
        "halves:1": graph.specs["halves:1"],
    }
    assert graph.nx.nodes["x"]["kind"] == "input"
    with pytest.raises(Exception, match="[Ff]rozen"):
        graph.nx.add_edge("loss", "x")


def declare(name: str) -> tuple[LayerGraph, Callable[..., Any]]:
    graph = LayerGraph("g")
    graph.input("x", ("B", 8))
    graph.input("other", ("B", 6))
    return graph, lambda layer, *inputs, **kwargs: graph.add(name, layer, *(inputs or ("x",)), **kwargs)


def grow(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x, x[:1]])


def per_sample(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, 2)


def by_content(x: torch.Tensor) -> torch.Tensor:
    return x if x.sum() > 0 else -x


def in_set(x: torch.Tensor) -> set[torch.Tensor]:
    return {x}


def no_tensor(x: torch.Tensor) -> tuple[None, dict[str, int]]:
    return None, {"n": 3}


OUTSIDE = torch.ones(8)


def from_outside(x: torch.Tensor) -> torch.Tensor:
    return x + OUTSIDE


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (nn.Linear(6, 4), ["'e'", "float32 (B, 8)", "float32 (B, ..., 6)"]),
        (lazy(nn.Linear, 6, 4), ["'e'", "float32 (B, 8)", "float32 (B, ..., 6)"]),
        (nn.Linear(8, 4).double(), ["float32 (B, 8)", "float64 (B, ..., 8)"]),
        (nn.LayerNorm(6), ["float32 (B, 8)", "float32 (B, ..., 6)"]),
        (nn.LayerNorm(8).double(), ["one dtype", "float64"]),
        (nn.Conv2d(3, 4, 3), ["float32 (B, 8)", "(B, 3, ...)"]),
        (nn.Embedding(10, 4), ["float32 (B, 8)", "integers below 10"]),
        (grow, ["multiple of the batch", "(4, 8)", "(6, 8)"]),
        (torch.nonzero, ["depends on the data"]),
        (by_content, ["depends on the data"]),
    ],
)
def test_a_shape_that_does_not_fit_names_the_layer_and_both_shapes(layer: object, words: list[str]) -> None:
    _, add = declare("e")
    with pytest.raises(ShapeError) as caught:
        add(layer)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (nn.ReLU, ["pf.lazy(ReLU"]),
        (3, ["cannot be called"]),
        (nn.ReLU(inplace=True), ["in place", "inplace=False"]),
        (torch.unbind, ["must not depend on the batch"]),
        (in_set, ["gives set", "a set of tensors", "wrap it"]),
        (no_tensor, ["gives (None, {n: 3})", "no tensor"]),
        (from_outside, ["neither an input nor its own"]),
        (nn.Linear(8, 4, device="meta"), ["meta", "pf.lazy"]),
        (lazy(nn.Linear, 8), ["cannot be built", "out_features"]),
        (lazy(torch.zeros, 8), ["gave a"]),
    ],
)
def test_what_is_no_layer_is_refused_with_the_remedy(layer: object, words: list[str]) -> None:
    _, add = declare("e")
    with pytest.raises(GraphError) as caught:
        add(layer)
    for word in words:
        assert word in str(caught.value)


def test_names_and_inputs_are_checked_where_they_are_given() -> None:
    graph, add = declare("e")
    add(torch.relu)
    for taken in ("e", "x"):
        with pytest.raises(GraphError, match="must be unique"):
            graph.add(taken, torch.relu, "x")
    for shape in (4, "B", None):
        with pytest.raises(GraphError, match="give a tuple of sizes"):
            graph.input("odd", shape)  # type: ignore[arg-type]
    with pytest.raises(GraphError, match=r"LayerGraph\(3\): the name of a graph is text"):
        LayerGraph(3)  # type: ignore[arg-type]
    with pytest.raises(GraphError, match="cannot name"):
        graph.add("a b", torch.relu, "x")
    with pytest.raises(GraphError, match="'nowhere', which no input"):
        graph.add("f", torch.relu, "nowhere")
    with pytest.raises(GraphError, match="at least one input"):
        graph.add("f", torch.relu)
    with pytest.raises(GraphError, match="another graph"):
        graph.add("f", torch.relu, tiny().add("y", torch.relu, "x"))
    graph.add("two", torch.chunk, "x", chunks=2, dim=1)
    with pytest.raises(GraphError, match="two:0, two:1"):
        graph.add("f", torch.relu, "two")
    with pytest.raises(GraphError, match="not a constant"):
        graph.add("f", torch.add, "x", other=torch.ones(8))


@pytest.mark.parametrize("shape", [(8,), (), (8, "B"), ("B", "B"), ("2*B", 3), ("B", -1), ("B", 2.5)])
def test_an_input_without_its_batch_dimension_is_refused(shape: tuple[Any, ...]) -> None:
    with pytest.raises(GraphError):
        LayerGraph("g").input("x", shape)


def test_parameters_of_two_layers_may_not_have_one_name() -> None:
    graph, _ = declare("e")
    graph.add("a", nn.Sequential(nn.Linear(8, 8)), "x")
    with pytest.raises(GraphError, match=r"a\.0\.weight"):
        graph.add("a.0", nn.Linear(8, 8), "x")


def test_what_cannot_be_a_model_is_refused_by_check() -> None:
    empty = LayerGraph("empty")
    empty.input("x", ("B", 2))
    with pytest.raises(GraphError, match="no layers"):
        empty.check()
    graph, add = declare("e")
    add(nn.Linear(8, 6))
    with pytest.raises(GraphError, match="'other' is read by no layer"):
        graph.check()
    graph.loss("far", functional.mse_loss, "other", "other")
    with pytest.raises(GraphError, match="'far' is reached by no trainable parameter"):
        graph.check()


def test_losses_are_single_numbers_and_ends() -> None:
    graph, add = declare("e")
    add(nn.Linear(8, 6))
    with pytest.raises(ShapeError, match="one number"):
        graph.loss("l", torch.relu, "e")
    with pytest.raises(GraphError, match="finite"):
        graph.loss("l", functional.mse_loss, "e", "other", weight=float("nan"))
    with pytest.raises(GraphError, match="reduction"):
        graph.loss("l", functional.mse_loss, "e", "other", reduction="none")  # type: ignore[arg-type]
    with pytest.raises(GraphError, match='reduction="sum"'):
        graph.loss("l", nn.MSELoss(reduction="sum"), "e", "other")
    with pytest.raises(GraphError, match='reduction="mean"'):
        graph.loss("l", lazy(nn.MSELoss), "e", "other", reduction="sum")
    graph.loss("l", functional.mse_loss, "e", "other", reduction="sum")
    assert graph.layers["l"].kwargs["reduction"] == "sum"  # the function hears of it
    with pytest.raises(GraphError, match="losses are ends"):
        graph.add("f", torch.neg, "l")


def test_sizes_may_be_multiples_of_the_batch() -> None:
    _, add = declare("e")
    assert add(per_sample).spec.shape == ("4*B", 2)


def test_randomness_and_changed_buffers_are_found() -> None:
    graph, _ = declare("e")
    graph.add("dropout", nn.Dropout(0.5), "x")
    graph.add("none", nn.Dropout(0.0), "x")
    graph.add("norm", nn.BatchNorm1d(8), "x")
    graph.add("fixed", nn.BatchNorm1d(8, track_running_stats=False), "x")
    assert {n for n, layer in graph.layers.items() if layer.is_random} == {"dropout"}
    assert graph.layers["norm"].mutated_buffers == ("running_mean", "running_var", "num_batches_tracked")
    assert graph.layers["fixed"].mutated_buffers == ()
    assert list(graph.buffers) == ["norm.running_mean", "norm.running_var", "norm.num_batches_tracked"]


def test_describing_disturbs_neither_modules_nor_random_numbers() -> None:
    norm = nn.BatchNorm1d(8).eval()
    before = {k: v.clone() for k, v in norm.state_dict().items()}
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    graph, _ = declare("e")
    graph.add("norm", norm, "x")
    graph.add("dropout", lazy(nn.Dropout), "x")
    graph.add("linear", lazy(nn.Linear, 8, 8), "x")
    graph.build(seed=3)
    assert torch.equal(torch_state, torch.get_rng_state())
    assert python_state == random.getstate()
    assert not norm.training
    assert all(torch.equal(before[k], v) for k, v in norm.state_dict().items())


def test_shared_parameters_are_recognised_and_stay_shared_among_copies() -> None:
    graph, _ = declare("e")
    linear, relu, tied = nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)
    tied.weight = linear.weight
    h = graph.add("a", linear, "x")
    h = graph.add("r", relu, h)
    h = graph.add("b", nn.Sequential(linear, nn.Linear(8, 8)), h)
    h = graph.add("r2", relu, h)
    graph.add("c", tied, h)
    assert graph.shared_parameters == (("a.weight", "b.0.weight", "c.weight"), ("a.bias", "b.0.bias"))
    assert graph.colocated == (("a", "b", "c"),)
    assert list(graph.parameters) == ["a.weight", "a.bias", "b.1.weight", "b.1.bias", "c.bias"]
    built: dict[str, Any] = graph.build()
    assert built["a"] is built["b"][0]
    assert built["c"].weight is built["a"].weight
    assert built["a"] is not linear
    assert torch.equal(built["a"].weight, linear.weight)


def tied_pair() -> nn.Module:
    pair = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    pair[1].weight = pair[0].weight
    return pair


def test_a_recipe_given_twice_makes_two_modules_but_keeps_its_own_ties() -> None:
    graph, _ = declare("e")
    recipe = lazy(tied_pair)
    graph.add("a", recipe, "x")
    graph.add("b", recipe, "a")
    assert graph.shared_parameters == (("a.0.weight", "a.1.weight"), ("b.0.weight", "b.1.weight"))
    assert graph.colocated == ()


def test_weights_of_recipes_depend_on_seed_and_name_alone() -> None:
    graph = tiny()
    graph.add("twin", lazy(nn.Linear, 8, 16), "x")
    alone: Any = graph.build(["hidden"], seed=1)["hidden"]
    torch.manual_seed(123)
    together: Any = graph.build(seed=1)
    assert torch.equal(alone.weight, together["hidden"].weight)
    assert not torch.equal(together["hidden"].weight, together["twin"].weight)
    assert not torch.equal(alone.weight, graph.build(["hidden"], seed=2)["hidden"].weight)  # type: ignore[attr-defined]


def test_threads_build_the_same() -> None:
    graph = tiny()
    expected: Any = graph.build(seed=5)["hidden"]
    results: list[Any] = []
    threads = [threading.Thread(target=lambda: results.append(graph.build(seed=5)["hidden"])) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    assert all(torch.equal(module.weight, expected.weight) for module in results)


class NeedsNumbers(nn.Module):
    """Its constructor looks at data, so it cannot be built without."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(8))
        self.largest = float(self.scale.max())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale / self.largest


def test_a_recipe_that_needs_numbers_is_built_with_them() -> None:
    _, add = declare("e")
    assert add(lazy(NeedsNumbers)).spec == TensorSpec(("B", 8), requires_grad=True)


def test_gradient_flows_only_where_a_loss_needs_it() -> None:
    graph, _ = declare("e")
    graph.add("a", nn.Linear(8, 6), "x")
    graph.add("stopped", torch.detach, "a")
    graph.add("aside", nn.Linear(6, 6), "a")
    graph.add("head", nn.Linear(6, 6), "stopped")
    graph.loss("loss", functional.mse_loss, "head", "other")
    assert graph.differentiable == {"head", "loss"}
    assert [n for n, layer in graph.layers.items() if layer.has_backward] == ["head", "loss"]
    assert graph.outputs == ("aside", "head")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": None}, "lacks 'x'"),
        ({"more": torch.zeros(4)}, "'more', which is no input"),
        ({"x": torch.zeros(4, 9)}, r"float32 \(4, 9\); it must be float32 \(B, 8\)"),
        ({"x": torch.zeros(4, 8, 1)}, r"it must be float32 \(B, 8\)"),
        ({"x": torch.zeros(4, 8).double()}, r"float64 \(4, 8\)"),
        ({"x": torch.zeros(3, 8)}, "different numbers of samples"),
        ({"x": torch.zeros(0, 8), "label": torch.zeros(0, dtype=torch.int64)}, "no samples"),
        ({"x": [1.0]}, "must be a tensor"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(change: dict[str, Any], words: str) -> None:
    graph = tiny()
    batch: dict[str, Any] = {"x": torch.zeros(4, 8), "label": torch.zeros(4, dtype=torch.int64)}
    assert graph.check_batch(batch) == 4
    batch.update(change)
    with pytest.raises(BatchError, match=words):
        graph.check_batch({k: v for k, v in batch.items() if v is not None})


DIGEST = """
import torch
from torch import nn
from pipeflow.graphs import LayerGraph, lazy
graph = LayerGraph("g")
graph.input("x", ("B", 8))
graph.add("a", nn.Sequential(nn.Linear(8, 8), nn.ReLU()), "x")
scale = 3
graph.add("b", lambda x, k=2: x * k * scale, "a")
graph.add("c", lazy(nn.Linear, 8, 4), "b")
print(graph.digest)
"""


def test_digests_are_equal_in_every_process_and_tell_graphs_apart() -> None:
    here = io.StringIO()
    with contextlib.redirect_stdout(here):
        exec(DIGEST, {"__name__": "__main__"})
    there = subprocess.run([sys.executable, "-c", DIGEST], capture_output=True, text=True, check=True)
    assert here.getvalue() == there.stdout
    assert tiny().digest == tiny().digest
    changed = tiny()
    changed.add("more", torch.relu, "x")
    assert changed.digest != tiny().digest


def test_digests_do_not_depend_on_weights() -> None:
    def graph(linear: nn.Linear) -> LayerGraph:
        result, _ = declare("e")
        result.add("l", linear, "x")
        return result

    assert graph(nn.Linear(8, 8)).digest == graph(nn.Linear(8, 8)).digest
    assert graph(nn.Linear(8, 8)).digest != graph(nn.Linear(8, 8, bias=False)).digest


def test_lazy_takes_what_can_be_called() -> None:
    assert isinstance(lazy(nn.ReLU), Lazy)
    with pytest.raises(GraphError, match="give the class"):
        lazy(nn.ReLU())


def test_describing_loads_no_torch_before_the_first_layer() -> None:
    code = "import sys; from pipeflow.graphs import LayerGraph; LayerGraph().input('x', ('B', 2))"
    code += "; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
