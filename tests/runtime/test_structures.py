"""Models whose layers pass structures: nested states, None, keywords, trees; in every layout as on one device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import pipeflow as pf
from pipeflow.errors import LayerFailure
from pipeflow.testing import check_layout_invariance, run_ranks
from pipeflow.testing.graphs import sample_batch
from tests.runtime.models import make_plan, sgd
from tests.runtime.test_known_cases import WIDTH, finish, linear, stages_of, start

DOUBLE = torch.float64


def last_position(x: Tensor) -> Tensor:
    return x[:, -1]


def recurrent_layers_pass_their_state() -> pf.LayerGraph:
    """An LSTM gives (out, (h, c)); the next one starts from that state, a third from another mix of it."""
    graph = pf.LayerGraph("recurrent")
    x = graph.input("x", ("B", 3, WIDTH), dtype="float64")
    lstm = pf.lazy(nn.LSTM, WIDTH, WIDTH, batch_first=True, dtype=DOUBLE)
    out, state = graph.add("one", lstm, x)
    out, (h, _) = graph.add("two", lstm, out, state)
    out, _ = graph.add("three", lstm, out, (h, state[1]))
    return finish(graph, graph.add("last", last_position, out))


def attention_without_a_mask() -> pf.LayerGraph:
    """None goes in, by position and by keyword, and comes out where the weights would be."""
    graph = pf.LayerGraph("attention")
    x = graph.input("x", ("B", 4, WIDTH), dtype="float64")
    attention = pf.lazy(nn.MultiheadAttention, WIDTH, 2, batch_first=True, dtype=DOUBLE)
    key = graph.add("key", linear(), x)
    mixed, weights = graph.add("attention", attention, x, key=key, value=x, attn_mask=None, need_weights=False)
    again, weights = graph.add("again", attention, mixed, key, x, weights, need_weights=True)
    pooled = graph.add("pooled", torch.matmul, weights, again)
    return finish(graph, graph.add("last", last_position, pooled))


class Node(NamedTuple):
    """What a tree's node passes to its parent."""

    hidden: Any
    cell: Any


class TreeCell(nn.Module):
    """A tree LSTM's cell: leaves have a word and no children, inner nodes have children and no word."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gates = nn.Linear(3 * width, 5 * width, dtype=DOUBLE)

    def forward(self, word: Tensor | None, children: list[Node] | None = None) -> Node:
        if word is not None:
            left = right = Node(torch.zeros_like(word), torch.zeros_like(word))
        else:
            assert children is not None
            left, right = children
            word = torch.zeros_like(left.hidden)
        gates = self.gates(torch.cat([word, left.hidden, right.hidden], dim=1)).chunk(5, dim=1)
        update, output, forget_left, forget_right = (torch.sigmoid(g) for g in gates[:4])
        cell = update * torch.tanh(gates[4]) + forget_left * left.cell + forget_right * right.cell
        return Node(output * torch.tanh(cell), cell)


def recursive_net_over_a_tree() -> pf.LayerGraph:
    """((w0 w1) (w2 w3)): seven cells, words that enter at different stages, a named tuple on each edge."""
    graph = pf.LayerGraph("tree")
    words = [graph.input(f"w{i}", ("B", WIDTH), dtype="float64") for i in range(4)]
    cell = pf.lazy(TreeCell, WIDTH)
    leaves = [graph.add(f"leaf{i}", cell, word) for i, word in enumerate(words)]
    left = graph.add("left", cell, None, [leaves[0], leaves[1]])
    right = graph.add("right", cell, None, children=leaves[2:])
    root = graph.add("root", cell, None, [left, right])
    assert graph.layers["root"].outputs == ("root:hidden", "root:cell")
    return finish(graph, root.hidden)


class Router(nn.Module):
    """A dict of tensors of several dtypes, with constants and what autograd does not record."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(WIDTH, 2, dtype=DOUBLE)

    def forward(self, x: Tensor) -> dict[str, Any]:
        score = self.score(x)
        return {
            "choice": {"index": score.argmax(1), "confident": score.amax(1) > 0},
            "parts": [x * score[:, :1], (x * score[:, 1:], None)],
            "num_experts": 2,
        }


def combine(parts: list[Any], *, choice: dict[str, Tensor], num_experts: int) -> Tensor:
    first, (second, nothing) = parts
    assert nothing is None
    assert num_experts == 2
    pick = (choice["index"] == 0) | choice["confident"]
    return torch.where(pick.unsqueeze(1), first, second)


def a_dict_of_everything() -> pf.LayerGraph:
    graph, h = start("router")
    out = graph.add("route", Router(), h)
    expert = graph.add("expert", linear(), out["parts"][0])
    parts = [expert, out["parts"][1]]
    return finish(graph, graph.add("combine", combine, parts, choice=out["choice"], num_experts=out["num_experts"]))


def one_tensor_in_two_places(x: Tensor) -> tuple[Tensor, list[Tensor]]:
    doubled = x * 2
    return x, [doubled, doubled]


def an_output_that_is_given_twice() -> pf.LayerGraph:
    """What goes in also comes out, and one new tensor comes out twice, each read in two places."""
    graph, h = start("twice")
    same, (first, other) = graph.add("give", one_tensor_in_two_places, h)
    value = h
    for i, part in enumerate([other, first, same, other, first, same]):
        value = graph.add(f"join{i}", torch.addcmul, graph.add(f"block{i}", linear(), value), part, part, value=0.1)
    return finish(graph, value)


