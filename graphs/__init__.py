"""What the model is: layers, how they are joined, what each costs.

Importing this package loads neither torch nor anything else that takes time.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeflow.graphs.costs import GraphCosts, LayerCosts, TensorCosts
    from pipeflow.graphs.layer import Handle, Layer, lazy
    from pipeflow.graphs.layer_graph import LayerGraph
    from pipeflow.graphs.nesting import Constant
    from pipeflow.graphs.profiler import profile
    from pipeflow.graphs.sizes import Length
    from pipeflow.graphs.tensor_spec import TensorSpec

_MODULE_BY_NAME = {
    "Constant": "nesting",
    "GraphCosts": "costs",
    "Handle": "layer",
    "Layer": "layer",
    "LayerCosts": "costs",
    "LayerGraph": "layer_graph",
    "Length": "sizes",
    "TensorCosts": "costs",
    "TensorSpec": "tensor_spec",
    "lazy": "layer",
    "profile": "profiler",
}

__all__ = [
    "Constant",
    "GraphCosts",
    "Handle",
    "Layer",
    "LayerCosts",
    "LayerGraph",
    "Length",
    "TensorCosts",
    "TensorSpec",
    "lazy",
    "profile",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_BY_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_BY_NAME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
