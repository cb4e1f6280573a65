"""Layers whose arguments and results are structures: what they look like from outside, and in files."""

from __future__ import annotations

import json
import operator
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import pipeflow as pf
from pipeflow.errors import FormatError, GraphError
from pipeflow.graphs.calling import flat_call
from pipeflow.graphs.layer import Handle

B = 4


class State(NamedTuple):
    hidden: Any
    cell: Any


@dataclass
class Boxed:
    inner: Any


def graph_of(*inputs: str) -> tuple[pf.LayerGraph, list[Handle]]:
    graph = pf.LayerGraph("g")
    return graph, [graph.input(name, ("B", 6)) for name in inputs]


def call(graph: pf.LayerGraph, name: str, *tensors: Tensor) -> Any:
    return flat_call(graph.layers[name], graph.build([name])[name])(*tensors)


def weigh(parts: Any, scale: float = 1.0, *, extra: Any = None, options: dict[str, Any] | None = None) -> Tensor:
    """Tells the places in which tensors stand apart: each counts another weight."""
    left, (middle, right) = parts["left"], parts["rest"]
    result: Tensor = scale * left + 2 * middle + 4 * right
    if extra is not None:
        result = result + 8 * extra.hidden + 16 * extra.cell[0]
    factor: int = (options or {}).get("factor", 1)
    return result * factor


def test_tensors_may_stand_anywhere_in_the_arguments() -> None:
    graph, (x, y) = graph_of("x", "y")
    extra = State(x, [y, None])
    out = graph.add("w", weigh, {"left": x, "rest": [y, x]}, 0.5, extra=extra, options={"factor": 3, "name": "x"})
    assert out.name == "w"
    layer = graph.layers["w"]
    assert layer.inputs == ("x", "y", "x", "x", "y")
    assert layer.kwargs == {}
    a, b = torch.randn(B, 6), torch.randn(B, 6)
    expected = weigh({"left": a, "rest": [b, a]}, 0.5, extra=State(a, [b]), options={"factor": 3})
    assert torch.equal(call(graph, "w", a, b, a, a, b), expected)
    assert set(graph.nx.edges) == {("x", "w"), ("y", "w")}
    assert graph.layers["w"].outputs == ("w",)


def test_a_call_of_tensors_and_constant_keywords_stays_plain() -> None:
    graph, (x, y) = graph_of("x", "y")
    graph.add("sum", torch.add, x, y, alpha=2)
    graph.add("padded", nn.functional.pad, x, pad=(1, 1))
    graph.add("halves", torch.chunk, x, chunks=2, dim=1)
    graph.add("largest", torch.max, x, dim=1)
    for layer in graph.layers.values():
        assert layer.arguments is None
        assert layer.results is None
    assert graph.layers["padded"].kwargs == {"pad": (1, 1)}
    assert graph.layers["largest"].outputs == ("largest:0", "largest:1")
    assert graph.specs["largest:1"].dtype == "int64"


def states(x: Tensor) -> dict[str, Any]:
    return {"hidden": x + 1, "states": [State(x * 2, None), (x * 3,)], "n": 3, "mask": x > 0}


def test_what_a_layer_gives_comes_back_as_it_is_with_handles_for_tensors() -> None:
    graph, (x,) = graph_of("x")
    out = graph.add("s", states, x)
    assert out["n"] == 3
    first, second = out["states"]
    assert isinstance(first, State)
    assert first.cell is None
    assert isinstance(second, tuple)
    assert (out["hidden"].name, first.hidden.name, second[0].name, out["mask"].name) == (
        "s:hidden",
        "s:states.0.hidden",
        "s:states.1.0",
        "s:mask",
    )
    assert out["mask"].spec.dtype == "bool"
    assert graph.layers["s"].outputs == ("s:hidden", "s:states.0.hidden", "s:states.1.0", "s:mask")
    value = torch.randn(B, 6)
    assert torch.equal(torch.stack(call(graph, "s", value)[:3]), torch.stack([value + 1, value * 2, value * 3]))


def test_an_lstm_gives_its_state_and_takes_it() -> None:
    graph = pf.LayerGraph("recurrent")
    x = graph.input("x", ("B", 5, 6))
    out, (h, c) = graph.add("first", nn.LSTM(6, 6, batch_first=True), x)
    # The state's batch is its second dimension; it travels all the same.
    assert [t.spec.shape for t in (out, h, c)] == [("B", 5, 6), (1, "B", 6), (1, "B", 6)]
    again, _ = graph.add("second", nn.LSTM(6, 6, batch_first=True), out, (h, c))
    assert graph.layers["second"].inputs == ("first:0", "first:1.0", "first:1.1")
    assert again.spec.requires_grad


