"""pipeflow: cuts any layer graph over the devices there are, proves the plan, and trains it.

The names below are the public face. They load on first use, so that planning never pays for
torch, and `import pipeflow` for nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeflow import testing
    from pipeflow.engine import Engine
    from pipeflow.execution_plan import Plan
    from pipeflow.graphs import Constant, GraphCosts, LayerGraph, Length, TensorSpec, lazy, profile
    from pipeflow.lowering import lower
    from pipeflow.partitioners import PARTITIONERS
    from pipeflow.partitioners.cluster import Cluster, Device, Level, Link
    from pipeflow.partitioners.partition import Certificate, Mesh, Partition, Stage
    from pipeflow.partitioners.pins import Pin, Pins
    from pipeflow.partitioners.problem import PartitionProblem
    from pipeflow.partitioning import partition
    from pipeflow.planner import plan
    from pipeflow.recipe import Recipe
    from pipeflow.runtime.precision import LossScale, Precision
    from pipeflow.runtime.reference import Reference
    from pipeflow.runtime.result import StepResult
    from pipeflow.schedules import SCHEDULES
    from pipeflow.simulator import Timeline, simulate
    from pipeflow.verifier import Proof, verify

__version__ = "0.1.0"

_HOME = {
    "Certificate": "pipeflow.partitioners.partition",
    "Cluster": "pipeflow.partitioners.cluster",
    "Device": "pipeflow.partitioners.cluster",
    "Constant": "pipeflow.graphs",
    "Engine": "pipeflow.engine",
    "GraphCosts": "pipeflow.graphs",
    "LayerGraph": "pipeflow.graphs",
    "Length": "pipeflow.graphs",
    "Level": "pipeflow.partitioners.cluster",
    "Link": "pipeflow.partitioners.cluster",
    "LossScale": "pipeflow.runtime.precision",
    "Mesh": "pipeflow.partitioners.partition",
    "PARTITIONERS": "pipeflow.partitioners",
    "Partition": "pipeflow.partitioners.partition",
    "PartitionProblem": "pipeflow.partitioners.problem",
    "Pin": "pipeflow.partitioners.pins",
    "Pins": "pipeflow.partitioners.pins",
    "Plan": "pipeflow.execution_plan",
    "Precision": "pipeflow.runtime.precision",
    "Proof": "pipeflow.verifier",
    "Recipe": "pipeflow.recipe",
    "Reference": "pipeflow.runtime.reference",
    "SCHEDULES": "pipeflow.schedules",
    "Stage": "pipeflow.partitioners.partition",
    "StepResult": "pipeflow.runtime.result",
    "TensorSpec": "pipeflow.graphs",
    "Timeline": "pipeflow.simulator",
    "lazy": "pipeflow.graphs",
    "lower": "pipeflow.lowering",
    "partition": "pipeflow.partitioning",
    "plan": "pipeflow.planner",
    "profile": "pipeflow.graphs",
    "simulate": "pipeflow.simulator",
    "testing": "pipeflow",
    "verify": "pipeflow.verifier",
}

__all__ = [
    "PARTITIONERS",
    "SCHEDULES",
    "Certificate",
    "Cluster",
    "Constant",
    "Device",
    "Engine",
    "GraphCosts",
    "LayerGraph",
    "Length",
    "Level",
    "Link",
    "LossScale",
    "Mesh",
    "Partition",
    "PartitionProblem",
    "Pin",
    "Pins",
    "Plan",
    "Precision",
    "Proof",
    "Recipe",
    "Reference",
    "Stage",
    "StepResult",
    "TensorSpec",
    "Timeline",
    "__version__",
    "lazy",
    "lower",
    "partition",
    "plan",
    "profile",
    "simulate",
    "testing",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'pipeflow' has no attribute {name!r}")
    if name == "testing":
        value: Any = importlib.import_module("pipeflow.testing")
    else:
        value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
