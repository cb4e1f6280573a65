"""Lengths that differ between batches: how sizes follow them, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import pipeflow as pf
from pipeflow.errors import BatchError, GraphError, ShapeError
from pipeflow.graphs import TensorSpec
from pipeflow.graphs.sizes import Size, size_of


def mean_square(x: Tensor) -> Tensor:
    return x.square().mean()


def flatten(x: Tensor) -> Tensor:
    return x.flatten(0, 1)


def scores(x: Tensor) -> Tensor:
    return x @ x.transpose(1, 2)


def join(x: Tensor, y: Tensor) -> Tensor:
    return torch.cat([x, y], 1)


def pairs(x: Tensor) -> Tensor:
    return x.unsqueeze(1).expand(-1, x.shape[1], -1, -1).flatten(1, 2)


def with_start(x: Tensor) -> Tensor:
    return nn.functional.pad(x, (0, 0, 1, 0))


def halve(x: Tensor) -> Tensor:
    return x[:, ::2].contiguous()


def patches(x: Tensor) -> Tensor:
    return x.view(x.shape[0], x.shape[1] // 16, 16 * x.shape[2])


def sequences(*lengths: str | pf.Length) -> tuple[pf.LayerGraph, list[Any]]:
    graph = pf.LayerGraph("sequences")
    return graph, [graph.input(f"x{i}", ("B", length, 4)) for i, length in enumerate(lengths)]


@pytest.mark.parametrize(
    ("function", "lengths", "shape"),
    [
        (torch.tanh, ["time"], ("B", "time", 4)),
        (flatten, ["time"], ("B*time", 4)),
        (scores, ["time"], ("B", "time", "time")),
        (join, ["time", "time"], ("B", "2*time", 4)),
        (join, ["source", "target"], ("B", "source+target", 4)),
        (with_start, ["time"], ("B", "time+1", 4)),
        (halve, ["time"], ("B", "<layer.1>", 4)),
        (pairs, ["time"], ("B", "<layer.1>", 4)),
        (patches, [pf.Length("time", low=16, multiple_of=16)], ("B", "<layer.1>", 64)),
    ],
)
def test_sizes_follow_lengths(function: Any, lengths: list[str], shape: tuple[object, ...]) -> None:
    graph, inputs = sequences(*lengths)
    assert graph.add("layer", function, *inputs).spec.shape == shape
    given = {name: 48 + 16 * i for i, name in enumerate(graph.lengths)}
    sizes = graph.sizes_at(given)
    real = function(*(torch.zeros(h.spec.shape_at(3, given)) for h in inputs))
    assert tuple(real.shape) == graph.specs["layer"].shape_at(3, sizes)


@pytest.mark.parametrize("time", [9, 10, 31, 64])
def test_what_layers_make_of_a_length_is_found_through_any_number_of_them(time: int) -> None:
    """Strided convolutions, one upon the other: 31 steps become 16, then 6; the branches agree."""
    graph = pf.LayerGraph("audio")
    x = graph.input("x", ("B", 3, pf.Length("time", low=5)))
    first = graph.add("first", pf.lazy(nn.Conv1d, 3, 4, 3, stride=2, padding=1), x)
    second = graph.add("second", pf.lazy(nn.Conv1d, 4, 4, 3, stride=3, padding=1), first)
    other = graph.add("other", pf.lazy(nn.Conv1d, 4, 4, 3, stride=3, padding=1), first)
    both = graph.add("both", torch.add, second, other)
    flat = graph.add("flat", flatten, graph.add("turn", torch.transpose, both, dim0=1, dim1=2))
    assert (first.spec.shape, both.spec.shape) == (("B", 4, "<first.2>"), ("B", 4, "<second.2>"))
    assert flat.spec.shape == ("B*<second.2>", 4)
    modules = graph.build()
    value = torch.zeros(2, 3, time)
    for name in ("first", "second"):
        value = modules[name](value)
        assert tuple(value.shape) == graph.specs[name].shape_at(2, graph.sizes_at({"time": time}))


@given(
    st.booleans(),
    st.dictionaries(st.sampled_from(["time", "src", "<conv:0.1>"]), st.integers(-3, 9).filter(bool), max_size=2),
    st.integers(0, 9),
)
def test_sizes_read_back_what_they_write(batch: bool, terms: dict[str, int], constant: int) -> None:
    size = Size(batch, tuple(sorted(terms.items())), constant or (1 if batch else 0))
    assert size_of(size.dim) == size


def test_a_spec_with_lengths_needs_their_numbers() -> None:
    spec = TensorSpec(("B*(time+1)", "time", 3))
    assert spec.lengths == {"time"}
    assert spec.scales
    assert spec.bytes_at(2, {"time": 4}) == 2 * 5 * 4 * 3 * 4
    with pytest.raises(GraphError, match="depends on the length 'time', which is not given"):
        spec.shape_at(2)
    with pytest.raises(GraphError, match="numel_at"):
        _ = TensorSpec(("time",)).numel


def grow_oddly(x: Tensor) -> Tensor:
    return x.new_zeros(x.shape[0] + x.shape[1], 4)


def change_rank(x: Tensor) -> Tensor:
    return x if x.shape[1] < 10 else x[0]


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (grow_oddly, ["multiple of the batch"]),
        (change_rank, ["rank and dtype must not depend", "time=10"]),
        (nn.Linear(5, 4), ["tried with B=3, time=7"]),
    ],
)
def test_what_no_length_can_be_worked_out_for_is_refused(function: Any, words: list[str]) -> None:
    graph, [x] = sequences("time")
    with pytest.raises(ShapeError) as caught:
        graph.add("layer", function, x)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: pf.Length("B"), "cannot name a length"),
        (lambda: pf.Length("time", low=0), "at least 1"),
        (lambda: pf.Length("time", low=3, high=3), "given as a number"),
        (lambda: pf.LayerGraph().input("x", ("B", "time+1")), "names of lengths"),
        (lambda: pf.LayerGraph().input("x", (3, 4)), 'the first size must be "B"'),
        (lambda: sequences(pf.Length("time", 2), pf.Length("time", 3)), "say it once"),
    ],
)
def test_what_is_no_length_is_refused(make: Any, words: str) -> None:
    with pytest.raises(GraphError, match=words):
        make()


def test_a_graph_without_samples_is_refused() -> None:
    graph = pf.LayerGraph()
    graph.loss("loss", mean_square, graph.add("layer", nn.Linear(4, 4), graph.input("x", ("nodes", 4))))
    with pytest.raises(GraphError, match="has the batch as its first size"):
        graph.check()


def test_limits_and_equal_lengths_are_held() -> None:
    graph, (x, y) = sequences(pf.Length("time", low=2, high=8, multiple_of=2), "time")
    graph.add("layer", torch.add, x, y)
    assert graph.check_batch({"x0": torch.zeros(3, 4, 4), "x1": torch.zeros(3, 4, 4)}) == 3
    for time in (1, 3, 10):
        with pytest.raises(BatchError, match=f"the length 'time' is {time} in the batch; the graph says 2 to 8"):
            graph.check_batch({"x0": torch.zeros(3, time, 4), "x1": torch.zeros(3, time, 4)})
    with pytest.raises(BatchError, match="different lengths 'time': 'x0' has 4, 'x1' has 6"):
        graph.check_batch({"x0": torch.zeros(3, 4, 4), "x1": torch.zeros(3, 6, 4)})


def test_files_keep_lengths_and_their_limits(tmp_path: Path) -> None:
    graph = pf.LayerGraph("tokens")
    tokens = graph.input("tokens", ("B", pf.Length("time", low=2, high=64)), dtype="int64")
    embedded = graph.add("embed", pf.lazy(nn.Embedding, 10, 4), tokens)
    turned = graph.add("turn", torch.transpose, embedded, dim0=1, dim1=2)
    graph.add("conv", pf.lazy(nn.Conv1d, 4, 4, 2, stride=2), turned)
    graph.save(tmp_path / "graph.json")
    again = pf.LayerGraph.load(tmp_path / "graph.json")
    assert again.specs == graph.specs
    assert again.lengths == graph.lengths
    assert again.digest == graph.digest
    assert again.sizes_at({"time": 9}) == {"time": 9, "<conv.2>": 4}


def test_costs_are_measured_at_the_lengths_of_the_batch() -> None:
    graph, [x] = sequences("time")
    graph.loss("loss", mean_square, graph.add("layer", nn.Linear(4, 8), x))
    costs = pf.profile(graph, {"x0": torch.zeros(4, 6, 4)}, num_repeats=1)
    assert costs.tensor_by_name["layer"].bytes == 4 * 6 * 8 * 4
