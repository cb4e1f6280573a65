"""What differs between the phases of a training: an optimizer and a scheduler for each.

A graph without phases has one, named None here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pipeflow.errors import EngineError, GraphError
from pipeflow.graphs.layer_graph import LayerGraph
from pipeflow.graphs.phase import resolve_phase
from pipeflow.runtime.options import check_factory


def for_each_phase(graph: LayerGraph, given: Any, what: str) -> Mapping[str | None, Callable[..., Any]]:
    """A factory for each phase of the graph; empty where none was given.

    Args:
        given: one factory for all, a mapping by phase, or None.
        what: the name of the option, for errors.

    Raises:
        EngineError: a mapping lacks a phase of the graph or has one more; or what is given makes nothing.
    """
    if given is None:
        return {}
    names: tuple[str | None, ...] = tuple(graph.phases) or (None,)
    if not isinstance(given, Mapping):
        check_factory(given, what)
        return dict.fromkeys(names, given)
    if set(given) != set(names):
        phases = ", ".join(map(repr, graph.phases)) or "none: give one factory"
        raise EngineError(
            f"{what} is for {', '.join(map(repr, given))}; give one for each phase of the graph: {phases}"
        )
    for factory in given.values():
        if factory is not None or what == "optimizer":  # a phase may have no scheduler
            check_factory(factory, what)
    return dict(given)


class OpenPhase:
    """Whose gradients wait for a step: `accumulate` opens a phase, `step` closes it.

    Args:
        graph: tells which phases there are.
    """

    def __init__(self, graph: LayerGraph) -> None:
        self._phases = graph.phases
        self._waiting: tuple[str | None] | None = None

    def check(self, phase: str | None) -> None:
        """Whether a training call of this phase may come now.

        Raises:
            EngineError: no phase, or not this one, or another's gradients wait for their step.
        """
        self.check_name(phase)
        if self._waiting not in (None, (phase,)):
            assert self._waiting is not None
            raise EngineError(
                f"gradients of phase {self._waiting[0]!r} wait for their step; take it before one of phase {phase!r}"
            )

    def check_name(self, phase: str | None) -> None:
        """Whether there is this phase. Raises EngineError."""
        try:
            resolve_phase(self._phases, phase)
        except GraphError as error:
            raise EngineError(str(error)) from None

    def accumulated(self, phase: str | None) -> None:
        """Gradients of the phase wait now."""
        self._waiting = (phase,)

    def stepped(self) -> None:
        """None wait now."""
        self._waiting = None