def test_none_is_passed_on_as_none() -> None:
    graph = pf.LayerGraph("attention")
    x = graph.input("x", ("B", 5, 8))
    out, weights = graph.add(
        "attention", nn.MultiheadAttention(8, 2, batch_first=True), x, x, value=x, attn_mask=None, need_weights=False
    )
    assert weights is None
    assert out.name == "attention:0"
    assert graph.layers["attention"].inputs == ("x", "x", "x")
    block = pf.lazy(nn.TransformerEncoderLayer, 8, 2, batch_first=True)
    assert graph.add("block", block, out, src_mask=weights).name == "block"


def test_slices_and_text_are_constants() -> None:
    graph, (x, y) = graph_of("x", "y")
    assert graph.add("crop", operator.getitem, x, (..., slice(1, 4))).spec.shape == ("B", 3)
    assert graph.add("outer", torch.einsum, pf.Constant("bi,bj->bij"), x, y).spec.shape == ("B", 6, 6)
    assert graph.add("stack", torch.stack, [x, y], dim=1).spec.shape == ("B", 2, 6)
    with pytest.raises(GraphError, match=r"'bi,bj->bij'.*pf\.Constant"):
        graph.add("wrong", torch.einsum, "bi,bj->bij", x, y)


def test_a_structure_does_not_change_with_what_was_given() -> None:
    graph, (x,) = graph_of("x")
    parts: dict[str, Any] = {"left": x, "rest": [x, x]}
    sizes = [2, 4]
    graph.add("w", weigh, parts)
    graph.add("cut", torch.split, x, split_size_or_sections=sizes, dim=1)
    parts["left"] = None
    sizes.append(1)
    digest = graph.digest
    assert call(graph, "w", *[torch.ones(B, 6)] * 3).shape == (B, 6)
    assert graph.layers["cut"].kwargs["split_size_or_sections"] == [2, 4]
    parts.clear()
    assert graph.digest == digest


@pytest.mark.parametrize(
    "declare",
    [
        lambda g, x: g.add("w", weigh, {"left": x, "rest": (x, x)}),
        lambda g, x: g.add("w", weigh, {"left": x, "rest": [x, x]}),
        lambda g, x: g.add("w", weigh, {"rest": [x, x], "left": x}),
        lambda g, x: g.add("w", weigh, {"left": x, "rest": [x, x]}, 2.0),
        lambda g, x: g.add("w", weigh, parts={"left": x, "rest": [x, x]}),
        lambda g, x: g.add("w", weigh, {"left": x, "rest": [x, x]}, extra=State(x, [x])),
    ],
)
def test_digests_and_files_keep_every_place_apart(
    declare: Callable[[pf.LayerGraph, Handle], Any], tmp_path: Path
) -> None:
    graph, (x,) = graph_of("x")
    declare(graph, x)
    other, (x,) = graph_of("x")
    other.add("w", weigh, {"left": x, "rest": [x, x]}, 0.0)
    assert graph.digest != other.digest
    if any(isinstance(value, tuple) and hasattr(value, "_fields") for value in _constants(graph)):
        with pytest.raises(GraphError, match="is a State, which JSON cannot hold"):
            graph.save(tmp_path / "g.json")
        return
    graph.save(tmp_path / "g.json")
    again = pf.LayerGraph.load(tmp_path / "g.json", allow=("tests.graphs.test_structures",))
    assert again.digest == graph.digest
    values = [torch.randn(B, 6) for _ in graph.layers["w"].inputs]
    assert torch.equal(call(again, "w", *values), call(graph, "w", *values))


def _constants(graph: pf.LayerGraph) -> list[Any]:
    from pipeflow.graphs.nesting import rebuild

    layer = graph.layers["w"]
    assert layer.arguments is not None
    args, kwargs = rebuild(layer.arguments, layer.inputs)
    return [*args, *kwargs.values()]


def test_files_hold_slices_text_and_results_of_any_form(tmp_path: Path) -> None:
    graph, (x, y) = graph_of("x", "y")
    outer = graph.add("outer", torch.einsum, pf.Constant("bi,bj->bij"), x, y)
    graph.add("crop", crop, outer, where=(..., slice(1, None, 2)))
    graph.add("s", states, x)
    graph.save(tmp_path / "g.json")
    again = pf.LayerGraph.load(tmp_path / "g.json", allow=("tests.graphs.test_structures",))
    assert again.digest == graph.digest
    assert dict(again.specs) == dict(graph.specs)


