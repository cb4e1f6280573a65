"""The lengths of one graph: those that its inputs name, and those that its layers make of them.

A layer's size that follows no simple rule is a length of its own. Its number is found by running
that layer without data at the lengths at hand, once for each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from pipeflow.errors import GraphError
from pipeflow.graphs.layer import Layer
from pipeflow.graphs.sizes import Dim, Length, size_of
from pipeflow.graphs.tensor_spec import TensorSpec
from pipeflow.graphs.trials import BATCH_SIZES, FIXED_LENGTHS, Trial, choose_trials

_REMEMBERED = 4096  # sets of lengths whose sizes are kept; then all are forgotten


@dataclass(frozen=True, slots=True)
class _Made:
    """A length that a layer makes: one size of one of its outputs."""

    layer: Layer
    inputs: tuple[TensorSpec, ...]
    output: int
    dim: int
    per_sample: bool


class Lengths:
    """The lengths of a graph, filled while it is described."""

    def __init__(self) -> None:
        self._given: dict[str, Length] = {}
        self._made: dict[str, _Made] = {}
        self._completed: dict[tuple[tuple[str, int], ...], Mapping[str, int]] = {}

    @property
    def given(self) -> Mapping[str, Length]:
        """Those that inputs name."""
        return MappingProxyType(self._given)

    def declare(self, name: str, shape: Sequence[Dim | Length]) -> None:
        """Takes the lengths that the shape of input `name` names.

        Raises:
            GraphError: one is known with other limits.
        """
        for dim in shape:
            if isinstance(dim, int) or dim == "B":
                continue
            known = self._given.get(dim.name if isinstance(dim, Length) else dim)
            length = dim if isinstance(dim, Length) else known or Length(dim)
            if known not in (None, length, Length(length.name)):
                raise GraphError(
                    f"input {name!r} says that the length {length.name!r} is {length}, and another input {known}; say "
                    "it once, and give its name elsewhere"
                )
            self._given[length.name] = length

    def trials(self, inputs: Iterable[TensorSpec]) -> tuple[Trial, ...]:
        """What to try a layer with that reads such tensors."""
        names = frozenset().union(*(spec.lengths for spec in inputs))
        if not names:
            return FIXED_LENGTHS
        bases = self._bases(names)
        trials = choose_trials(length for name, length in self._given.items() if name in bases)
        wanted = [*(n for n in self._given if n in bases), *(n for n in self._made if n in names)]
        completed = [self._complete(dict(trial.lengths), wanted) for trial in trials]
        return tuple(
            replace(trial, lengths=tuple((n, sizes[n]) for n in wanted))
            for trial, sizes in zip(trials, completed, strict=True)
        )

    def _bases(self, names: Iterable[str]) -> frozenset[str]:
        """The given lengths that some lengths come from."""
        found: set[str] = set()
        pending = list(names)
        while pending:
            name = pending.pop()
            if name in self._made:
                pending += [n for spec in self._made[name].inputs for n in spec.lengths]
            else:
                found.add(name)
        return frozenset(found)

    def name_sizes(
        self, layer: Layer, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
    ) -> tuple[TensorSpec, ...]:
        """The outputs' specs, with the lengths that the layer makes kept under names of their own."""
        named = []
        for index, (tensor, spec) in enumerate(zip(layer.outputs, outputs, strict=True)):
            dims = list(spec.shape)
            for dim, written in enumerate(dims):
                if isinstance(written, str) and (mark := f"<{index}.{dim}>") in written:
                    name = f"<{tensor}.{dim}>"
                    dims[dim] = written.replace(mark, name)
                    self._made[name] = _Made(layer, tuple(inputs), index, dim, size_of(written).batch)
            named.append(replace(spec, shape=tuple(dims)))
        return tuple(named)

    def complete(self, lengths: Mapping[str, int]) -> Mapping[str, int]:
        """The given lengths with all that layers make of them; of those alone that can be known."""
        if not self._made:
            return lengths
        key = tuple(sorted(lengths.items()))
        if key not in self._completed:
            if len(self._completed) >= _REMEMBERED:
                self._completed.clear()
            known = [name for name in self._made if self._bases([name]) <= lengths.keys()]
            self._completed[key] = self._complete(lengths, known)
        return self._completed[key]

    def _complete(self, lengths: Mapping[str, int], wanted: Iterable[str]) -> Mapping[str, int]:
        sizes = dict(lengths)
        for name in wanted:
            self._find(name, sizes)
        return MappingProxyType(sizes)

    def _find(self, name: str, sizes: dict[str, int]) -> None:
        """Puts the size into `sizes`, after those that it is made of."""
        if name in sizes:
            return
        from pipeflow.graphs.inference import run_shapes

        made = self._made[name]
        needed = sorted(frozenset().union(*(spec.lengths for spec in made.inputs)))
        for other in needed:
            self._find(other, sizes)
        trial = Trial(BATCH_SIZES[0], tuple((other, sizes[other]) for other in needed))
        layer = made.layer
        size = run_shapes(layer.name, layer.source, made.inputs, layer.template, trial)[made.output][made.dim]
        sizes[name] = size // trial.samples if made.per_sample else size
