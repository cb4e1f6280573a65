"""What a layer does besides giving its outputs, seen while it runs on tensors without data.

A layer's calls are apart: on other ranks, in another order, on copies of its module. So it may not
change what it reads, keep something of one call for the next, or call what does not belong to it.
Here is what sees that; `check_effects` refuses it. Nothing here runs a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._python_dispatch import TorchDispatchMode

from pipeflow.errors import GraphError
from pipeflow.graphs.nesting import flatten

_EMBEDDING_OPS = {"embedding": 4, "embedding_bag": 5, "_embedding_bag": 5, "_embedding_bag_forward_only": 5}
"""Where each has its argument `sparse`."""


class Effects(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's base is not annotated
    """Follows, kernel by kernel, what is written to and what comes from the inputs.

    Args:
        earlier: what the layer's attributes kept of its inputs in a call before, by path.

    Attributes:
        follows_another: whether a call before kept anything.
        stale: paths of `earlier` that were read.
        has_sparse_gradient: whether an embedding was asked for sparse gradients.
    """

    def __init__(self, earlier: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._path_by_storage = {_storage(t): path for path, t in earlier.items()}
        self.follows_another = bool(earlier)
        self._written: set[int] = set()
        self._derived: set[int] = set()
        self._alive: list[Tensor] = []  # so that no storage's address comes twice
        self.stale: dict[str, None] = {}
        self.has_sparse_gradient = False

    def start(self, sources: Iterable[Tensor]) -> None:
        """Forgets what was seen; from here on, what comes from `sources` is followed."""
        self._written.clear()
        self._follow(sources)

    def is_written(self, tensor: Tensor) -> bool:
        return _storage(tensor) in self._written

    def is_derived(self, tensor: Tensor) -> bool:
        return _storage(tensor) in self._derived

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        schema = func._schema
        if schema.is_mutable:
            given = [*zip(schema.arguments, args, strict=False), *((a, kwargs.get(a.name)) for a in schema.arguments)]
            changed = [value for argument, value in given if argument.alias_info and argument.alias_info.is_write]
            self._written.update(_storage(t) for t in _tensors(changed))
        position = _EMBEDDING_OPS.get(schema.name.removeprefix("aten::"))
        if position is not None and len(args) > position and args[position]:
            self.has_sparse_gradient = True
        read = {_storage(t) for t in _tensors((args, kwargs))}
        self.stale |= {path: None for storage, path in self._path_by_storage.items() if storage in read}
        result = func(*args, **kwargs)
        if not self._derived.isdisjoint(read):
            self._follow(_tensors(result))
        return result

    def _follow(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            self._derived.add(_storage(tensor))
            self._alive.append(tensor)


def _tensors(value: Any) -> list[Tensor]:
    return flatten(value, lambda v: isinstance(v, Tensor), exact=False)[0]


def _storage(tensor: Tensor) -> int:
    return (
        int(tensor.untyped_storage()._cdata) if tensor.layout is torch.strided and not tensor.is_nested else id(tensor)
    )


def kept_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Tensors in the attributes of a module and its parts that are neither parameters nor buffers, by path."""
    own = {id(t) for t in (*module.parameters(), *module.buffers())}
    kept = {}
    for path, part in module.named_modules():
        for name, value in vars(part).items():
            if name in ("_parameters", "_buffers", "_modules"):
                continue
            try:
                tensors = _tensors(value)
            except TypeError:  # in a set or a data class, which nothing here looks into
                continue
            full = f"{path}.{name}" if path else name
            kept.update({full if len(tensors) == 1 else f"{full}[{i}]": t for i, t in enumerate(tensors)})
    return {path: t for path, t in kept.items() if id(t) not in own}


def lost_gradients(kept: Mapping[str, Tensor], outputs: Sequence[Tensor]) -> list[str]:
    """Paths of kept tensors that autograd records and on which no output depends: losses that nobody adds."""
    recorded = {path: t.grad_fn for path, t in kept.items() if t.grad_fn is not None}
    if not recorded:
        return []
    seen: set[Any] = set()
    pending: list[Any] = [t.grad_fn for t in outputs if t.grad_fn is not None]
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen.add(node)
            pending += [following for following, _ in node.next_functions]
    return [path for path, node in recorded.items() if node not in seen]


@contextmanager
def foreign_calls(function: Callable[..., Any]) -> Iterator[list[nn.Module]]:
    """Lists the modules that are called while it is open and are no part of `function`.

    Layers of torch without tensors, which do the same in training and in evaluation, do not count.
    """
    own = set(function.modules()) if isinstance(function, nn.Module) else set()
    calls: list[nn.Module] = []

    def note(module: nn.Module, inputs: object) -> None:
        if module not in own and not _is_plain(module):
            calls.append(module)

    handle = nn.modules.module.register_module_forward_pre_hook(note)
    try:
        yield calls
    finally:
        handle.remove()


def _is_plain(module: nn.Module) -> bool:
    drops = isinstance(module, _DropoutNd | nn.RReLU | nn.modules.batchnorm._NormBase | nn.MultiheadAttention)
    empty = next(module.parameters(), None) is None and next(module.buffers(), None) is None
    return empty and not drops and type(module).__module__.startswith("torch.nn.") and not list(module.children())


def check_effects(
    who: str,
    function: Callable[..., Any],
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    effects: Effects,
    foreign: Sequence[nn.Module],
    kept: Mapping[str, Tensor],
) -> None:
    """Refuses a layer that does more than give its outputs.

    Args:
        who: the layer, for errors.
        function: its callable.
        inputs, outputs: of the call that was watched.
        effects: what was seen of it.
        foreign: modules that it called and that are no part of it.
        kept: tensors that it left in attributes.

    Raises:
        GraphError: names what it does and the remedy.
    """
    if changed := [i for i, t in enumerate(inputs) if effects.is_written(t)]:
        raise GraphError(
            f"{who} changes its input {changed[0]} in place; other layers and backward may need the tensor as it "
            "was: use the variant that gives a new one (inplace=False)"
        )
    parameters = dict(function.named_parameters()) if isinstance(function, nn.Module) else {}
    if written := [name for name, p in parameters.items() if effects.is_written(p)]:
        raise GraphError(
            f"{who} changes its parameter {written[0]!r} in forward; replicas would change theirs apart, and backward "
            "needs it as it was: compute with a changed copy, or change it in the optimizer"
        )
    if foreign:
        raise GraphError(
            f"{who} calls a {type(foreign[0]).__name__} that is no part of it; its weights would not be trained, nor "
            "would it be told of evaluation: give a module that registers it, or make it a layer of the graph"
        )
    if effects.stale:
        raise GraphError(
            f"{who} reads what an earlier call left in its attribute {next(iter(effects.stale))!r}; calls for other "
            "micro-batches run on other replicas: return it and take it as an input, or reset it in each call"
        )
    # Asked in a second call alone: the first does not tell what is kept for the next from what is lost.
    if effects.follows_another and (lost := lost_gradients(kept, outputs)):
        raise GraphError(
            f"{who} keeps a tensor with a gradient in its attribute {lost[0]!r}, on which no output depends; nothing "
            "outside of the layer can read it there: return it as an output, as a loss for example"
        )
    if effects.has_sparse_gradient:
        raise GraphError(
            f"{who} gives sparse gradients, which replicas cannot add up and clipping cannot see; use sparse=False"
        )
