"""What a module must not have before it can be a layer, since its copies would not have it.

A graph runs copies of the modules that it is given. What torch does not copy, or copies as
something that still belongs to the original, is refused here; by looking alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Set
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy

from pipeflow.errors import GraphError
from pipeflow.graphs.kernels import dtype_name
from pipeflow.graphs.plain_state import OF_EVERY_MODULE, UNKEYED
from pipeflow.graphs.tensor_spec import TensorSpec

_PLAIN = (Tensor, nn.Parameter, FakeTensor)


def check_module(name: str, module: nn.Module) -> None:
    """Refuses a module whose copies would not train as it does.

    Args:
        name: of the layer, for errors.
        module: as it was given, or built.

    Raises:
        GraphError: names what it has and the remedy.
    """
    who = f"layer {name!r} ({type(module).__name__})"
    if script := next((path for path, m in module.named_modules() if isinstance(m, torch.jit.ScriptModule)), None):
        raise GraphError(f"{who} holds TorchScript at {script!r}, {_SCRIPT}")
    if isinstance(module, torch.jit.ScriptModule):
        raise GraphError(f"{who} is TorchScript, {_SCRIPT}")
    own = {id(held) for held in (*module.modules(), *module.parameters())}
    for local, tensor in (*module.named_parameters(), *module.named_buffers()):
        _check_tensor(who, local, tensor)
    for path, part in module.named_modules():
        for attribute, value in vars(part).items():
            if attribute not in OF_EVERY_MODULE:
                _check_attribute(who, f"{path}.{attribute}".lstrip("."), value, own)
        for hook in _hooks(part):
            if held := _closed_over(hook):
                raise GraphError(
                    f"{who} has a hook {f'on {path!r} ' if path else ''}that closes over a {held}; copies of the "
                    "layer would still use the original: make it a part of the module, or of its forward"
                )


_SCRIPT = "which cannot be looked into; give the module that it was made from"


def _check_tensor(who: str, local: str, tensor: Tensor) -> None:
    if is_lazy(tensor):
        raise GraphError(
            f"{who}: its {local!r} gets its shape in the first call, too late for costs, plans and optimizers; give "
            "the sizes (nn.Linear for nn.LazyLinear), or call the module once before"
        )
    if type(tensor) not in _PLAIN or tensor.layout is not torch.strided or tensor.is_quantized:
        kind = type(tensor).__name__ if type(tensor) not in _PLAIN else str(tensor.layout)
        kind = "quantized" if tensor.is_quantized else kind
        raise GraphError(
            f"{who}: its {local!r} is a {kind} tensor, which cannot be copied, reduced and saved as others are; use a "
            "plain torch.Tensor"
        )
    if tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None):
        raise GraphError(
            f"{who}: its {local!r} has a hook, which torch does not copy with it; register a full backward hook on "
            "the module, or give Engine parameter_groups=, clip_norm= or clip_value="
        )


def _check_attribute(who: str, path: str, value: object, own: Set[int]) -> None:
    """Refuses what an attribute holds and torch does not know of: weights of others, generators."""
    for held in _held(value):
        if isinstance(held, torch.Generator):
            raise GraphError(f"{who} has a torch.Generator in its attribute {path!r}, {UNKEYED}")
        if id(held) in own:
            continue
        if isinstance(held, nn.Parameter) or (isinstance(held, nn.Module) and _has_weights(held)):
            raise GraphError(
                f"{who} has a {type(held).__name__} in its attribute {path!r} that is no part of it; its weights would "
                "not be trained, nor tied to those of other layers: give a module that registers it"
            )


def check_unchanged(
    name: str, module: nn.Module, parameters: Mapping[str, TensorSpec], buffers: Mapping[str, TensorSpec]
) -> None:
    """Refuses a module that is another than when its layer was added.

    Args:
        name: of the layer, for errors.
        module: as it is now.
        parameters, buffers: what it had, each of a tie.

    Raises:
        GraphError: names what has changed, or what it should not have.
    """
    who = f"layer {name!r} ({type(module).__name__})"
    now = {name: spec_of(p) for name, p in module.named_parameters(remove_duplicate=False)}
    now |= {name: spec_of(b) for name, b in module.named_buffers(remove_duplicate=False)}
    # A buffer of before may have been made in the first call, which was a copy's.
    before = {**parameters, **{name: spec for name, spec in buffers.items() if name in now}}
    for local in dict.fromkeys((*before, *now)):
        if before.get(local) != now.get(local):
            raise GraphError(
                f"{who} has changed since it was added: its {local!r} was {_spoken(before.get(local))} and is "
                f"{_spoken(now.get(local))}; add the layer after the change"
            )
    check_module(name, module)
    check_copyable(name, module)


def _spoken(spec: TensorSpec | None) -> str:
    if spec is None:
        return "not there"
    return f"{spec}, {'trained' if spec.requires_grad else 'frozen'}"


def spec_of(tensor: Tensor) -> TensorSpec:
    return TensorSpec(tuple(int(n) for n in tensor.shape), dtype_name(tensor.dtype), tensor.requires_grad)


def check_copyable(name: str, module: nn.Module) -> None:
    """Refuses a module that torch does not copy, since an attribute holds a result.

    Args:
        name: of the layer, for errors.
        module: as it was given.

    Raises:
        GraphError: names the attribute and the remedy.
    """
    for path, part in module.named_modules():
        for attribute, value in vars(part).items():
            if attribute in OF_EVERY_MODULE:
                continue
            if any(isinstance(held, Tensor) and held.grad_fn is not None for held in _held(value)):
                raise GraphError(
                    f"layer {name!r} ({type(module).__name__}) has a tensor in its attribute "
                    f"{f'{path}.{attribute}'.lstrip('.')!r} that was computed from others, so the module cannot be "
                    "copied: give pf.lazy(factory, ...); for torch.nn.utils.weight_norm there is also "
                    "torch.nn.utils.parametrizations.weight_norm"
                )


def _held(value: object, depth: int = 3) -> Iterator[object]:
    """A value, or what is in a container of values, and in containers in it."""
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if not isinstance(value, list | tuple | Set) or not depth:
        yield value
        return
    for inner in value:
        yield from _held(inner, depth - 1)


def _has_weights(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _hooks(module: nn.Module) -> Iterator[Callable[..., Any]]:
    for table in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        yield from getattr(module, table, {}).values()


def _closed_over(hook: Callable[..., Any]) -> str:
    """The class of a module or tensor in the closure of a hook; torch copies methods with their modules."""
    if not isinstance(hook, FunctionType):
        return ""
    for cell in hook.__closure__ or ():
        try:
            held = cell.cell_contents
        except ValueError:  # empty
            continue
        if isinstance(held, nn.Module | Tensor):
            return type(held).__name__
    return ""
