"""Layers that do more than give their outputs: what is refused, by name, and what is fine."""

from __future__ import annotations

import itertools
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pipeflow as pf
from pipeflow.errors import BatchError, GraphError
from tests.runtime.models import make_plan, sgd


class Around(nn.Module):
    """A linear layer and what a function makes of it."""

    def __init__(self, function: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def declare(layer: object) -> pf.LayerGraph:
    graph = pf.LayerGraph("g")
    hidden = graph.add("hidden", pf.lazy(nn.Linear, 8, 8), graph.input("x", ("B", 8)))
    graph.add("e", layer, hidden)
    return graph


def refuse(layer: object, words: str) -> None:
    with pytest.raises(GraphError, match=words) as caught:
        declare(layer)
    assert "'e'" in str(caught.value)


# -- in place --------------------------------------------------------------------------------


def past_autograd(x: Tensor) -> Tensor:
    x.data.add_(1)
    return x * 1


def past_a_view(x: Tensor) -> Tensor:
    x[:, 0].detach().zero_()
    return x * 1


def in_a_structure(parts: dict[str, list[Tensor]]) -> Tensor:
    return parts["a"][1].mul_(2)


def its_own(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 0].mul_(2)
    return y


@pytest.mark.parametrize("layer", [nn.ReLU(inplace=True), past_autograd, past_a_view])
def test_an_input_changed_in_place_is_seen_whatever_the_way(layer: object) -> None:
    refuse(layer, "changes its input 0 in place.*inplace=False")
    declare(its_own)


def test_an_input_changed_inside_a_structure_or_in_evaluation_is_seen() -> None:
    graph = declare(torch.relu)
    both = [graph.add("one", torch.tanh, "e"), graph.add("two", torch.tanh, "e")]
    with pytest.raises(GraphError, match="'f'.*changes its input 1 in place"):
        graph.add("f", in_a_structure, {"a": both})
    refuse(Around(lambda m, x: m.linear(x) if m.training else m.linear(x.relu_())), "changes its input 0 in place")


def clamped(module: Any, x: Tensor) -> Any:
    module.linear.weight.data.clamp_(-0.1, 0.1)
    return module.linear(x)


def test_weights_changed_in_forward_are_refused() -> None:
    refuse(Around(clamped), r"changes its parameter 'linear\.weight' in forward")
    declare(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)))  # a new weight each time


# -- state -----------------------------------------------------------------------------------


def remembering(module: Any, x: Tensor) -> Any:
    state = getattr(module, "state", None)
    module.state = x.mean(0).detach()
    return module.linear(x if state is None else x + state)


def listing(module: Any, x: Tensor) -> Any:
    module.auxiliary = {"losses": [module.linear(x).square().mean()]}
    return module.linear(x)


def noting(module: Any, x: Tensor) -> Any:
    module.seen = module.linear(x)
    return module.seen * 2


def caching(module: Any, x: Tensor) -> Any:
    if getattr(module, "table", None) is None:
        module.table = torch.arange(8) / 8
    return module.linear(x) + module.table


def test_what_one_call_leaves_for_the_next_is_refused() -> None:
    refuse(Around(remembering), "reads what an earlier call left in its attribute 'state'")


def test_a_loss_that_nobody_can_read_is_refused() -> None:
    refuse(Around(listing), "keeps a tensor with a gradient in its attribute 'auxiliary'.*return it as an output")


@pytest.mark.parametrize("function", [noting, caching])
def test_notes_and_tables_are_fine(function: Callable[..., Any]) -> None:
    """What is overwritten in each call, or the same in each, makes no call depend on another."""
    declare(Around(function))


class CountsInEvaluation(nn.Module):
    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            self.seen += 1
        return x + self.seen


def test_buffers_that_change_in_evaluation_alone_are_seen() -> None:
    layer = declare(CountsInEvaluation()).layers["e"]
    assert layer.mutated_buffers == ("seen",)
    assert not layer.is_replicable


# -- numbers and generators ------------------------------------------------------------------


def attribute(module: Any, x: Tensor) -> Any:
    module.calls = getattr(module, "calls", 0) + 1
    return module.linear(x) * module.calls


def table(module: Any, x: Tensor) -> Any:
    module.seen = getattr(module, "seen", {"rows": [0]})
    module.seen["rows"][0] += 1
    return module.linear(x) * module.seen["rows"][0]


class Own:
    """An object of somebody's own."""

    def __init__(self) -> None:
        self.calls = 0


def within_an_object(module: Any, x: Tensor) -> Any:
    module.own = getattr(module, "own", None) or Own()
    module.own.calls += 1
    return module.linear(x) * module.own.calls


