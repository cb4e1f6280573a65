"""Hypothesis strategies for how a model is trained: the options that engine and reference share.

Each feature of training draws itself here, off more often than on, so that the laws see every
feature alone and together with others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from pipeflow.errors import ShapeError
from pipeflow.graphs.layer_graph import LayerGraph
from pipeflow.graphs.retyping import retyped
from pipeflow.runtime.precision import LossScale, Precision


@st.composite
def training_options(draw: st.DrawFn, graph: LayerGraph) -> dict[str, Any]:
    """Keyword options that `pipeflow.Engine` and `pipeflow.Reference` both take.

    Args:
        graph: the model to be trained by them.
    """
    options: dict[str, Any] = {}
    for feature in _FEATURES:
        if draw(st.integers(0, 3)) == 3:
            options |= feature(draw, graph)
    if options.get("nonfinite") == "raise" and "precision" in options and options["precision"].loss_scale:
        options["nonfinite"] = "skip"
    return options


def _clip_norm(draw: st.DrawFn, graph: LayerGraph) -> dict[str, Any]:
    return {"clip_norm": draw(st.sampled_from([1e-3, 0.5, 1e3]))}


def _clip_value(draw: st.DrawFn, graph: LayerGraph) -> dict[str, Any]:
    return {"clip_value": draw(st.sampled_from([1e-3, 0.5]))}


def _nonfinite(draw: st.DrawFn, graph: LayerGraph) -> dict[str, Any]:
    return {"nonfinite": draw(st.sampled_from(["raise", "skip"]))}


def _parameter_groups(draw: st.DrawFn, graph: LayerGraph) -> dict[str, Any]:
    names = draw(st.lists(st.sampled_from(sorted(graph.parameters)), max_size=2, unique=True))
    rates = st.sampled_from([{"lr": 0.0}, {"lr": 1e-2}, {"weight_decay": 0.1}, {"momentum": 0.0}])
    return {"parameter_groups": {name: draw(rates) for name in names}}


@st.composite
def precisions(draw: st.DrawFn, graph: LayerGraph) -> Precision:
    """Half types where the model is in float32 and runs in them; else a scale of losses at most."""
    choices: dict[str, Any] = {}
    if all(spec.dtype == "float32" for spec in graph.parameters.values()):
        half = draw(st.sampled_from(["bfloat16", "float16"]))
        choices = {name: half for name in ("autocast", "parameters") if draw(st.booleans())}
        if "parameters" in choices:
            choices["accumulate"] = draw(st.sampled_from(["float32", "parameters"]))
        try:
            retyped(graph, Precision(**choices).numerics("cpu"))
        except ShapeError:  # some of torch's layers do not run in every type
            choices = {}
    if draw(st.booleans()):
        choices["loss_scale"] = LossScale(initial=draw(st.sampled_from([3.0, 1024.0, 2.0**40])), growth_interval=1)
    return Precision(**choices)


def _precision(draw: st.DrawFn, graph: LayerGraph) -> dict[str, Any]:
    return {"precision": draw(precisions(graph))}


def _deferred_batch_norm(draw: st.DrawFn, graph: LayerGraph) -> dict[str, Any]:
    return {"batch_norm": "deferred"}


_FEATURES: tuple[Callable[[st.DrawFn, LayerGraph], dict[str, Any]], ...] = (
    _clip_norm,
    _clip_value,
    _nonfinite,
    _parameter_groups,
    _precision,
    _deferred_batch_norm,
)