def test_a_loss_may_take_its_tensors_by_keyword(tmp_path: Path) -> None:
    graph, (x,) = graph_of("x")
    label = graph.input("label", ("B",), "int64")
    logits = graph.add("logits", pf.lazy(nn.Linear, 6, 3), x)
    graph.loss("loss", nn.functional.cross_entropy, target=label, input=logits, label_smoothing=0.1, weight=0.5)
    graph.save(tmp_path / "g.json")
    again = pf.LayerGraph.load(tmp_path / "g.json")
    assert again.digest == graph.digest
    assert (again.layers["loss"].inputs, again.layers["loss"].weight) == (("label", "logits"), 0.5)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("args", [{"tensor": "hidden"}], r"its arguments read \['hidden'\], its inputs are \['hidden', 'x'\]"),
        ("args", [{"function": "os.system"}], "'os.system' may not be used by a file"),
        ("args", [[{"tensor": "hidden"}, {"tensor": "nowhere"}]], "its arguments read"),
        ("source", {"lazy": "torch.nn.Linear", "args": [6, {"tensor": "x"}], "kwargs": {}}, "is no constant"),
    ],
)
def test_a_file_whose_templates_were_tampered_with_is_refused(key: str, value: Any, words: str, tmp_path: Path) -> None:
    """A template is data: it can name tensors that the layer is said to read, and nothing else of the graph."""
    graph, (x,) = graph_of("x")
    hidden = graph.add("hidden", torch.relu, x)
    graph.add("w", torch.stack, [hidden, x], dim=1)
    graph.save(tmp_path / "g.json")
    file = json.loads((tmp_path / "g.json").read_text())
    file["layers"][1][key] = value
    (tmp_path / "g.json").write_text(json.dumps(file))
    with pytest.raises(FormatError, match=words):
        pf.LayerGraph.load(tmp_path / "g.json")


def crop(x: Tensor, where: Any) -> Tensor:
    return x[where]


# -- refused ---------------------------------------------------------------------------------


class Mapped(nn.Module):
    """Has no tensors of its own; what it gives is decided by a function."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda _, x: {"a b": x}, ["the key 'a b'", "letters, digits"]),
        (lambda _, x: {"1": x, 1: x + 1}, ["two tensors", "'e:1'"]),
        (lambda _, x: Boxed(x), ["a Boxed of tensors", "wrap it"]),
        (lambda _, x: (x, object()), ["(Tensor, object)", "a object"]),
        (lambda _, x: (x, x.shape[0]), ["(Tensor, 3) for B=3", "(Tensor, 5)", "must not depend"]),
        (lambda _, x: [x] * x.shape[0], ["[Tensor, Tensor, Tensor]", "must not depend"]),
        (lambda _, x: {"y": x} if x.shape[0] == 3 else x, ["{y: Tensor}", "must not depend"]),
        (lambda m, x: (x, x + 1) if m.training else x, ["in training", "in evaluation", "Tensor"]),
        (lambda m, x: x if m.training else x[:, :2], ["in training", "in evaluation", "(3, 6)", "(3, 2)"]),
    ],
)
def test_results_that_cannot_be_known_are_refused(function: Callable[..., Any], words: list[str]) -> None:
    graph, (x,) = graph_of("x")
    with pytest.raises(GraphError) as caught:
        graph.add("e", Mapped(function), x)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "argument",
    [
        torch.ones(6),
        [torch.ones(6)],
        {"a": (1, nn.Parameter(torch.ones(6)))},
        nn.Linear(6, 6),
        OrderedDict(a=torch.ones(6)),
    ],
)
def test_a_tensor_of_no_graph_is_refused_with_the_remedy(argument: object) -> None:
    graph, (x,) = graph_of("x")
    with pytest.raises(GraphError, match="other.* not a constant.*register_buffer"):
        graph.add("e", weigh, x, other=argument)


@pytest.mark.parametrize("wrap", [Boxed, lambda x: {x}, lambda x: OrderedDict(a=x)])
def test_handles_in_what_cannot_be_rebuilt_are_refused(wrap: Callable[[Handle], Any]) -> None:
    graph, (x,) = graph_of("x")
    with pytest.raises(GraphError, match="cannot be rebuilt for each call"):
        graph.add("e", weigh, x, extra=wrap(x))


def test_a_result_of_another_form_while_running_is_an_error() -> None:
    graph, (x,) = graph_of("x")
    module = Mapped(lambda m, x: {"y": x, "n": 1 if type(x) is not Tensor else 2})
    graph.add("e", module, x)
    with pytest.raises(ValueError, match=r"gave \{y: Tensor, n: 2\}, but \{y: Tensor, n: 1\} while the graph"):
        call(graph, "e", torch.ones(B, 6))


def test_a_layer_with_structures_is_profiled_as_it_is_called() -> None:
    graph, (x,) = graph_of("x")
    hidden = graph.add("hidden", pf.lazy(nn.Linear, 6, 6), x)
    out = graph.add("s", states, hidden)
    mixed = graph.add("w", weigh, {"left": out["hidden"], "rest": [x, out["states"][0].hidden]}, 0.5)
    graph.loss("loss", torch.mean, mixed)
    costs = pf.profile(graph, {"x": torch.randn(8, 6)}, num_repeats=1, warmup=0)
    layer = costs.layer_by_name["s"]
    assert [t.name for t in layer.outputs] == list(graph.layers["s"].outputs)
    assert [t.gradient_bytes for t in layer.outputs] == [8 * 6 * 4, 8 * 6 * 4, 0, 0]
    assert costs.layer_by_name["w"].inputs == ("s:hidden", "x", "s:states.0.hidden")
    assert layer.forward_seconds > 0
    assert layer.backward_input_seconds > 0
