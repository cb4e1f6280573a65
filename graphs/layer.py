"""One layer of a graph and where its callable comes from.

A source is a module instance, a recipe for a module (`lazy`), or a function. Nothing here
builds, runs or writes any of them; nor loads torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from pipeflow.errors import GraphError
from pipeflow.graphs.nesting import Branch, Constant, Leaf, Nest
from pipeflow.graphs.tensor_spec import TensorSpec

if TYPE_CHECKING:
    from torch import nn

Reduction = Literal["mean", "sum"]
"""How a loss makes one number of many samples."""

RUNNING_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
"""The buffers of torch's norms that training changes."""


@dataclass(frozen=True, slots=True, eq=False)
class Instance:
    """A module as it is, weights included. Graphs copy it and never change it."""

    module: nn.Module


@dataclass(frozen=True, slots=True, eq=False)
class Lazy:
    """A recipe for a module: built where it is needed, so a graph can be larger than memory.

    Attributes:
        factory: a module class, or a function that returns a module.
        args, kwargs: for the factory. They may hold recipes themselves.
    """

    factory: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True, eq=False)
class Function:
    """A function of tensors, without weights."""

    function: Callable[..., Any]


Source = Instance | Lazy | Function


@dataclass(frozen=True, slots=True)
class Decoding:
    """How a layer is run a few steps at a time.

    Attributes:
        keeps_state: whether it has `decode`, and is called by it.
        obstacle: why its result would not be that of the whole sequence; empty where nothing is known.
    """

    keeps_state: bool = False
    obstacle: str = ""


@dataclass(frozen=True, slots=True)
class Labels:
    """What a mean over labels counts, as torch's cross-entropy takes it (`label_means`).

    Attributes:
        tensor: the input of the graph that has the labels.
        ignored: the label that does not count.
        class_weights: the loss's buffer of what each class counts; None where all count alike.
    """

    tensor: str
    ignored: int
    class_weights: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """One layer.

    Attributes:
        name: unique among layers and inputs.
        source: where its callable comes from.
        inputs: names of the tensors it is called with, in order.
        kwargs: constants of the call, where it is `function(*tensors, **kwargs)`.
        arguments: the template of (args, kwargs) over `inputs` where the call is any other; then
            `kwargs` is empty.
        outputs: names of the tensors it gives; the layer's name, or `layer:` and the way to each,
            for example `layer:0`, `layer:hidden`, `layer:states.1`.
        results: the template of what it gives over `outputs`, where that is neither a tensor nor a
            tuple of tensors.
        kind: the name of its class or function.
        is_loss: whether training makes its output small.
        weight: of the loss in the sum of all losses.
        reduction: of the loss, over samples.
        count: the input whose entries say how much each position counts in a mean; None for
            every sample alike, or every label as `labels` says.
        labels: of a loss without `count` that is torch's mean over labels; None for others.
        barred_label: the label that it cannot be given, since a mean would leave it out that nobody
            can weigh; None for none.
        is_random: whether a forward draws random numbers, in training or in evaluation.
        mutated_buffers: names of the buffers that a forward changes, in either.
        norm_calls: paths of torch's norms with running statistics that it calls, in order (`norms`).
        strided_outputs: positions of outputs that it gives as views which are not contiguous.
        strided_gradients: positions of inputs whose gradients it gives as such.
        withholds: whether backward may give no gradient for an input that needs one.
        decoding: how it runs a few steps of a sequence at a time (`decoding`).
        has_backward: whether training's backward passes through it.
    """

    name: str
    source: Source
    inputs: tuple[str, ...]
    kwargs: Mapping[str, Any]
    outputs: tuple[str, ...]
    kind: str
    is_loss: bool = False
    weight: float = 1.0
    reduction: Reduction = "mean"
    count: str | None = None
    labels: Labels | None = None
    barred_label: int | None = None
    is_random: bool = False
    mutated_buffers: tuple[str, ...] = ()
    norm_calls: tuple[str, ...] = ()
    strided_outputs: frozenset[int] = frozenset()
    strided_gradients: frozenset[int] = frozenset()
    withholds: bool = False
    has_backward: bool = False
    decoding: Decoding = Decoding()
    arguments: Nest | None = None
    results: Nest | None = None

    @property
    def template(self) -> Nest:
        """The template of (args, kwargs) over `inputs`, of a plain call too."""
        if self.arguments is not None:
            return self.arguments
        positions = tuple(range(len(self.inputs)))
        return Branch(tuple, (0, 1), (Branch(tuple, positions, tuple(map(Leaf, positions))), Constant(self.kwargs)))

    @property
    def counted(self) -> str | None:
        """The input that says what a micro-batch of the loss counts; None where its samples count alike."""
        return self.count if self.labels is None else self.labels.tensor

    @property
    def is_replicable(self) -> bool:
        """Whether replicas can train it as one device: all it changes are statistics that they can exchange."""
        return not self.own_buffers

    @property
    def own_buffers(self) -> tuple[str, ...]:
        """The buffers that a forward changes and that are no running statistics of torch's norms."""
        known = {f"{norm}.{buffer}".lstrip(".") for norm in self.norm_calls for buffer in RUNNING_STATISTICS}
        return tuple(name for name in self.mutated_buffers if name not in known)


@dataclass(frozen=True, slots=True, eq=False)
class Handle:
    """A tensor of a graph under construction: what `add` returns and takes.

    Attributes:
        name: of the tensor.
        spec: its shape and dtype.
        graph: the graph it belongs to.
    """

    name: str
    spec: TensorSpec
    graph: object = field(repr=False)


def lazy(factory: Callable[..., Any], *args: Any, **kwargs: Any) -> Lazy:
    """A module to be built later, with weights that depend only on the seed and the layer's name.

    Each layer that is given the recipe builds a module of its own. Arguments may be recipes:

    >>> from torch import nn
    >>> block = lazy(nn.Sequential, lazy(nn.Linear, 8, 8), lazy(nn.ReLU))

    Args:
        factory: a module class, or a function that returns a module.
        args, kwargs: for the factory.

    Raises:
        GraphError: `factory` cannot be called.
    """
    if not callable(factory) or _is_module(factory):
        raise GraphError(f"lazy({factory!r}): a factory is a module class or a function; give the class, not a module")
    return Lazy(factory, args, MappingProxyType(kwargs))


def _is_module(thing: object) -> bool:
    torch = sys.modules.get("torch")  # nobody can hold a module before torch is loaded
    return torch is not None and isinstance(thing, torch.nn.Module)


def source_of(name: str, thing: object) -> Source:
    """What a user gave as a layer, as a source.

    Raises:
        GraphError: it is a class, or nothing that can be called.
    """
    if isinstance(thing, Lazy):
        return thing
    if _is_module(thing):
        return Instance(thing)  # type: ignore[arg-type]
    if isinstance(thing, type):
        raise GraphError(
            f"layer {name!r} is the class {thing.__name__}; give a module, a function, or "
            f"pf.lazy({thing.__name__}, ...) to have one built"
        )
    if not callable(thing):
        raise GraphError(f"layer {name!r} is {thing!r}, which cannot be called; give a module, pf.lazy or a function")
    return Function(thing)


def kind_of(source: Source) -> str:
    """The class or function name of a source, for people and for speeds by kind."""
    match source:
        case Instance(module):
            return type(module).__name__
        case Lazy(factory):
            return _name(factory)
        case Function(function):
            return _name(function)


def _name(function: object) -> str:
    return str(getattr(function, "__name__", None) or type(function).__name__)