def closure() -> Callable[[Tensor], Tensor]:
    calls = 0

    def layer(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return x * calls

    return layer


class OfTheClass(nn.Module):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        OfTheClass.calls += 1
        return x * OfTheClass.calls


NUM_CALLS = [0]


def of_the_module(x: Tensor) -> Tensor:
    NUM_CALLS[0] += 1
    return x * NUM_CALLS[0]


class Calls:
    def __init__(self) -> None:
        self.calls = itertools.count()

    def __call__(self, x: Tensor) -> Tensor:
        return x * next(self.calls)

    def method(self, x: Tensor) -> Tensor:
        return x * next(self.calls)


@pytest.mark.parametrize(
    ("layer", "where"),
    [
        (Around(attribute), "its attribute 'calls'"),
        (nn.Sequential(Around(attribute)), "its attribute '0.calls'"),
        (Around(table), "its attribute 'seen'"),
        (Around(within_an_object), "its attribute 'own', 'calls' of it"),
        (closure(), "the variable 'calls'"),
        (OfTheClass(), "the attribute 'calls' of OfTheClass"),
        (of_the_module, "the variable 'NUM_CALLS'"),
        (Calls(), "its object, 'calls' of it"),
        (Calls().method, "its object, 'calls' of it"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_numbers_that_calls_leave_for_the_next_are_refused(layer: object, where: str) -> None:
    refuse(layer, f"changes {where} in each call, here to .*register it as a buffer")


def of_sizes(module: Any, x: Tensor) -> Any:
    module.last = {"rows": len(x), "shape": tuple(x.shape), "mean": x.detach().mean()}
    module.tables = {**getattr(module, "tables", {}), len(x): "made"}
    return module.linear(x)


def test_numbers_that_tell_of_the_call_are_fine() -> None:
    declare(Around(of_sizes))


def layer_drop(module: Any, x: Tensor) -> Any:
    return x if random.random() < 0.5 else module.linear(x)


def old_numpy(module: Any, x: Tensor) -> Any:
    return module.linear(x) * float(numpy.random.rand())


def from_attribute(generator: Any, draw: Callable[[Any, Tensor], Any]) -> nn.Module:
    module = Around(lambda m, x: m.linear(x) * draw(m.generator, x))
    module.generator = generator
    return module


def noise(generator: torch.Generator, x: Tensor) -> Tensor:
    return torch.rand(x.shape, generator=generator)


GENERATOR = torch.Generator()


@pytest.mark.parametrize(
    ("layer", "where"),
    [
        (Around(layer_drop), "draws random numbers from Python's random"),
        (Around(old_numpy), "draws random numbers from numpy.random"),
        (
            from_attribute(random.Random(0), lambda g, x: g.random()),
            "draws random numbers from its attribute 'generator'",
        ),
        (
            from_attribute(numpy.random.default_rng(0), lambda g, x: g.random()),
            "draws random numbers from its attribute 'generator'",
        ),
        (
            from_attribute(numpy.random.RandomState(0), lambda g, x: g.rand()),
            "draws random numbers from its attribute 'generator'",
        ),
        (from_attribute(torch.Generator(), noise), "has a torch.Generator in its attribute 'generator'"),
        (pf.lazy(from_attribute, torch.Generator(), noise), "has a torch.Generator in its attribute 'generator'"),
        (lambda x: x.clone().uniform_(generator=GENERATOR), "draws random numbers from a torch.Generator of its own"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_random_numbers_of_other_generators_are_refused(layer: object, where: str) -> None:
    refuse(layer, f"{where}, which differ from layout to layout; draw them as tensors from torch's default generator")


def test_a_generator_of_the_call_is_fine() -> None:
    declare(lambda x: x + noise(torch.Generator().manual_seed(1), x))


# -- what a copy would not have ----------------------------------------------------------------

DROPOUT, LINEAR = nn.Dropout(0.5), nn.Linear(8, 8)


def dropped(x: Tensor) -> Any:
    return DROPOUT(x)


class Hidden(nn.Module):
    """Keeps a layer where torch does not look for layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Linear(8, 8)]

    def forward(self, x: Tensor) -> Any:
        return self.layers[0](x)


@pytest.mark.parametrize(
    "layer", [dropped, lambda x: nn.Dropout()(x), Hidden(), pf.lazy(Hidden)], ids=lambda f: str(f)[:20]
)
def test_modules_that_are_no_part_of_the_layer_are_refused(layer: object) -> None:
    refuse(layer, "is no part of it.*a module that registers it")


class Aside(nn.Module):
    """Its weight is also that of another layer, which torch does not know it has."""

    def __init__(self, hide: Callable[[nn.Module, nn.Linear], None], linear: nn.Linear) -> None:
        super().__init__()
        hide(self, linear)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


@pytest.mark.parametrize(
    ("hide", "words"),
    [
        (lambda m, linear: object.__setattr__(m, "other", linear), "has a Linear in its attribute 'other'"),
        (lambda m, linear: setattr(m, "other", [linear]), "has a Linear in its attribute 'other'"),
        (lambda m, linear: setattr(m, "tables", {"a": ({"b": linear},)}), "has a Linear in its attribute 'tables'"),
        (lambda m, linear: setattr(m, "weights", (linear.weight,)), "has a Parameter in its attribute 'weights'"),
    ],
)
def test_weights_that_are_not_registered_are_refused(hide: Any, words: str) -> None:
    refuse(Aside(hide, LINEAR), f"{words} that is no part of it.*nor tied.*give a module that registers it")
    refuse(pf.lazy(nn.Sequential, pf.lazy(Aside, hide, LINEAR)), words.replace("attribute '", "attribute '0."))


def test_registered_parts_may_be_held_elsewhere_too_and_functions_anywhere() -> None:
    module: Any = Around(lambda m, x: m.steps["a"][0](m.table[1](x)))
    module.table = [module.linear.weight, module.linear]
    module.steps = {"a": [nn.ReLU()]}
    declare(module)
    declare(nn.LSTM(8, 8))


def old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(nn.Linear(8, 8))


def test_modules_that_torch_does_not_copy_are_refused() -> None:
    refuse(
        nn.Sequential(old_weight_norm()), r"'0\.weight' that was computed from others.*parametrizations\.weight_norm"
    )
    called = Around(noting)
    called(torch.ones(2, 8))
    refuse(called, "'seen' that was computed from others.*give pf.lazy")
    graph = declare(pf.lazy(old_weight_norm))
    graph.loss("loss", torch.mean, "e")
    pf.Reference(graph, lambda p: torch.optim.SGD(p, lr=0.1)).step({"x": torch.ones(2, 8)})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda m: m.weight.requires_grad_(False),
            "'weight' was float32 .8, 8., trained and is float32 .8, 8., frozen",
        ),
        (lambda m: m.double(), "'weight' was float32 .8, 8., trained and is float64"),
        (lambda m: setattr(m, "bias", None), "'bias' was float32 .8,., trained and is not there"),
        (lambda m: m.register_buffer("seen", torch.ones(2)), "'seen' was not there and is float32 .2,., frozen"),
        (lambda m: m.weight.register_hook(lambda g: 2 * g), "'weight' has a hook"),
        (lambda m: object.__setattr__(m, "other", LINEAR), "has a Linear in its attribute 'other'"),
    ],
)
def test_modules_that_change_after_they_were_added_are_refused(change: Callable[[Any], object], words: str) -> None:
    linear = nn.Linear(8, 8)
    graph = declare(linear)
    graph.loss("loss", torch.mean, "e")
    plan = make_plan(graph, [(list(graph.layers), (0,))])
    with torch.no_grad():
        linear.weight.mul_(2)  # other numbers in the same place are its weights
    pf.Reference(graph)
    change(linear)
    for refused in (lambda: pf.Reference(graph), lambda: pf.Engine(graph, plan)):
        with pytest.raises(GraphError, match=words) as caught:
            refused()
        assert "layer 'e' (Linear)" in str(caught.value)


def making(module: Any, x: Tensor) -> Any:
    if "table" not in module._buffers:
        module.register_buffer("table", torch.arange(8.0), persistent=False)
    return module.linear(x) + module.table


def test_a_buffer_that_the_first_call_makes_is_no_change() -> None:
    graph = declare(Around(making))
    graph.loss("loss", torch.mean, "e")
    pf.Reference(graph, sgd).step({"x": torch.ones(4, 8)})


def test_functions_may_call_layers_without_weights_and_modes() -> None:
    declare(lambda x: nn.Flatten()(nn.functional.relu(x)))


def hooked(register: Callable[[nn.Linear], object]) -> nn.Linear:
    linear = nn.Linear(8, 8)
    register(linear)
    return linear


def closes_over(other: nn.Module) -> Callable[..., Any]:
    return lambda module, inputs, output: other(output)


def closes_over_backward(other: nn.Module) -> Callable[..., Any]:
    def hook(module: nn.Module, given: Any, wanted: Any) -> Any:
        return (other(given[0]),)

    return hook


@pytest.mark.parametrize(
    ("register", "words"),
    [
        (lambda m: m.weight.register_hook(lambda g: g * 0), "'weight' has a hook, which torch does not copy"),
        (lambda m: m.bias.register_post_accumulate_grad_hook(lambda p: None), "'bias' has a hook"),
        (lambda m: m.register_forward_hook(closes_over(LINEAR)), "hook that closes over a Linear"),
        (lambda m: m.register_forward_hook(closes_over(DROPOUT)), "hook that closes over a Dropout"),
        (lambda m: m.register_full_backward_hook(closes_over_backward(LINEAR)), "hook that closes over a Linear"),
    ],
)
def test_hooks_that_would_not_follow_the_copies_are_refused(register: Callable[..., object], words: str) -> None:
    refuse(hooked(register), words)


class Labelled(torch.Tensor):
    """A tensor of somebody's own kind."""


def scripted() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(nn.Linear(8, 8))


class Indexed(nn.Module):
    """Embeds the largest feature."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 8, sparse=True)

    def forward(self, x: Tensor) -> Any:
        return self.embedding(x.argmax(1))


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (nn.LazyLinear(8), "'weight' gets its shape in the first call.*nn.Linear for nn.LazyLinear"),
        (pf.lazy(nn.LazyLinear, 8), "'weight' gets its shape in the first call"),
        (scripted(), "is TorchScript.*the module that it was made from"),
        (nn.Sequential(scripted()), "holds TorchScript at '0'"),
        (
            hooked(lambda m: setattr(m, "weight", nn.Parameter(m.weight.detach().as_subclass(Labelled)))),
            "'weight' is a Labelled tensor",
        ),
        (pf.lazy(Indexed), "gives sparse gradients.*sparse=False"),
        (lambda x: x.to_sparse(), "gives a sparse_coo tensor"),
        (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "makes a quantized tensor"),
        (lambda x: torch.nested.as_nested_tensor([x[0], x[1]]), "nested tensors, for example"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_tensors_that_are_not_like_others_are_refused(layer: object, words: str) -> None:
    refuse(layer, words)


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (torch.ones(4, 8).to_sparse(), "sparse_coo"),
        (torch.ones(4, 8).as_subclass(Labelled), "Labelled"),
        (torch.ones(4, 8, requires_grad=True), "requires grad.*detach"),
    ],
)
def test_batches_of_other_tensors_are_refused(x: Tensor, words: str) -> None:
    with pytest.raises(BatchError, match=words):
        declare(torch.relu).check_batch({"x": x})


def test_torch_checkpoint_is_fine() -> None:
    declare(Around(lambda m, x: checkpoint(m.linear, x, use_reentrant=False)))


# -- backward --------------------------------------------------------------------------------


class DrawsInBackward(torch.autograd.Function):
    """Adds noise to gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient + torch.rand_like(gradient)


class Noisy(nn.Module):
    """Its weight's gradient is noisy; that of its input is not computed where it is the first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Any:
        return x * DrawsInBackward.apply(self.weight)  # type: ignore[no-untyped-call]


def dropped_again(module: Any, x: Tensor) -> Any:
    return checkpoint(
        lambda y: nn.functional.dropout(module.linear(y)), x, use_reentrant=False, preserve_rng_state=False
    )


@pytest.mark.parametrize(
    "layer", [Noisy(), pf.lazy(Noisy), DrawsInBackward.apply, Around(dropped_again)], ids=lambda f: str(f)[:20]
)
def test_random_numbers_in_backward_are_refused(layer: object) -> None:
    refuse(layer, "draws random numbers in backward.*draw in forward and save what was drawn")
    graph = pf.LayerGraph("first")
    if not callable(getattr(layer, "__func__", None)):  # without weights nothing comes back to the first layer
        with pytest.raises(GraphError, match="draws random numbers in backward"):
            graph.add("e", layer, graph.input("x", ("B", 8)))


@pytest.mark.parametrize("reentrant", [False, True])
def test_masks_that_a_checkpoint_draws_again_are_fine(reentrant: bool) -> None:
    """As is attention without dropout, which torch calls random."""

    def attend(module: Any, x: Tensor) -> Any:
        def within(y: Tensor) -> Tensor:
            y = module.linear(y)[:, None]
            return nn.functional.dropout(nn.functional.scaled_dot_product_attention(y, y, y)[:, 0])

        return checkpoint(within, x, use_reentrant=reentrant)

    assert declare(Around(attend)).layers["e"].is_random
    plain = declare(lambda x: nn.functional.scaled_dot_product_attention(x[None], x[None], x[None])[0])
    assert not plain.layers["e"].is_random


class CheckpointedNorm(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_norms_within_a_checkpoint_are_refused(reentrant: bool) -> None:
    """Their statistics would move twice for each micro-batch, or once on replicas."""
    words = r"changes its buffer 'inner\.1\.running_mean' in backward too.*let the plan recompute the layer"
    refuse(CheckpointedNorm(reentrant), words)
    frozen = CheckpointedNorm(reentrant)
    frozen.inner.requires_grad_(False)
    refuse(frozen, words)
