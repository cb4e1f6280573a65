"""What a layer gives for what it is given, found by running it on tensors without data.

A layer runs on fake tensors, in training mode, for two batch sizes and some of every length
(`pipeflow.graphs.trials`): how its sizes differ tells how they grow. The same runs tell whether
autograd records the outputs, whether random numbers are drawn and which buffers change. Neither
the user's modules nor the process's random generators are touched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pipeflow.errors import GraphError, ShapeError
from pipeflow.graphs.building import make_module
from pipeflow.graphs.decoding import decoding_of
from pipeflow.graphs.fake_run import Run, fake_copy, quiet, run
from pipeflow.graphs.kernels import dtype_name
from pipeflow.graphs.label_means import LabelMean
from pipeflow.graphs.layer import Decoding, Instance, Lazy, Source, kind_of
from pipeflow.graphs.module_check import check_copyable, check_module, spec_of
from pipeflow.graphs.nesting import Nest, alike, form_of
from pipeflow.graphs.numerics import Numerics
from pipeflow.graphs.plain_state import changed, check_generators, check_plain_state, common_generators
from pipeflow.graphs.question_key import NoKey, key_of
from pipeflow.graphs.randomness import isolated
from pipeflow.graphs.tensor_spec import TensorSpec, list_specs
from pipeflow.graphs.trials import FIXED_LENGTHS, Trial, fit

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Inferred:
    """What is known of a layer after inference.

    Attributes:
        outputs: specs, in order. A size that follows its lengths by no rule is the length
            "<output.dimension>", to be found for each length by `run_shapes`.
        results: the template of what the callable returns.
        is_random: whether random numbers are drawn, in training or in evaluation.
        mutated_buffers: names of buffers that the forward changes, in training or in evaluation.
        norm_calls: paths of the norms with running statistics that it calls, in order.
        decoding: how it runs a few steps of a sequence at a time.
        strided_outputs: positions of outputs that are not contiguous.
        strided_gradients: positions of inputs whose gradients are not contiguous.
        withholds: whether backward may give no gradient for an input that needs one.
        parameters: spec of each parameter by its name in the module; each of a tie.
        buffers: the same for buffers.
        persistent: names of the buffers that belong to the state dict.
        ties: groups of parameter or buffer names that are one tensor within the module.
        label_means: what torch's means over labels count in it.
    """

    outputs: tuple[TensorSpec, ...]
    results: Nest
    is_random: bool
    mutated_buffers: tuple[str, ...]
    norm_calls: tuple[str, ...]
    decoding: Decoding
    strided_outputs: frozenset[int]
    strided_gradients: frozenset[int]
    withholds: bool
    parameters: Mapping[str, TensorSpec]
    buffers: Mapping[str, TensorSpec]
    persistent: frozenset[str]
    ties: tuple[tuple[str, ...], ...]
    label_means: tuple[LabelMean, ...]


def infer(
    name: str,
    source: Source,
    inputs: Sequence[TensorSpec],
    arguments: Nest,
    trials: Sequence[Trial] = FIXED_LENGTHS,
    numerics: Numerics | None = None,
) -> Inferred:
    """Runs the layer without data.

    Args:
        name: of the layer, for errors.
        source: its callable.
        inputs: the tensors it is called with.
        arguments: the template of (args, kwargs) over them.
        trials: sizes to try, the first two with the same lengths.
        numerics: the types it computes in, where these are not its own.

    Raises:
        ShapeError: the layer does not take those shapes or dtypes; or its output's shape
            depends on the data, or is neither fixed nor a multiple of the batch.
        GraphError: it returns something else than tensors and constants, of a form that changes,
            or it changes its inputs in place.
    """
    default = torch.get_default_dtype()
    try:
        key = (default, numerics, tuple(inputs), tuple(trials), key_of(source), key_of(arguments))
        return _answer(_Question(key, name, source, tuple(inputs), arguments, tuple(trials), numerics))
    except NoKey:
        return _answer_anew(_Question((), name, source, tuple(inputs), arguments, tuple(trials), numerics))


def run_shapes(
    name: str, source: Source, inputs: Sequence[TensorSpec], arguments: Nest, trial: Trial
) -> tuple[tuple[int, ...], ...]:
    """The shapes of the layer's outputs at one set of sizes.

    Raises:
        ShapeError: the layer does not take those sizes.
    """
    question = _Question((), name, source, tuple(inputs), arguments, (trial,))
    return _without_data(question, _shapes)


@dataclass(frozen=True, slots=True)
class _Question:
    """What inference is asked; equal questions have equal answers, names in errors apart."""

    key: object
    name: str = field(compare=False)
    source: Source = field(compare=False)
    inputs: tuple[TensorSpec, ...] = field(compare=False)
    arguments: Nest = field(compare=False)
    trials: tuple[Trial, ...] = field(compare=False)
    numerics: Numerics | None = field(compare=False, default=None)


def _without_data(question: _Question, use: Callable[[_Question, Callable[..., Any], FakeTensorMode], T]) -> T:
    """What `use` makes of the layer's callable, its tensors without data."""
    name, source = question.name, question.source
    with isolated(0), quiet():
        mode = FakeTensorMode()
        if isinstance(source, Lazy):
            try:
                with mode, torch.device("cpu"):  # built without memory
                    module = make_module(name, source).train()
                check_module(name, module)
                return use(question, module, mode)
            except Exception:
                # Some factories need real numbers: what is wrong, if anything, shows below.
                with torch.device("cpu"):
                    module = make_module(name, source)
            return use(question, fake_copy(name, module, mode), mode)
        if isinstance(source, Instance):
            check_copyable(name, source.module)
            return use(question, fake_copy(name, source.module, mode), mode)
        return use(question, source.function, mode)


