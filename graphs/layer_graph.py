"""The model as a graph of layers, declared one line at a time.

Decides names, joins layers and keeps what inference finds. Layers are checked where they are
added, so an error points at the line that caused it. A layer can only read what stands before
it: a graph built with `add` has no cycle. torch is loaded when the first layer is added.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import networkx as nx

from pipeflow.errors import GraphError
from pipeflow.graphs import declaration, structure
from pipeflow.graphs.costs import SharedTensor
from pipeflow.graphs.layer import Handle, Instance, Layer, Reduction, Source, kind_of, source_of
from pipeflow.graphs.lengths import Lengths
from pipeflow.graphs.nesting import Nest, rebuild
from pipeflow.graphs.sizes import Dim, Length
from pipeflow.graphs.tensor_spec import TensorSpec, normalise_dtype

if TYPE_CHECKING:
    from torch import Tensor

    from pipeflow.graphs.batch import Extent
    from pipeflow.graphs.inference import Inferred
    from pipeflow.graphs.phase import Phase

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.\-/]*")


class LayerGraph:
    """Layers, what they read and what they give.

    >>> from torch import nn
    >>> import torch.nn.functional as F
    >>> graph = LayerGraph("tiny")
    >>> x = graph.input("x", ("B", 8))
    >>> label = graph.input("label", ("B",), dtype="int64")
    >>> hidden = graph.add("hidden", nn.Linear(8, 16), x)
    >>> logits = graph.add("logits", nn.Linear(16, 3), hidden)
    >>> loss = graph.loss("loss", F.cross_entropy, logits, label)
    >>> print(logits.spec)
    float32 (B, 3)

    Args:
        name: for people and for files.

    Raises:
        GraphError: the name is no text.
    """

    def __init__(self, name: str = "graph") -> None:
        if not isinstance(name, str):
            raise GraphError(f"LayerGraph({name!r}): the name of a graph is text; leave it out, or give some")
        self.name = name
        self._inputs: dict[str, TensorSpec] = {}
        self._layers: dict[str, Layer] = {}
        self._specs: dict[str, TensorSpec] = {}
        self._facts: dict[str, Inferred] = {}
        self._owner_by_name: dict[str, str] = {}
        self._lengths = Lengths()
        self._phases: dict[str, Phase] = {}

    # -- declaring ---------------------------------------------------------------------------

    def input(self, name: str, shape: Sequence[Dim | Length], dtype: object = "float32") -> Handle:
        """A tensor that every batch brings.

        Args:
            name: its key in the batch.
            shape: its sizes. The first is "B", the batch, which is cut along it. Others are fixed, or
                the name of a length that differs between batches ("time"; `pf.Length` where not every
                size will do), the same for all inputs that name it. An input whose first size is
                another cannot be cut: batches then come as lists of micro-batches.
            dtype: a torch dtype or its name.

        Raises:
            GraphError: the name is taken or malformed, or the shape has neither batch nor length.
        """
        self._check_name(name)
        if isinstance(shape, str) or not isinstance(shape, Sequence):
            raise GraphError(f'input {name!r} has the shape {shape!r}; give a tuple of sizes, for example ("B", 8)')
        dims = [dim.name if isinstance(dim, Length) else dim for dim in shape]
        spec = TensorSpec(tuple(dims), normalise_dtype(dtype))
        if not declaration.is_input_shape(spec.shape):
            raise GraphError(
                f'input {name!r} has the shape {tuple(map(str, shape))}; the first size must be "B", the batch, and '
                'the others fixed or names of lengths such as "time", since batches are cut along the first'
            )
        self._lengths.declare(name, shape)
        self._changed()
        self._inputs[name] = self._specs[name] = spec
        return Handle(name, spec, self)

    def add(
        self, name: str, layer: object, /, *args: Any, **kwargs: Any
    ) -> Any:  # a Handle, or a structure of them: mypy users annotate what they expect
        """A layer that is called with `args` and `kwargs`, the tensors in the place of their handles.

        >>> from torch import nn
        >>> graph = LayerGraph("recurrent")
        >>> out, (h, c) = graph.add("first", nn.LSTM(8, 8, batch_first=True), graph.input("x", ("B", 5, 8)))
        >>> out.name, h.name
        ('first:0', 'first:1.0')

        Args:
            name: of the layer, and of its output; of several, `name:` and the way to each: `name:0`,
                `name:hidden`, `name:states.1`.
            layer: a module, `pf.lazy(...)`, or a function of tensors.
            args, kwargs: handles, of which there is at least one, and constants, also in tuples,
                lists, dicts and named tuples. Text by position is the name of a tensor; a constant
                that is text goes by keyword, or as `pf.Constant(...)`.

        Returns:
            What the layer gives, with handles in the place of tensors; None and other constants
            among them as they are.

        Raises:
            GraphError: the name is taken, an input is unknown, the layer is not one, an argument is
                a tensor of no graph, or a result is neither a tensor nor a constant.
            ShapeError: the layer does not take those shapes or dtypes.
        """
        names, nest = self._add(name, layer, args, kwargs)
        return rebuild(nest, [Handle(tensor, self._specs[tensor], self) for tensor in names])

    def loss(
        self,
        name: str,
        function: object,
        /,
        *args: Any,
        weight: float = 1.0,
        reduction: Reduction = "mean",
        count: Handle | str | None = None,
        **kwargs: Any,
    ) -> Handle:
        """A layer whose scalar output training makes small.

        A mean is taken to count every sample alike. One that does not (sample weights, padded
        tokens) is not the mean over the micro-batches' means: `count` names the input that holds
        the weights, and the batch's loss is then the mean over all of them. torch's cross-entropy of
        labels that are an input needs no `count`: what its labels count, ignored ones and weights of
        classes considered, is seen.

        Args:
            name, function, args, kwargs: as for `add`.
            weight: of this loss in the sum of all.
            reduction: how `function` makes one number of many samples: "mean" or "sum". It is
                passed on where `function` has an option of that name.
            count: an input of the graph of numbers of at least 0, any shape: sample weights or a
                padding mask. `function` gives the mean weighted by them over the samples it
                sees; a micro-batch in which they are all 0 does not count.

        Raises:
            GraphError: as for `add`; or `function` is known to reduce otherwise, or to weigh labels in
                a way that cannot be told from outside.
            ShapeError: as for `add`; or the output is not one floating-point number.
        """
        if reduction not in ("mean", "sum"):
            raise GraphError(f'loss {name!r}: reduction is {reduction!r}; it is "mean" or "sum" over samples')
        if not math.isfinite(weight):
            raise GraphError(f"loss {name!r}: its weight is {weight}; give a finite number")
        counted = self._count_input(name, count, reduction)
        source = source_of(name, function)
        kwargs = declaration.with_reduction(name, source, reduction, kwargs)
        names, _ = self._add(
            name, source, args, kwargs, is_loss=True, weight=float(weight), reduction=reduction, count=counted
        )
        return Handle(names[0], self._specs[names[0]], self)

    def phase(self, name: str, *, losses: Sequence[Handle | str], trains: Sequence[str]) -> None:
        """A kind of training step, where a model has several: a GAN's two, a head on its own.

        A graph with phases is trained by `Engine.step(batch, phase=name)`, with an optimizer for
        each. A step runs the layers that its losses depend on and freezes what it does not train.

        Args:
            name: an identifier.
            losses: what it makes small.
            trains: patterns, as `fnmatch` reads them, over `<layer>.<parameter>`; a shared
                parameter goes by each of its names.

        Raises:
            GraphError: it could train nothing; see `pipeflow.graphs.phase.check_phase`.
        """
        from pipeflow.graphs.phase import Phase, check_phase

        if isinstance(losses, str | Handle) or isinstance(trains, str):
            raise GraphError(f"phase {name!r}: losses and trains are sequences; write losses=[...], trains=[...]")
        phase = Phase(name, tuple(h.name if isinstance(h, Handle) else h for h in losses), tuple(trains))
        check_phase(self, phase)
        self._changed()
        self._phases[name] = phase

    def _count_input(self, name: str, count: Handle | str | None, reduction: Reduction) -> str | None:
        if count is None:
            return None
        tensor = self._resolve(name, count)
        if tensor not in self._inputs:
            raise GraphError(
                f"loss {name!r}: count={tensor!r} is computed by a layer; it must be an input of the graph, since the "
                "batch's total has to be known before the first micro-batch is done"
            )
        if reduction != "mean":
            raise GraphError(f'loss {name!r} has both count and reduction={reduction!r}; counts are for a "mean"')
        return tensor

    def _add(
        self,
        name: str,
        thing: object,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        *,
        is_loss: bool = False,
        weight: float = 1.0,
        reduction: Reduction = "mean",
        count: str | None = None,
    ) -> tuple[tuple[str, ...], Nest]:
        from pipeflow.graphs import calling
        from pipeflow.graphs.inference import infer
        from pipeflow.graphs.label_means import counted_labels

        self._check_name(name)
        source = thing if isinstance(thing, Source) else source_of(name, thing)
        reads, arguments = calling.read_arguments(name, args, kwargs, lambda handle: self._resolve(name, handle))
        given = [self._specs[t] for t in reads]
        facts = infer(name, source, given, arguments, self._lengths.trials(given))
        if is_loss:
            declaration.check_loss(name, facts)
        outputs = calling.output_names(name, facts.results)
        constants = calling.plain_kwargs(arguments)
        owned = {f"{name}.{local}": name for local in (*facts.parameters, *facts.buffers)}
        if clash := [full for full in owned if full in self._owner_by_name]:
            raise GraphError(
                f"layer {name!r} and layer {self._owner_by_name[clash[0]]!r} both have a parameter or buffer "
                f"{clash[0]!r}; rename one layer"
            )
        labels, barred = None, None
        if is_loss and reduction == "mean" and count is None:
            labels, barred = counted_labels(name, facts, reads, self._inputs)
        self._changed()
        self._owner_by_name.update(owned)
        self._facts[name] = facts
        self._layers[name] = Layer(
            name=name,
            source=source,
            inputs=reads,
            kwargs=MappingProxyType(constants or {}),
            arguments=arguments if constants is None else None,
            outputs=outputs,
            kind=kind_of(source),
            is_loss=is_loss,
            weight=weight,
            reduction=reduction,
            count=count,
            labels=labels,
            barred_label=barred,
            is_random=facts.is_random,
            mutated_buffers=facts.mutated_buffers,
            norm_calls=facts.norm_calls,
            decoding=facts.decoding,
            strided_outputs=facts.strided_outputs,
            strided_gradients=facts.strided_gradients,
            withholds=facts.withholds,
            results=None if calling.is_plain_result(facts.results) else facts.results,
        )
        specs = self._lengths.name_sizes(self._layers[name], given, facts.outputs)
        self._specs.update(zip(outputs, specs, strict=True))
        return outputs, facts.results

    def _check_name(self, name: str) -> None:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise GraphError(
                f"{name!r} cannot name a layer or an input; use letters, digits and _ . - / after a letter or _"
            )
        if name in self._layers or name in self._inputs:
            what = "a layer" if name in self._layers else "an input"
            raise GraphError(f"{name!r} already names {what} of graph {self.name!r}; names must be unique")

    def _resolve(self, name: str, handle: Handle | str) -> str:
        if isinstance(handle, Handle):
            if handle.graph is not self:
                raise GraphError(f"layer {name!r} reads {handle.name!r} of another graph; use this graph's own tensors")
            handle = handle.name
        if not isinstance(handle, str):
            raise GraphError(
                f"layer {name!r} reads {handle!r}; inputs are handles that `input` and `add` returned, or their names"
            )
        if handle not in self._specs:
            several = self._layers.get(handle)
            hint = "; add what gives it first. Text that is a constant goes by keyword, or as pf.Constant(...)"
            hint = f"; it gives {', '.join(several.outputs)}" if several else hint
            raise GraphError(f"layer {name!r} reads {handle!r}, which no input and no earlier layer gives{hint}")
        if handle in self._layers and self._layers[handle].is_loss:
            raise GraphError(f"layer {name!r} reads the loss {handle!r}; losses are ends: weigh and add them instead")
        return handle

    def _changed(self) -> None:
        for name, value in vars(type(self)).items():
            if isinstance(value, cached_property):
                self.__dict__.pop(name, None)

    # -- reading -----------------------------------------------------------------------------

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        """What a batch brings, by name."""
        return MappingProxyType(self._inputs)

    @cached_property
    def layers(self) -> Mapping[str, Layer]:
        """All layers, in the order in which one device runs them."""
        carries = self.differentiable
        return MappingProxyType(
            {
                name: replace(layer, has_backward=not carries.isdisjoint(layer.outputs))
                for name, layer in self._layers.items()
            }
        )

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Every tensor by name, inputs included."""
        return MappingProxyType(self._specs)

    @property
    def lengths(self) -> Mapping[str, Length]:
        """The lengths that differ between batches, by name."""
        return self._lengths.given

    def sizes_at(self, lengths: Mapping[str, int]) -> Mapping[str, int]:
        """The lengths of a batch with those that layers make of them; found once for each.

        Raises:
            ShapeError: a layer does not take such a length.
        """
        return self._lengths.complete(lengths)

    @cached_property
    def example_lengths(self) -> Mapping[str, int]:
        """Some size for every length, those that layers make included: for examples and estimates."""
        return self.sizes_at({name: length.trials()[-1] for name, length in self.lengths.items()})

    @property
    def losses(self) -> tuple[str, ...]:
        """Names of the loss layers."""
        return tuple(name for name, layer in self._layers.items() if layer.is_loss)

    @property
    def phases(self) -> Mapping[str, Phase]:
        """The kinds of training steps, by name; none where every step trains everything."""
        return MappingProxyType(self._phases)

    @cached_property
    def _obstacle_by_question(self) -> dict[tuple[str, str], str]:
        return {}

    def obstacle(self, name: str, length: str) -> str:
        """Why a layer cannot be run a few steps of a length at a time; "" where nothing is known against it.

        A layer that does not keep what it needs of earlier steps is tried on random numbers
        (`pipeflow.graphs.stepwise`), once: that builds it, on the CPU.
        """
        from pipeflow.graphs.stepwise import is_known, obstacle_of

        layer = self._layers[name]
        if layer.decoding.obstacle or layer.decoding.keeps_state or is_known(layer.source):
            return layer.decoding.obstacle
        if (name, length) not in self._obstacle_by_question:
            others = {other: given.trials()[0] for other, given in self.lengths.items()}
            self._obstacle_by_question[name, length] = obstacle_of(
                layer,
                self.build([name])[name],
                self._specs,
                self.lengths[length],
                lambda size: self.sizes_at({**others, length: size}),
            )
        return self._obstacle_by_question[name, length]

    @cached_property
    def _narrowed_by_phase(self) -> dict[str, LayerGraph]:
        return {}

    def in_phase(self, name: str) -> LayerGraph:
        """The graph as a phase sees it: the layers that run, with gradients where it trains.

        Raises:
            GraphError: there is no such phase.
        """
        from pipeflow.graphs.phase import narrowed, resolve_phase

        resolve_phase(self._phases, name)
        if name not in self._narrowed_by_phase:
            self._narrowed_by_phase[name] = narrowed(self, self._phases[name])
        return self._narrowed_by_phase[name]

    def narrowed(self, layers: Collection[str], trained: Collection[str]) -> LayerGraph:
        """Some of the layers, with only some of the parameters to train.

        Args:
            layers: names; with each, all that it depends on.
            trained: "<layer>.<parameter>".
        """
        from pipeflow.graphs.phase import narrowed_specs

        graph = LayerGraph(self.name)
        graph._lengths = self._lengths
        graph._layers = {name: layer for name, layer in self._layers.items() if name in layers}
        graph._facts = {
            name: replace(
                facts,
                parameters={p: s.with_gradient(f"{name}.{p}" in trained) for p, s in facts.parameters.items()},
            )
            for name, facts in self._facts.items()
            if name in layers
        }
        reads = {t for layer in graph._layers.values() for t in (*layer.inputs, layer.count)}
        graph._inputs = {name: spec for name, spec in self._inputs.items() if name in reads}
        gives = {t for layer in graph._layers.values() for t in layer.outputs}
        specs = {t: spec for t, spec in self._specs.items() if t in gives or t in graph._inputs}
        learning = {self._owner_by_name[name] for name in trained}
        graph._specs = dict(narrowed_specs(graph._layers.values(), specs, learning))
        graph._owner_by_name = {n: layer for n, layer in self._owner_by_name.items() if layer in graph._layers}
        return graph

    @cached_property
    def outputs(self) -> tuple[str, ...]:
        """What the graph predicts: tensors that feed a loss or that nobody reads, over the batch."""
        return structure.default_outputs(list(self._layers.values()), self._specs)

    @cached_property
    def differentiable(self) -> frozenset[str]:
        """The tensors that carry a gradient in training: they require grad and a loss depends on them."""
        return structure.differentiable(self._layers.values(), self._specs)

    @cached_property
    def nx(self) -> nx.DiGraph[str]:
        """The graph as networkx sees it, frozen: inputs and layers, edges with `tensors` (name to spec)."""
        return structure.joined(self.name, self._inputs, list(self.layers.values()), self._specs)

    @cached_property
    def _ties(self) -> tuple[tuple[str, ...], ...]:
        """Groups of parameters and buffers that are one tensor, within layers and between them."""
        groups: dict[object, list[str]] = {}
        for name, facts in self._facts.items():
            tie = {local: (name, group[0]) for group in facts.ties for local in group}
            source = self._layers[name].source
            real: dict[str, object] = {}
            if isinstance(source, Instance):
                # Graphs hold the modules they are given, so identities stay valid.
                real.update((n, id(p)) for n, p in source.module.named_parameters(remove_duplicate=False))
                real.update((n, id(b)) for n, b in source.module.named_buffers(remove_duplicate=False))
            for local in (*facts.parameters, *facts.buffers):
                key = real.get(local, tie.get(local, (name, local)))
                groups.setdefault(key, []).append(f"{name}.{local}")
        return tuple(tuple(group) for group in groups.values() if len(group) > 1)

    @cached_property
    def shared_parameters(self) -> tuple[tuple[str, ...], ...]:
        """Groups of "<layer>.<parameter>" that are one parameter; the first of each is its name."""
        every = {f"{name}.{p}" for name, facts in self._facts.items() for p in facts.parameters}
        return tuple(group for group in self._ties if group[0] in every)

    @cached_property
    def colocated(self) -> tuple[tuple[str, ...], ...]:
        """Groups of layers that share parameters or buffers and so must share a stage."""
        return structure.colocated(self._ties, self._owner_by_name, list(self._layers))

    @cached_property
    def shared(self) -> tuple[SharedTensor, ...]:
        """The parameters and buffers that several layers use."""
        result = []
        for group in self._ties:
            layers = tuple(dict.fromkeys(self.owner(name) for name in group))
            spec = self.parameters.get(group[0])
            changed = {f"{name}.{buffer}" for name in layers for buffer in self.layers[name].mutated_buffers}
            if len(layers) > 1:
                trained = any(self.layers[name].has_backward for name in layers)
                result.append(
                    SharedTensor(
                        name=group[0],
                        layers=layers,
                        bytes=0 if spec is None else spec.bytes_at(0),
                        is_trained=spec is not None and spec.requires_grad and trained,
                        is_copyable=changed.isdisjoint(group),
                    )
                )
        return tuple(result)

    def canonical(self, name: str) -> str:
        """The name that the state has a parameter or buffer "<layer>.<name>" under: that of its first user."""
        return self._canonical.get(name, name)

    @cached_property
    def _canonical(self) -> Mapping[str, str]:
        return {name: group[0] for group in self._ties for name in group}

    @cached_property
    def parameters(self) -> Mapping[str, TensorSpec]:
        """Every parameter by "<layer>.<parameter>"; of a shared group the first only."""
        return self._owned(lambda facts: facts.parameters)

    def layer_parameters(self, layer: str) -> Mapping[str, TensorSpec]:
        """The parameters of one layer by their name in it, those that it shares included."""
        return MappingProxyType(dict(self._facts[layer].parameters))

    @cached_property
    def parameter_bytes(self) -> Mapping[str, int]:
        """Bytes of parameters by layer. A shared one counts once, for the first layer that trains it."""
        return self.bytes_by_layer(self.parameters)

    def bytes_by_layer(self, names: Collection[str]) -> Mapping[str, int]:
        """Bytes by layer of some of the parameters, those of `parameters` among `names`."""
        sharers = {group[0]: [self.owner(name) for name in group] for group in self._ties}
        result = dict.fromkeys(self._layers, 0)
        for name, spec in self.parameters.items():
            if name not in names:
                continue
            owners = sharers.get(name, [self.owner(name)])
            trains = (layer for layer in owners if self.layers[layer].has_backward)
            result[next(trains, owners[0])] += spec.bytes_at(0)
        return MappingProxyType(result)

    @cached_property
    def statistics_bytes(self) -> Mapping[str, int]:
        """Bytes that replicas of a layer tell each other of each micro-batch: a mean and a variance per norm called."""
        result = {}
        for name, layer in self._layers.items():
            buffers = self._facts[name].buffers
            means = (buffers[f"{norm}.running_mean".lstrip(".")] for norm in layer.norm_calls if layer.is_replicable)
            result[name] = sum(2 * 8 * math.prod(mean.shape_at(0)) for mean in means)
        return MappingProxyType(result)

    @cached_property
    def buffers(self) -> Mapping[str, TensorSpec]:
        """Every buffer of the state dict by "<layer>.<buffer>"; of a shared group the first only."""
        return self._owned(lambda facts: {n: s for n, s in facts.buffers.items() if n in facts.persistent})

    def _owned(self, select: Callable[[Inferred], Mapping[str, TensorSpec]]) -> Mapping[str, TensorSpec]:
        later = {name for group in self._ties for name in group[1:]}
        return MappingProxyType(
            {
                full: spec
                for name, facts in self._facts.items()
                for local, spec in select(facts).items()
                if (full := f"{name}.{local}") not in later
            }
        )

    def owner(self, name: str) -> str:
        """The layer that a parameter or buffer "<layer>.<name>" belongs to.

        Raises:
            GraphError: there is no such parameter or buffer.
        """
        if name not in self._owner_by_name:
            raise GraphError(f"{name!r} is no parameter or buffer of graph {self.name!r}")
        return self._owner_by_name[name]

    @cached_property
    def may_lack_gradients(self) -> bool:
        """Whether backward may give no gradient for a tensor that needs one.

        A loss that is a mean over counts or labels has no backward on a micro-batch that counts nothing,
        and functions of one's own give what gradients they like.
        """
        return any(layer.counted is not None or layer.withholds for layer in self._layers.values())

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the structure: names, edges, specs and what layers are made of; not of weights."""
        from pipeflow.graphs.description import digest

        return digest(self)

    # -- using -------------------------------------------------------------------------------

    def check(self) -> LayerGraph:
        """The graph itself, if it can be a model.

        Raises:
            GraphError: no layer, an input nobody reads, a loss no trainable parameter reaches; a module
                has changed since it was added.
        """
        structure.check(self.name, self._inputs, list(self._layers.values()), self._specs)
        self._check_unchanged()
        return self

    def _check_unchanged(self) -> None:
        from pipeflow.graphs.module_check import check_unchanged

        for name, layer in self._layers.items():
            if isinstance(layer.source, Instance):
                facts = self._facts[name]
                check_unchanged(name, layer.source.module, facts.parameters, facts.buffers)

    def check_batch(self, batch: Mapping[str, Tensor]) -> int:
        """The number of samples of a batch that fits the inputs.

        Raises:
            BatchError: a key is missing or unknown, or a tensor has another dtype, shape or number of samples.
        """
        from pipeflow.graphs.batch import check_batch

        return check_batch(self._inputs, batch, lengths=self.lengths)

    def measure_batch(self, batch: Mapping[str, Tensor], required: Collection[str] | None = None) -> Extent:
        """The samples and lengths of a batch that fits, those that layers make included.

        Args:
            batch: tensors by input name; those that are not required may be on the meta device.
            required: inputs that must be there; by default all.

        Raises:
            BatchError: as `check_batch`; but a batch may have no samples.
        """
        from pipeflow.graphs.batch import measure_batch

        extent = measure_batch(self._inputs, batch, required=required, lengths=self.lengths)
        return replace(extent, lengths=self.sizes_at(extent.lengths) if extent.samples else {})

    def build(self, layer_names: Iterable[str] | None = None, *, seed: int = 0) -> dict[str, Callable[..., Any]]:
        """Fresh callables of the layers, to call through `pipeflow.graphs.calling.flat_call`.

        Modules are copies, on the CPU and in training mode, with the weights that the given modules
        have now; those of `pf.lazy` depend on (seed, layer name) alone. Parameters that layers share
        stay shared among the copies of one call. Threads may call it.

        Args:
            layer_names: which; all by default.
            seed: for the weights of `pf.lazy`.

        Raises:
            GraphError: there is no such layer, or a module cannot be copied or built.
        """
        from pipeflow.graphs.building import build

        names = list(self._layers) if layer_names is None else list(layer_names)
        if unknown := [name for name in names if name not in self._layers]:
            raise GraphError(f"{unknown[0]!r} is no layer of graph {self.name!r}")
        return build({name: self._layers[name].source for name in names}, seed)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the graph as JSON, layers described by import path; weights are not in it.

        Raises:
            GraphError: a layer cannot be described; the message names it and the remedy.
        """
        from pipeflow.graphs.files import save

        save(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], allow: Sequence[str] = ()) -> LayerGraph:
        """Reads a graph that `save` wrote, building only from allowed imports.

        Args:
            path: the file.
            allow: import prefixes to trust besides torch's layers and tensor functions, for
                example "mymodels" or "mymodels.blocks.Block".

        Raises:
            FormatError: the file is not a graph, or names something that is not allowed.
            GraphError: the graph has a cycle, or is none for another reason.
        """
        from pipeflow.graphs.files import load

        return load(path, tuple(allow))

    def __repr__(self) -> str:
        return (
            f"LayerGraph({self.name!r}, {len(self._inputs)} inputs, {len(self._layers)} layers, "
            f"{len(self.losses)} losses)"
        )
