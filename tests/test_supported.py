"""docs/supported.md is true: what it calls supported has a test, what it calls refused is refused.

A case to refuse is a function of `REFUSED` below, under the words of the page's first column; the
error that it raises must hold the words of the second.
"""

from __future__ import annotations

import ast
import random
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pipeflow as pf
from pipeflow.errors import LayerFailure, PipeflowError
from pipeflow.testing.graphs import RunningShift
from tests.runtime.models import (
    THREE_STAGES,
    bomb_batch,
    bomb_graph,
    bomb_plan,
    forked_batch,
    forked_graph,
    make_plan,
    sgd,
)
from tests.runtime.sequence_models import MOLECULE_STAGES, molecule_model, molecules
from tests.runtime.test_decoding import Sum, decoder

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "supported.md").read_text()


def rows(heading: str) -> list[tuple[str, str]]:
    """The two cells of each row of the table under a heading."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    cells = re.findall(r"^\| (.+?) \| (.+?) \|$", section, flags=re.MULTILINE)
    return [(a, b) for a, b in cells[1:]]


def chain(*layers: object) -> pf.LayerGraph:
    """Linear, the layers, linear, and a loss."""
    graph = pf.LayerGraph("chain")
    h = graph.add("first", pf.lazy(nn.Linear, 4, 4), graph.input("x", ("B", 4)))
    for i, layer in enumerate(layers):
        h = graph.add(f"middle{i}", layer, h)
    graph.loss("loss", torch.mean, graph.add("last", pf.lazy(nn.Linear, 4, 4), h))
    return graph


def changes_its_input() -> None:
    chain(nn.ReLU(inplace=True))


class Clamping(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        self.weight.data.clamp_(-1, 1)
        return super().forward(x)


class Remembering(nn.Module):
    state: Tensor | float = 0.0

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.state
        self.state = x.mean(0)
        return x


class Leaving(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        self.auxiliary = x.square().mean()
        return super().forward(x)


def changes_its_weights() -> None:
    chain(Clamping(4, 4))


def keeps_state() -> None:
    chain(Remembering())


class CountsCalls(nn.Module):
    num_calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.num_calls += 1
        return x / self.num_calls


def counts_calls() -> None:
    chain(CountsCalls())


def other_random_numbers() -> None:
    chain(lambda x: x * random.random())


def leaves_a_loss() -> None:
    chain(Leaving(4, 4))


def calls_a_module_of_its_own() -> None:
    chain(lambda x: nn.Dropout()(x))


def hook_on_a_parameter() -> None:
    linear = nn.Linear(4, 4)
    linear.weight.register_hook(lambda gradient: 2 * gradient)  # type: ignore[no-untyped-call]
    chain(linear)


class CheckpointedNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.norm, x, use_reentrant=False)


def checkpointed_norm() -> None:
    chain(CheckpointedNorm())


class NoisyGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return torch.rand_like(gradient)


def random_backward() -> None:
    chain(NoisyGradient.apply)


def weights_aside() -> None:
    linear = nn.Linear(4, 4)
    object.__setattr__(linear, "others", [nn.Linear(4, 4)])
    chain(linear)


def old_weight_norm() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        chain(nn.utils.weight_norm(nn.Linear(4, 4)))


def frozen_after() -> None:
    linear = nn.Linear(4, 4)
    graph = chain(linear)
    linear.requires_grad_(False)
    pf.Reference(graph)


def shapes_of_the_first_call() -> None:
    chain(pf.lazy(nn.LazyLinear, 4))


class Labelled(Tensor):
    pass


def subclass_of_tensor() -> None:
    linear = nn.Linear(4, 4)
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Labelled))
    chain(linear)


def sparse_gradients() -> None:
    graph = pf.LayerGraph("sparse")
    graph.add("embedding", nn.Embedding(8, 4, sparse=True), graph.input("x", ("B",), "int64"))


def sparse_between_layers() -> None:
    chain(Tensor.to_sparse)


def script() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted: object = torch.jit.script(nn.Linear(4, 4))
    chain(scripted)


def batch_with_gradient() -> None:
    chain().check_batch({"x": torch.ones(2, 4, requires_grad=True)})


def two_limits_of_one_length() -> None:
    graph = pf.LayerGraph("limits")
    graph.input("x", ("B", pf.Length("time", low=2)))
    graph.input("y", ("B", pf.Length("time", low=3)))


def no_batch_dimension() -> None:
    graph = pf.LayerGraph("nodes")
    graph.loss("loss", torch.mean, graph.add("linear", pf.lazy(nn.Linear, 4, 4), graph.input("x", ("nodes", 4))))
    graph.check()


def too_many_microbatches() -> None:
    graph = forked_graph()
    pf.Engine(graph, make_plan(graph, THREE_STAGES, num_microbatches=2)).evaluate([forked_batch(1)] * 3)


def batch_that_cannot_be_cut() -> None:
    graph = molecule_model()
    pf.Engine(graph, make_plan(graph, MOLECULE_STAGES)).evaluate(molecules(3))


def outputs_that_cannot_be_joined() -> None:
    graph = molecule_model()
    pf.Engine(graph, make_plan(graph, MOLECULE_STAGES)).predict(molecules(3), ["each"])


def decoding_of_what_looks_around() -> None:
    graph = pf.LayerGraph("recurrent")
    result, *_ = graph.add("lstm", pf.lazy(nn.LSTM, 4, 4, batch_first=True), graph.input("x", ("B", "time", 4)))
    graph.loss("loss", torch.mean, result)
    pf.Engine(graph, make_plan(graph, [(list(graph.layers), (0,))])).decode(1, [result.name])


def decoding_of_what_is_found_to_look_around() -> None:
    graph = pf.LayerGraph("around")
    x = graph.input("x", ("B", "time", 4))
    look = graph.add("look", pf.lazy(Sum), graph.add("first", pf.lazy(nn.Linear, 4, 4), x))
    graph.loss("loss", torch.mean, graph.add("sums", torch.cumsum, look, dim=1))
    pf.Engine(graph, make_plan(graph, [(list(graph.layers), (0,))])).decode(1, ["sums"])


def decoding_without_memory() -> None:
    graph = forked_graph()
    pf.Engine(graph, make_plan(graph, THREE_STAGES)).decode(1)


def decoding_with_changed_weights() -> None:
    graph = decoder()
    engine = pf.Engine(graph, make_plan(graph, [(list(graph.layers), (0,))]))
    session = engine.decode(2)
    engine.load_state_dict(engine.state_dict())
    session.step({"tokens": torch.zeros(2, 1, dtype=torch.int64)})


def shape_depends_on_data() -> None:
    def positive(x: Tensor) -> Tensor:
        return x[x > 0]

    chain(positive)


def as_many_outputs_as_samples() -> None:
    chain(torch.unbind)


class Auxiliary(nn.Module):
    def forward(self, x: Tensor) -> object:
        return (x, x) if self.training else x


def other_outputs_in_evaluation() -> None:
    chain(Auxiliary())


def tensor_as_constant() -> None:
    graph = chain()
    graph.add("scaled", torch.mul, "last", other=torch.ones(4))


def set_of_tensors() -> None:
    chain(lambda x: {x})


def loss_without_parameters() -> None:
    graph = pf.LayerGraph("fixed")
    graph.loss("loss", torch.mean, graph.input("x", ("B", 4)))
    graph.check()


def halved_entropy(scores: Tensor, label: Tensor, ignore_index: int = -100) -> Tensor:
    return nn.functional.cross_entropy(scores, label, ignore_index=ignore_index) / 2


def classified(**options: Any) -> pf.LayerGraph:
    graph = pf.LayerGraph("classified")
    scores = graph.add("scores", pf.lazy(nn.Linear, 4, 3), graph.input("x", ("B", 4)))
    graph.loss("loss", halved_entropy, scores, graph.input("label", ("B",), "int64"), **options)
    return graph


def labels_of_unknown_weight() -> None:
    classified(ignore_index=0)


def ignored_labels() -> None:
    pf.Reference(classified()).evaluate({"x": torch.zeros(2, 4), "label": torch.tensor([1, -100])})


def unread_input() -> None:
    graph = chain()
    graph.input("y", ("B",))
    graph.check()


def replicated_buffers() -> None:
    graph = chain(pf.lazy(RunningShift, 4))
    pf.Engine(graph, make_plan(graph, [(list(graph.layers), (0, 1))]), sgd)


def shared_apart() -> None:
    shared = nn.Linear(4, 4)
    graph = chain(shared, shared)
    make_plan(graph, [(["first", "middle0"], (0,)), (["middle1", "last", "loss"], (1,))])


def synchronised_norm() -> None:
    chain(pf.lazy(nn.SyncBatchNorm, 4))


def closure_optimizer() -> None:
    graph = forked_graph()
    pf.Engine(graph, make_plan(graph, THREE_STAGES), torch.optim.LBFGS)


def step_without_a_phase() -> None:
    graph = chain()
    graph.phase("whole", losses=["loss"], trains=["*"])
    with pf.Engine(graph, make_plan(graph, [(list(graph.layers), (0,))]), sgd) as engine:
        engine.step({"x": torch.zeros(4, 4)})


def recorded_steps() -> None:
    pf.Reference(forked_graph(), lambda p: torch.optim.Adam(p, differentiable=True))


def sparse_optimizer() -> None:
    pf.Reference(forked_graph(), torch.optim.SparseAdam)


def made_optimizer() -> None:
    pf.Reference(forked_graph(), sgd([nn.Parameter(torch.ones(1))]))  # type: ignore[arg-type]


def training_without_an_optimizer() -> None:
    graph = forked_graph()
    pf.Engine(graph, make_plan(graph, THREE_STAGES), clip_norm=1.0)


def limit_that_is_no_number() -> None:
    pf.Reference(forked_graph(), sgd, clip_norm=float("nan"))


def weights_of_a_failed_engine() -> None:
    graph = bomb_graph("second", "backward")
    with pf.Engine(graph, bomb_plan(graph, "1f1b"), sgd) as engine:
        with pytest.raises(LayerFailure):
            engine.step(bomb_batch(1))
        engine.state_dict()


def autocast_around() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pf.Reference(chain(), sgd).step({"x": torch.zeros(4, 4)})


def no_kernel_for_the_type() -> None:
    graph = pf.LayerGraph("bilinear")
    h = graph.add("first", pf.lazy(nn.Linear, 4, 4), graph.input("x", ("B", 4)))
    graph.loss("loss", torch.mean, graph.add("second", pf.lazy(nn.Bilinear, 4, 4, 4), h, h))
    pf.Reference(graph, sgd, precision=pf.Precision(autocast="bfloat16"))


def two_half_types() -> None:
    pf.Precision(autocast="float16", parameters="bfloat16")


def sums_in_no_type() -> None:
    pf.Precision(accumulate="parameters")


def raising_while_scaled() -> None:
    pf.Reference(chain(), sgd, nonfinite="raise", precision=pf.Precision(loss_scale=pf.LossScale()))


def kinds_of_devices() -> None:
    graph, devices = forked_graph(), ["cpu", "cuda:0", "cpu"]
    precision = pf.Precision(autocast="bfloat16")
    pf.Engine(graph, make_plan(graph, THREE_STAGES), sgd, devices=devices, precision=precision)


def plan_for_another_graph() -> None:
    pf.Engine(bomb_graph("first", "never"), make_plan(forked_graph(), THREE_STAGES), sgd)


def missing_device() -> None:
    graph = chain()
    plan = make_plan(graph, [(list(graph.layers), (0,))])
    gpu = plan.cluster.devices[0].model_copy(update={"kind": "cuda"})
    cluster = plan.cluster.model_copy(update={"devices": (gpu, *plan.cluster.devices[1:])})
    if torch.cuda.is_available():
        pytest.skip("this machine has the device")
    pf.Engine(graph, plan.model_copy(update={"cluster": cluster}), sgd)


REFUSED: dict[str, Callable[[], object]] = {
    "a layer that changes its input in place, in training or in evaluation": changes_its_input,
    "a layer that changes its weights in forward": changes_its_weights,
    "a layer that keeps state in attributes from call to call": keeps_state,
    "a layer that counts its calls, in an attribute, a closure or elsewhere": counts_calls,
    "random numbers from Python's `random`, numpy or a `torch.Generator` of one's own": other_random_numbers,
    "an auxiliary loss left in an attribute": leaves_a_loss,
    "a function that calls modules of its own, a hook that closes over another layer": calls_a_module_of_its_own,
    "a hook on a parameter, which no copy has": hook_on_a_parameter,
    "batch-norm within torch's own checkpoint, which shows it everything twice": checkpointed_norm,
    "random numbers drawn in backward, those of a checkpoint apart": random_backward,
    "weights in an attribute where torch does not find them: a list of layers, a parameter in a tuple": weights_aside,
    "modules that torch does not copy, such as those of the old `weight_norm`": old_weight_norm,
    "a module that was frozen, cast or changed otherwise after it was added": frozen_after,
    "parameters without a shape until the first call": shapes_of_the_first_call,
    "parameters that are tensor subclasses or sparse": subclass_of_tensor,
    "sparse gradients": sparse_gradients,
    "sparse, nested and quantized tensors between layers": sparse_between_layers,
    "TorchScript": script,
    "a batch that requires grad": batch_with_gradient,
    "two inputs that say other limits of one length": two_limits_of_one_length,
    "a graph without a batch dimension": no_batch_dimension,
    "more micro-batches than the plan has": too_many_microbatches,
    "cutting a batch along what is not the batch": batch_that_cannot_be_cut,
    "joining outputs along what is not the batch": outputs_that_cannot_be_joined,
    "decoding through a layer known to look at other steps, without `decode`": decoding_of_what_looks_around,
    "decoding through any other layer that looks at other steps: attention by a function, sums over steps, positions": (
        decoding_of_what_is_found_to_look_around
    ),
    "decoding where no layer looks back": decoding_without_memory,
    "going on to decode after the weights have changed": decoding_with_changed_weights,
    "a shape that depends on data": shape_depends_on_data,
    "a number of outputs that depends on the batch": as_many_outputs_as_samples,
    "other outputs in evaluation than in training": other_outputs_in_evaluation,
    "a tensor or module as a constant argument": tensor_as_constant,
    "results that are neither tensors nor constants": set_of_tensors,
    "a loss that no parameter reaches": loss_without_parameters,
    "a mean over labels with `ignore_index` or weights of classes that cannot be told, without `count`": (
        labels_of_unknown_weight
    ),
    "ignored labels in a mean that cannot be told, without `count`": ignored_labels,
    "an input that no layer reads": unread_input,
    "replicas of a layer whose forward changes buffers, torch's norms apart": replicated_buffers,
    'layers that share parameters on several stages, without `shared="copies"`': shared_apart,
    "torch's SyncBatchNorm": synchronised_norm,
    "an optimizer that needs a closure": closure_optimizer,
    "a training step of a graph with phases that names none": step_without_a_phase,
    "an optimizer that records its own steps": recorded_steps,
    "an optimizer of sparse gradients alone": sparse_optimizer,
    "an optimizer or scheduler in place of what makes one": made_optimizer,
    "options of training without an optimizer": training_without_an_optimizer,
    "limits of gradients that are no numbers above 0": limit_that_is_no_number,
    "weights of an engine that has failed": weights_of_a_failed_engine,
    "autocast around a call": autocast_around,
    "a layer that does not run in the types of the precision": no_kernel_for_the_type,
    "two half types at once": two_half_types,
    "sums in the type of parameters that are not cast": sums_in_no_type,
    "stopping at what is not finite while losses are scaled": raising_while_scaled,
    "autocast on devices of several kinds": kinds_of_devices,
    "a plan for another graph": plan_for_another_graph,
    "a device that the machine lacks": missing_device,
}


@pytest.mark.parametrize(("what", "test"), rows("Supported"), ids=lambda cell: cell[:50])
def test_what_is_supported_has_a_test(what: str, test: str) -> None:
    path, _, name = test.strip("`").partition("::")
    tree = ast.parse((ROOT / path).read_text())
    assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert name.startswith("test_")


@pytest.mark.parametrize(("what", "words"), rows("Refused"), ids=lambda cell: cell[:50])
def test_what_is_refused_is_refused_in_these_words(what: str, words: str) -> None:
    with pytest.raises(PipeflowError, match=re.escape(words)):
        REFUSED[what]()


def test_every_case_is_on_the_page() -> None:
    assert [what for what, _ in rows("Refused")] == list(REFUSED)
    assert len(rows("Supported")) >= 10