def _shapes(question: _Question, function: Callable[..., Any], mode: FakeTensorMode) -> tuple[tuple[int, ...], ...]:
    [trial] = question.trials
    outputs = run(question.name, question.source, function, mode, question.inputs, question.arguments, trial).outputs
    return tuple(tuple(int(n) for n in t.shape) for t in outputs)


def _answer_anew(question: _Question) -> Inferred:
    return _without_data(question, _infer)


# Models repeat their blocks, and a run on fake tensors takes milliseconds.
_answer = lru_cache(maxsize=1024)(_answer_anew)


def _infer(question: _Question, function: Callable[..., Any], mode: FakeTensorMode) -> Inferred:
    name, source, trials = question.name, question.source, question.trials
    module, numerics = function if isinstance(function, nn.Module) else nn.Module(), question.numerics
    if numerics is not None and module is function:
        with mode:
            numerics.as_run(module)
    given = (question.inputs, question.arguments)
    runs: list[Run] = []
    common = common_generators()
    for trial in trials:
        kept = runs[-1].kept if runs else {}
        runs.append(run(name, source, function, mode, *given, trial, numerics, kept))
    _check_apart(question, function, mode, runs, common)
    first = runs[0]
    for trial, other in zip(trials, runs, strict=True):
        if not alike(first.results, other.results):
            raise GraphError(
                f"layer {name!r} gives {form_of(first.results)} for {trials[0]} and {form_of(other.results)} for "
                f"{trial}; the number of outputs, their form and the constants among them must not depend on the batch"
            )
    evaluation = _evaluated(question, module, mode) if _depends_on_mode(module) else None
    if evaluation is not None:
        _check_evaluation(name, first, evaluation)
        runs.append(evaluation)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    buffers = dict(module.named_buffers(remove_duplicate=False))
    mutated = frozenset().union(*(r.mutated for r in runs))
    training = runs[: len(trials)]
    columns = zip(*(r.outputs for r in training), strict=True)
    return Inferred(
        outputs=tuple(_merge(name, i, column, trials) for i, column in enumerate(columns)),
        results=first.results,
        is_random=any(r.is_random for r in runs),
        mutated_buffers=tuple(n for n in buffers if n in mutated),
        norm_calls=first.norm_calls if all(r.norm_calls == first.norm_calls for r in training) else (),
        decoding=decoding_of(function),
        strided_outputs=frozenset().union(*(r.strided_outputs for r in runs)),
        strided_gradients=frozenset().union(*(r.strided_gradients for r in runs)),
        withholds=any(r.withholds for r in training),
        parameters={n: spec_of(p) for n, p in parameters.items()},
        buffers={n: spec_of(b) for n, b in buffers.items()},
        persistent=frozenset(buffers) & frozenset(module.state_dict(keep_vars=True)),
        ties=_ties({**parameters, **buffers}),
        label_means=first.label_means,
    )


