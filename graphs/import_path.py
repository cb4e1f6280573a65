"""Objects by import path, and which of them a file may name.

A file is data from elsewhere. What it names is found without importing or calling anything
outside the allowed prefixes, and is then checked again by what it is and where it was defined,
since attributes of an allowed module may lead anywhere (`torch.os.system`).

Allowed without asking, and nothing else of torch:

    torch.nn...                 module classes defined under torch.nn
    torch.nn.functional.NAME    its functions
    torch.NAME, torch.functional.NAME, torch.linalg.NAME, torch.fft.NAME, torch.special.NAME
                                functions of tensors
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any, Literal

import torch
from torch import nn

from pipeflow.errors import FormatError, GraphError

Role = Literal["function", "class", "factory"]
"""What a file names something for: to be called with tensors or handed to a module; a module
class to be handed to a module; or what builds a module."""

_PATH = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)+")
_PREFIX = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*")
_TENSOR_NAMESPACES = {"torch.linalg": "linalg_", "torch.fft": "fft_", "torch.special": "special_"}
_REFUSED = frozenset({"from_file", "frombuffer"})
"""Tensor functions that reach outside of tensors: files and foreign memory."""


def path_of(thing: Callable[..., Any]) -> str | None:
    """The import path under which `thing` is found again; None if there is none."""
    module, name = getattr(thing, "__module__", None), getattr(thing, "__name__", None)
    qualname = getattr(thing, "__qualname__", name)
    candidates = [f"torch.{name}", f"torch.nn.functional.{name}"]
    for namespace, prefix in _TENSOR_NAMESPACES.items():
        candidates.append(f"{namespace}.{str(name).removeprefix(prefix)}")
    # Tensor functions are compiled ones without a module of their own, or thin wrappers of them.
    paths = candidates if str(module).partition(".")[0] == "torch" else []
    paths = [*paths, f"{module}.{qualname}", f"{module}.{name}"]
    if isinstance(thing, type):
        paths = [f"{module}.{qualname}"]
    return next((p for p in paths if _PATH.fullmatch(p) and _loaded(p) is thing), None)


def _loaded(path: str) -> object:
    """What the path names among the modules already loaded; None if nothing."""
    parts = path.split(".")
    for split in range(len(parts) - 1, 0, -1):
        value: object = sys.modules.get(".".join(parts[:split]))
        if value is not None:
            for part in parts[split:]:
                value = getattr(value, part, None)
            return value
    return None


def check_prefixes(allow: Sequence[str]) -> None:
    """Refuses prefixes that are no import paths.

    Raises:
        GraphError: one of them is not.
    """
    if isinstance(allow, str):
        raise GraphError(f"allow={allow!r} is text; give a tuple of import prefixes, for example ({allow!r},)")
    for prefix in allow:
        if not _PREFIX.fullmatch(prefix):
            raise GraphError(f"{prefix!r} in allow is no import prefix; write for example 'mymodels.blocks'")


def resolve(path: str, allow: Sequence[str], *, role: Role) -> Callable[..., Any]:
    """The module class or function that a file names.

    Args:
        path: its import path.
        allow: prefixes, whole components, trusted besides torch's own. Of torch itself they add
            module classes only, and "torch" and "torch.nn" add nothing.
        role: what it is for.

    Raises:
        FormatError: the path is not allowed, leads nowhere, or to something that is neither.
    """
    if not _PATH.fullmatch(path):
        raise FormatError(f"{path!r} is no import path; write for example torch.nn.Linear")
    trusted = [prefix for prefix in allow if prefix not in ("torch", "torch.nn")]
    found = _torch_object(path)
    if found is None and any(_within(path, prefix) for prefix in trusted):
        found = _trusted_object(path, trusted)
        if _within(path, "torch") and not isinstance(found, type):
            found = None
    if found is None:
        raise FormatError(
            f"{path!r} may not be used by a file: files name layers of torch.nn, tensor functions of torch, and what "
            f"is defined where the reader allows it ({', '.join(allow) or 'nowhere else'}); if you trust it, load "
            f"with allow=({path.rpartition('.')[0]!r},)"
        )
    is_class = isinstance(found, type)
    if isinstance(found, type) and not issubclass(found, nn.Module):
        raise FormatError(f"{path!r} is a class, but no nn.Module; a file may only build modules")
    if role == "function" and is_class:
        raise FormatError(f"{path!r} is a module class where a function is due; write it under 'lazy' or 'class'")
    if role == "class" and not is_class:
        raise FormatError(f"{path!r} is a function where a module class is due; write it under 'function'")
    if role == "factory" and not is_class and _within(path, "torch"):
        raise FormatError(f"{path!r} is a function, which builds no module; write it under 'function'")
    return found  # type: ignore[return-value]


def _within(path: str, prefix: str) -> bool:
    return path == prefix or path.startswith(prefix + ".")


def _torch_object(path: str) -> object | None:
    """A layer or tensor function of torch; None for everything else that torch holds."""
    namespace, _, name = path.rpartition(".")
    if name.startswith("_") or name in _REFUSED:
        return None
    if namespace in ("torch", "torch.functional"):
        found: object = getattr(torch.functional if name in torch.functional.__all__ else torch, name, None)
        return found if name in torch.functional.__all__ or (namespace == "torch" and _is_kernel(found)) else None
    if namespace == "torch.nn.functional":
        return _functional(name)
    if namespace in _TENSOR_NAMESPACES:
        function: object = getattr(sys.modules[namespace], name, None)
        own = getattr(function, "__name__", "").startswith(_TENSOR_NAMESPACES[namespace])
        return function if isinstance(function, BuiltinFunctionType) and own else None
    if not _within(namespace, "torch.nn"):
        return None
    holder = sys.modules.get(namespace)  # never imported: what torch.nn consists of is loaded already
    layer: object = getattr(holder, name, None)
    is_layer = isinstance(layer, type) and issubclass(layer, nn.Module) and _within(layer.__module__, "torch.nn")
    return layer if is_layer else None


def _functional(name: str) -> object | None:
    """A function of torch.nn.functional that is defined there, or one of the kernels it exposes."""
    function: object = getattr(nn.functional, name, None)
    if isinstance(function, FunctionType) and function.__module__ == "torch.nn.functional":
        return function
    return function if _is_kernel(function) else None


def _is_kernel(function: object) -> bool:
    """Whether it is one of torch's compiled functions of tensors."""
    if not isinstance(function, BuiltinFunctionType):
        return False
    name = function.__name__
    return any(getattr(k, name, None) == function for k in (torch._C._VariableFunctions, torch._C._nn))


