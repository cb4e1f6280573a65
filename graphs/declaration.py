"""What a user may say of one layer: constants of its call, and what a loss gives.

Looks at what was said and at what inference found, not at the graph.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pipeflow.errors import GraphError, ShapeError
from pipeflow.graphs.layer import Function, Instance, Lazy, Reduction, Source
from pipeflow.graphs.nesting import Leaf
from pipeflow.graphs.sizes import Dim, size_of

if TYPE_CHECKING:
    from pipeflow.graphs.inference import Inferred


def is_input_shape(shape: Sequence[Dim]) -> bool:
    """Whether an input may have the shape: "B" first or nowhere, then fixed sizes and names of lengths."""
    rest = [size_of(dim) for dim in (shape[1:] if shape[:1] == ("B",) else shape)]
    plain = all(not size.batch and (not size.terms or size.dim == size.terms[0][0]) for size in rest)
    return plain and (shape[:1] == ("B",) or any(size.terms for size in rest))


def check_loss(name: str, facts: Inferred) -> None:
    spec = facts.outputs[0]
    if not isinstance(facts.results, Leaf) or spec.shape != () or not spec.dtype.startswith(("float", "bfloat")):
        given = ", ".join(str(s) for s in facts.outputs)
        raise ShapeError(f"loss {name!r} gives {given}; it must give one number, float32 () for example")


def with_reduction(name: str, source: Source, reduction: Reduction, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The call's constants with `reduction` where the function takes it, so that both agree.

    Raises:
        GraphError: a module reduces otherwise.
    """
    if isinstance(source, Function):
        try:
            takes = "reduction" in inspect.signature(source.function).parameters
        except (TypeError, ValueError):
            takes = False
        return {**kwargs, "reduction": reduction} if takes else kwargs
    own = getattr(source.module, "reduction", None) if isinstance(source, Instance) else _argument(source, "reduction")
    if isinstance(own, str) and own != reduction:
        raise GraphError(
            f'loss {name!r}: its module has reduction="{own}" but the graph is told "{reduction}"; make them equal'
        )
    return kwargs


def _argument(lazy: Lazy, name: str) -> object:
    """What the factory of a recipe is given for an argument, its default included; None if it has none."""
    try:
        bound = inspect.signature(lazy.factory).bind(*lazy.args, **lazy.kwargs)
    except (TypeError, ValueError):
        return None
    bound.apply_defaults()
    return bound.arguments.get(name)