def _check_apart(
    question: _Question,
    function: Callable[..., Any],
    mode: FakeTensorMode,
    runs: Sequence[Run],
    common: Mapping[str, object],
) -> None:
    """Refuses a layer whose calls depend on others, by numbers that it keeps or by generators.

    Args:
        runs: some calls of it.
        common: the states of common generators before these.
    """
    who = f"layer {question.name!r} ({kind_of(question.source)})"
    check_generators(who, [r.generators for r in runs])
    after = common_generators()
    if not changed(*runs[-1].plain_state) and not changed(common, after):
        return
    # A note of the sizes, say, is the same once more; a counter is not.
    given = (question.inputs, question.arguments, question.trials[-1], question.numerics, runs[-1].kept)
    again = run(question.name, question.source, function, mode, *given)
    check_plain_state(who, {**after, **again.plain_state[0]}, {**common_generators(), **again.plain_state[1]})


def _depends_on_mode(module: nn.Module) -> bool:
    """Whether a module may give something else in evaluation: torch's own do not."""
    return any(not type(m).__module__.startswith("torch.nn.") for m in module.modules())


def _evaluated(question: _Question, module: nn.Module, mode: FakeTensorMode) -> Run | None:
    """A run in evaluation; None where it cannot be known without data: whoever evaluates is told then."""
    given = (question.inputs, question.arguments, question.trials[0], question.numerics)
    try:
        return run(question.name, question.source, module.eval(), mode, *given)
    except ShapeError:
        return None
    finally:
        module.train()


def _check_evaluation(name: str, training: Run, evaluation: Run) -> None:
    """Refuses a module that gives something of another form or shape in evaluation than in training."""
    runs = (training, evaluation)
    seen = [[(tuple(t.shape), t.dtype) for t in r.outputs] for r in runs]
    if not alike(training.results, evaluation.results) or seen[0] != seen[1]:
        forms = [f"{form_of(r.results)} of {list_specs([spec_of(t) for t in r.outputs])}" for r in runs]
        raise GraphError(
            f"layer {name!r} gives {forms[0]} in training and {forms[1]} in evaluation; give the same in both, with "
            "what is of use in one alone left unread in the other"
        )


def _merge(name: str, output: int, tensors: Sequence[torch.Tensor], trials: Sequence[Trial]) -> TensorSpec:
    """The spec that all runs agree on."""
    first = tensors[0]
    for trial, tensor in zip(trials, tensors, strict=True):
        if tensor.dim() != first.dim() or tensor.dtype != first.dtype:
            raise ShapeError(
                f"layer {name!r} gives {dtype_name(first.dtype)} {tuple(first.shape)} for {trials[0]} and "
                f"{dtype_name(tensor.dtype)} {tuple(tensor.shape)} for {trial}; its rank and dtype must not depend on "
                "the batch"
            )
    try:
        dims = [fit([int(t.shape[dim]) for t in tensors], trials, f"<{output}.{dim}>") for dim in range(first.dim())]
    except ValueError:
        shapes = " and ".join(f"{tuple(t.shape)} for {trial}" for t, trial in zip(tensors[:2], trials[:2], strict=True))
        raise ShapeError(
            f"layer {name!r} gives {shapes}; each size must be fixed or a multiple of the batch, so that "
            "micro-batches of any size work"
        ) from None
    return TensorSpec(tuple(dims), dtype_name(first.dtype), first.requires_grad)


def _ties(tensors: Mapping[str, torch.Tensor]) -> tuple[tuple[str, ...], ...]:
    names: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    return tuple(tuple(group) for group in names.values() if len(group) > 1)