def _trusted_object(path: str, allow: Sequence[str]) -> object | None:
    """What an allowed path names, if it is defined within the allowed prefixes itself."""
    parts = path.split(".")
    if any(part.startswith("__") for part in parts[1:]):
        return None
    module, rest = _import(parts, allow)
    value: object = module
    for part in rest:
        value = getattr(value, part, None)
        if isinstance(value, ModuleType):
            return None  # a module that is not part of the path's own package
    if not isinstance(value, type | FunctionType | BuiltinFunctionType):  # an instance could do anything
        return None
    home = f"{value.__module__}.{value.__qualname__}"
    return value if any(_within(home, prefix) for prefix in allow) else None


def _import(parts: Sequence[str], allow: Sequence[str]) -> tuple[ModuleType | None, Sequence[str]]:
    """The longest part of the path that is a module, and what is left of it."""
    for split in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:split])
        # A prefix may be a single object; the modules above it are then part of what is trusted.
        if not any(_within(name, prefix) or _within(prefix, name) for prefix in allow):
            return None, ()
        try:
            return import_module(name), parts[split:]
        except ModuleNotFoundError as error:
            if error.name is None or not _within(name, error.name):
                raise FormatError(f"{name!r} cannot be imported: {error}") from error
        except Exception as error:
            raise FormatError(f"{name!r} cannot be imported: {type(error).__name__}: {error}") from error
    return None, ()
