"""Phases: training steps of one graph that lower some of its losses by some of its parameters.

A GAN is one graph with two: the discriminator's step and the generator's. A phase runs the layers
that its losses depend on; what it does not train is frozen while it runs, so that nothing has to
be detached by hand: backward goes as far as there is something to train, and no further.

    z ── generator ── fake ─┬─ discriminator ── loss_fake ┐
                            │  (the same weights)         ├─ phase "discriminator"
    real ───────────────────┼─ discriminator ── loss_real ┘
                            └─ discriminator ── loss_fool ─── phase "generator"

Knows names and specs; neither modules nor torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import networkx as nx

from pipeflow.errors import GraphError
from pipeflow.graphs.costs import PhaseCosts

if TYPE_CHECKING:
    from pipeflow.graphs.layer import Layer
    from pipeflow.graphs.layer_graph import LayerGraph
    from pipeflow.graphs.tensor_spec import TensorSpec


@dataclass(frozen=True, slots=True)
class Phase:
    """One kind of training step.

    Attributes:
        name: what `Engine.step` is told.
        losses: what it makes small.
        trains: patterns, as `fnmatch` reads them, over `<layer>.<parameter>`; a shared parameter
            goes by each of its names.
    """

    name: str
    losses: tuple[str, ...]
    trains: tuple[str, ...]


def check_phase(graph: LayerGraph, phase: Phase) -> None:
    """Refuses a phase that cannot be trained.

    Raises:
        GraphError: its name is taken, a loss is none or stands twice, a pattern fits no parameter
            that can be trained, or no parameter that it trains reaches one of its losses.
    """
    if not phase.name.isidentifier():
        raise GraphError(f"{phase.name!r} cannot name a phase; use letters, digits and _")
    if phase.name in graph.phases:
        raise GraphError(f"{phase.name!r} already names a phase of graph {graph.name!r}; names must be unique")
    if not phase.losses:
        raise GraphError(f"phase {phase.name!r} has no loss; name those that it makes small")
    for loss in phase.losses:
        if loss not in graph.losses or phase.losses.count(loss) > 1:
            raise GraphError(
                f"phase {phase.name!r}: {loss!r} is no loss of graph {graph.name!r}, or stands twice; it has "
                f"{', '.join(graph.losses) or 'none'}"
            )
    if not phase.trains:
        raise GraphError(f"phase {phase.name!r} trains nothing; give patterns over `<layer>.<parameter>`")
    names = [full for full, _, _ in _every_parameter(graph)]
    for pattern in phase.trains:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise GraphError(
                f"phase {phase.name!r} trains {pattern!r}, which fits no parameter; patterns are over "
                "`<layer>.<parameter>`, for example 'generator.*'"
            )
    narrow = narrowed(graph, phase)
    for loss in phase.losses:
        if not narrow.specs[loss].requires_grad:
            raise GraphError(
                f"phase {phase.name!r}: no parameter that it trains reaches its loss {loss!r}, so it cannot make it "
                "smaller; widen its patterns or leave the loss out"
            )


def _every_parameter(graph: LayerGraph) -> list[tuple[str, str, TensorSpec]]:
    """("<layer>.<name>", canonical name, spec) of every parameter, those of a shared group each."""
    canonical = {name: group[0] for group in graph.shared_parameters for name in group}
    return [
        (full, canonical.get(full, full), spec)
        for layer in graph.layers
        for local, spec in graph.layer_parameters(layer).items()
        for full in [f"{layer}.{local}"]
    ]


def trained_parameters(graph: LayerGraph, phase: Phase) -> frozenset[str]:
    """What the phase trains, as every name that a parameter goes by."""
    every = _every_parameter(graph)
    fitting = {
        canonical
        for full, canonical, spec in every
        if spec.requires_grad and any(fnmatchcase(full, pattern) for pattern in phase.trains)
    }
    return frozenset(full for full, canonical, _ in every if canonical in fitting)


def narrowed(graph: LayerGraph, phase: Phase) -> LayerGraph:
    """The graph as the phase sees it: the layers that its losses depend on, all else frozen."""
    needed = set(phase.losses).union(*(nx.ancestors(graph.nx, loss) for loss in phase.losses))
    return graph.narrowed(needed, trained_parameters(graph, phase))


def narrowed_specs(
    layers: Iterable[Layer], specs: Mapping[str, TensorSpec], learning: Iterable[str]
) -> Mapping[str, TensorSpec]:
    """Specs of tensors where only the layers of `learning` have something to train.

    A layer's output carries a gradient where it did, and the layer learns or reads one that does.
    """
    learns = set(learning)
    result = dict(specs)
    for layer in layers:
        live = layer.name in learns or any(result[t].requires_grad for t in layer.inputs)
        for tensor in layer.outputs:
            result[tensor] = result[tensor].with_gradient(live and specs[tensor].requires_grad)
    return result


def phase_costs(graph: LayerGraph) -> tuple[PhaseCosts, ...]:
    """What the planning side has to know of each phase."""
    return tuple(_costs(graph, phase, graph.in_phase(name)) for name, phase in graph.phases.items())


def _costs(graph: LayerGraph, phase: Phase, narrow: LayerGraph) -> PhaseCosts:
    trained = trained_parameters(graph, phase)
    learning = {name for name, layer in narrow.layers.items() if layer.has_backward}
    return PhaseCosts(
        name=phase.name,
        layers=tuple(narrow.layers),
        backward=tuple(name for name in narrow.layers if name in learning),
        gradients=tuple(t for t in narrow.specs if t in narrow.differentiable),
        parameter_bytes={n: size for n, size in narrow.bytes_by_layer(trained).items() if size},
        shared=tuple(s.name for s in graph.shared if s.name in trained and not learning.isdisjoint(s.layers)),
    )


def resolve_phase(phases: Mapping[str, Phase], name: str | None) -> str | None:
    """The phase itself, if a training step of the graph can be one of it.

    Raises:
        GraphError: the graph has phases and none is named, or it has not this one.
    """
    if name is None and phases:
        raise GraphError(f"this graph trains in phases; say which: phase={' or '.join(map(repr, phases))}")
    if name is not None and name not in phases:
        raise GraphError(f"the graph has no phase {name!r}; it has {_listed(list(phases))}")
    return name


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if names else "none: declare them with `graph.phase`"