def keyword_tensors_from_several_stages() -> pf.LayerGraph:
    """Inputs and activations by keyword and in a list, one of them twice, a constant text among them."""
    graph, h = start("keywords")
    y = graph.input("y", ("B", WIDTH), dtype="float64")
    second = graph.add("second", linear(), y)
    outer = graph.add("outer", torch.einsum, pf.Constant("bi,bj->bij"), h, second)
    stacked = graph.add("stacked", torch.stack, [h, second, h], dim=1)
    mixed = graph.add("mixed", torch.bmm, stacked, mat2=outer)
    return finish(graph, graph.add("last", last_position, mixed))


CASES: list[Callable[[], pf.LayerGraph]] = [
    recurrent_layers_pass_their_state,
    attention_without_a_mask,
    recursive_net_over_a_tree,
    a_dict_of_everything,
    an_output_that_is_given_twice,
    keyword_tensors_from_several_stages,
]


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_trains_as_on_one_device(case: Callable[[], pf.LayerGraph], schedule: str) -> None:
    graph = case()
    stages = stages_of(graph)
    single = [(layers, (i % 3,)) for i, layers in enumerate(stages)]
    replicas = [(layers, (0, 1, 2)[: 1 + i % 3]) for i, layers in enumerate(stages)]
    for layout in (single, replicas):
        plan = make_plan(graph, layout, num_microbatches=4, schedule=schedule)
        for sizes in ((10, 3), (8, 4)):
            # Large steps, so that a gradient that differs in its last bit shows.
            batches = [sample_batch(graph, n, seed=n) for n in sizes]
            check_layout_invariance(graph, plan, batches, optimizer=large_steps)


def large_steps(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.5)


def over_gloo(rank: int) -> None:
    for case in CASES:
        graph = case()
        layout = [(layers, (0, 1, 2)[: 1 + i % 3] if i % 2 else (i % 3,)) for i, layers in enumerate(stages_of(graph))]
        plan = make_plan(graph, layout, num_microbatches=4)
        assert plan.num_ranks == 3
        check_layout_invariance(graph, plan, [sample_batch(graph, n, seed=n) for n in (10, 3)])


def test_trains_as_on_one_device_over_processes() -> None:
    for result in run_ranks(over_gloo, 3):
        assert result.error is None, result.trace


def test_is_what_plain_torch_does() -> None:
    """The reference calls layers through the same templates as the engine: here is a model without any."""
    graph = recursive_net_over_a_tree()
    cells: Any = graph.build(seed=0)
    batch = sample_batch(graph, 4)
    leaves = [cells[f"leaf{i}"](batch[f"w{i}"]) for i in range(4)]
    root = cells["root"](None, [cells["left"](None, leaves[:2]), cells["right"](None, children=leaves[2:])])
    loss = nn.functional.mse_loss(cells["head"](root.hidden), batch["target"])
    reference = pf.Reference(graph, sgd, seed=0)
    assert reference.step(batch).losses["loss"] == loss.item()
    torch.autograd.backward(loss)
    before = cells["leaf2"].gates.weight
    after = reference.state_dict()["leaf2.gates.weight"]
    assert torch.equal(after, before - 0.05 * before.grad)


class Changing(nn.Module):
    """Gives something else from its third call on, which nothing could have seen before."""

    def __init__(self, before: Callable[[Tensor], Any], after: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.before, self.after = before, after
        self.num_calls = -1

    def forward(self, x: Tensor) -> Any:
        if type(x) is Tensor:  # not while the graph is described
            self.num_calls += 1
        return self.before(x) if self.num_calls < 2 else self.after(x)


def one(x: Tensor) -> Tensor:
    return x


def as_dict(x: Tensor) -> dict[str, Tensor]:
    return {"y": x}


def as_larger_dict(x: Tensor) -> dict[str, Tensor]:
    return {"y": x, "more": x}


def as_pair(x: Tensor) -> tuple[Tensor, Tensor]:
    return x, x


@pytest.mark.parametrize("cut", [2, 1])
@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (as_dict, as_larger_dict, "gave {y: Tensor, more: Tensor}, but {y: Tensor} while the graph"),
        (as_dict, one, "gave Tensor, but {y: Tensor} while the graph"),
        (as_pair, one, "gave Tensor, but 2 tensors while the graph"),  # of two samples, that is of length 2
        (one, as_pair, "'changing' gave a tuple, but a tensor while the graph"),
    ],
)
def test_a_structure_that_changes_while_running_is_a_named_error(
    before: Callable[[Tensor], Any], after: Callable[[Tensor], Any], words: str, cut: int
) -> None:
    graph, h = start("changing")
    graph.add("changing", Changing(before, after), h)
    graph = finish(graph, graph.layers["changing"].outputs[0])
    names = list(graph.layers)
    plan = make_plan(graph, [(names[:cut], (0,)), (names[cut:], (1,))], num_microbatches=4)
    with pf.Engine(graph, plan, sgd) as engine, pytest.raises(LayerFailure) as caught:
        engine.step(sample_batch(graph, 8))
    assert (caught.value.layer, caught.value.microbatch) == ("changing", 2)
    assert words in str(caught.value)
