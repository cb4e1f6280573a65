"""What each layer costs: the graph as planners see it, in seconds and bytes.

`GraphCosts` is self-contained: names, edges and amounts. It comes from a profile, an
estimate, a foreign file or a test, and nothing here knows which; nor torch, nor devices.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Literal, Self

import networkx as nx
from pydantic import Field, model_validator

from pipeflow.errors import CostError
from pipeflow.values import Bytes, Count, Seconds, Value

MOST_BYTES = 2**58
"""Of all layers of a graph together: searches add them up in 64 bits."""


class TensorCosts(Value):
    """One tensor: a graph input or an output of a layer.

    Attributes:
        name: its name in the graph; the layer's name, or `layer:index` where there are several.
        bytes: of the tensor for `GraphCosts.samples` samples.
        gradient_bytes: of its gradient; 0 where no loss needs one.
        scales: whether its bytes grow with the number of samples.
        shared_with: the tensor whose memory it is, where it has none of its own (a reshaped view).
    """

    name: str
    bytes: Bytes = 0
    gradient_bytes: Bytes = 0
    scales: bool = True
    shared_with: str = ""


class Variant(Value):
    """One way to run a layer, with costs of its own: on several devices together, or saving less.

    Attributes:
        name: of the way, the same at every degree, for example "recompute".
        degree: how many devices share the layer (tensor parallelism); the costs are each one's.
        seconds: forward and backward together, what is recomputed included.
        parameter_bytes: that replicas reduce.
        resident_bytes: held whatever is in flight: parameters with their gradients and state, and the
            most that is needed for a while.
        saved_bytes: held for each micro-batch in flight.
        border_bytes: (tensor, bytes) moved beside a tensor that the layer reads or writes where it
            crosses the border of the stage: what its devices need to share it out, or to collect it.
    """

    name: str
    degree: Count = 1
    seconds: Seconds = 0.0
    parameter_bytes: Bytes = 0
    resident_bytes: Bytes = 0
    saved_bytes: Bytes = 0
    border_bytes: tuple[tuple[str, Bytes], ...] = ()


class LayerCosts(Value):
    """One layer: what it reads and writes, and what it costs for `GraphCosts.samples` samples.

    Attributes:
        name: unique among the layers.
        kind: what sort of layer it is (a class name), for devices whose speed depends on it.
        inputs: names of the tensors it reads, in order; a tensor may stand twice.
        outputs: the tensors it writes.
        forward_seconds, backward_input_seconds, backward_weight_seconds: on a device of speed 1.
        fixed_fraction: share of those seconds that does not shrink with the number of samples.
        parameter_bytes: weights alone; gradients and optimizer state come on top.
        saved_bytes: what forward keeps for backward, outputs of the layer included.
        internal_bytes: of `saved_bytes`, what is neither an input nor an output of the layer; None where
            that is not known, and then nor are the six that follow.
        kept_tensors: names of its inputs and outputs that backward needs.
        fixed_in_place_bytes: of `internal_bytes`, what is kept otherwise than by autograd's saved tensors,
            and so cannot be offloaded.
        forward_working_bytes: forward allocates so much more meanwhile than is there when it is done.
        bare_working_bytes: the same for a forward that keeps nothing for backward.
        backward_working_bytes: the same for backward, over what is there when it starts.
        backward_fixed_bytes: of that, what does not scale with the samples (a gradient of a weight).
        has_backward: whether backward passes through this layer at all.
        replicable: False where replicas would not train as one device does (buffers that a forward changes).
        statistics_bytes: what replicas tell each other of each micro-batch (batch-norm's means and variances).
        spread: relative spread of the measured seconds (interquartile range over median).
        variants: ways to run it, of which a stage chooses one; none where there is only the one that
            the other fields describe. They are for planning without a runtime.
    """

    name: str
    kind: str = ""
    inputs: tuple[str, ...] = ()
    outputs: tuple[TensorCosts, ...] = ()
    forward_seconds: Seconds = 0.0
    backward_input_seconds: Seconds = 0.0
    backward_weight_seconds: Seconds = 0.0
    fixed_fraction: float = Field(default=0.0, ge=0, le=1)
    parameter_bytes: Bytes = 0
    saved_bytes: Bytes = 0
    internal_bytes: Bytes | None = None
    kept_tensors: tuple[str, ...] = ()
    fixed_in_place_bytes: Bytes = 0
    forward_working_bytes: Bytes = 0
    bare_working_bytes: Bytes = 0
    backward_working_bytes: Bytes = 0
    backward_fixed_bytes: Bytes = 0
    has_backward: bool = True
    replicable: bool = True
    statistics_bytes: Bytes = 0
    spread: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    variants: tuple[Variant, ...] = ()

    @property
    def movable_bytes(self) -> int:
        """Of `internal_bytes`, what can be on the host between forward and backward."""
        return (self.internal_bytes or 0) - self.fixed_in_place_bytes

    def in_variant(self, name: str, degree: int) -> LayerCosts:
        """The layer with the costs of one of its ways.

        Raises:
            CostError: it has no such way.
        """
        variant = self.variant(name, degree)
        return self.model_copy(
            update={
                "forward_seconds": variant.seconds,
                "backward_input_seconds": 0.0,
                "backward_weight_seconds": 0.0,
                "parameter_bytes": variant.parameter_bytes,
                "saved_bytes": variant.saved_bytes,
            }
        )

    def variant(self, name: str, degree: int) -> Variant:
        """The way of this name and degree.

        Raises:
            CostError: it has no such way.
        """
        for variant in self.variants:
            if (variant.name, variant.degree) == (name, degree):
                return variant
        known = [(v.name, v.degree) for v in self.variants]
        raise CostError(f"layer {self.name!r} has no variant {name!r} of degree {degree}; known are {known}")

    @property
    def seconds(self) -> float:
        """Forward and backward of one micro-batch together."""
        return self.forward_seconds + self.backward_input_seconds + self.backward_weight_seconds


class PhaseCosts(Value):
    """A kind of training step that runs, and trains, a part of the graph.

    Attributes:
        name: of the phase.
        layers: those that run.
        backward: those of them that backward passes through.
        gradients: the tensors that carry a gradient.
        parameter_bytes: of what it trains, by layer; a shared parameter counts for the first that learns.
        shared: names of what it trains that several layers use.
    """

    name: str
    layers: tuple[str, ...]
    backward: tuple[str, ...]
    gradients: tuple[str, ...]
    parameter_bytes: Mapping[str, Bytes]
    shared: tuple[str, ...] = ()


class SharedTensor(Value):
    """One parameter or buffer that several layers use.

    Attributes:
        name: "<layer>.<name>" as the first layer that uses it has it.
        layers: that use it, in the graph's order.
        bytes: of the parameter; 0 for a buffer.
        is_trained: whether training steps it.
        is_copyable: whether stages may each keep a copy; not so for a buffer that a forward changes.
    """

    name: str
    layers: tuple[str, ...] = Field(min_length=2)
    bytes: Bytes = 0
    is_trained: bool = True
    is_copyable: bool = True


class GraphCosts(Value):
    """A layer graph with its costs.

    Attributes:
        name: of the graph.
        samples: the number of samples that seconds and bytes are for: one micro-batch.
        device: what they were measured on or estimated for, as text.
        inputs: tensors that enter the graph.
        layers: in a topological order; this is also the order in which one device runs them.
        colocated: groups of layers that must share a stage (they share parameters).
        phases: kinds of training steps, where there are several.
        shared: what layers share.
        sharing: whether layers that share parameters are colocated ("together"), or each is charged
            for a copy ("copies", see `pipeflow.graphs.sharing`).

    Raises:
        CostError: a name stands twice, an input comes from nowhere or from a later layer, or bytes are too many
            to be added up.
    """

    format: Literal["pipeflow-costs-1"] = "pipeflow-costs-1"
    name: str = "graph"
    samples: Count = 1
    device: str = ""
    inputs: tuple[TensorCosts, ...] = ()
    layers: tuple[LayerCosts, ...]
    colocated: tuple[tuple[str, ...], ...] = ()
    phases: tuple[PhaseCosts, ...] = ()
    shared: tuple[SharedTensor, ...] = ()
    sharing: Literal["together", "copies"] = "together"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (total := sum(map(_all_bytes, self.layers))) > MOST_BYTES:
            largest = max(self.layers, key=_all_bytes)
            raise CostError(
                f"costs of {self.name!r}: bytes add up to {total:.3g}, most of them in layer {largest.name!r}; they "
                f"must stay below 2**{MOST_BYTES.bit_length() - 1}, so that sums of them are whole numbers"
            )
        tensors = {t.name for t in self.inputs}
        if len(tensors) != len(self.inputs):
            raise CostError(f"costs of {self.name!r}: an input is named twice; names must be unique")
        names: set[str] = set()
        for layer in self.layers:
            if layer.name in names:
                raise CostError(f"costs of {self.name!r}: layer {layer.name!r} stands twice; names must be unique")
            names.add(layer.name)
            if unknown := [t for t in layer.inputs if t not in tensors]:
                raise CostError(
                    f"costs of {self.name!r}: layer {layer.name!r} reads {unknown[0]!r}, which no input and no "
                    "earlier layer gives; list the layers in a topological order"
                )
            for tensor in layer.outputs:
                if tensor.name in tensors:
                    raise CostError(f"costs of {self.name!r}: tensor {tensor.name!r} is written twice")
                tensors.add(tensor.name)
        for group in self.colocated:
            if unknown := [n for n in group if n not in names]:
                raise CostError(f"costs of {self.name!r}: colocated layer {unknown[0]!r} is not a layer")
        for phase in self.phases:
            if unknown := [n for n in (*phase.layers, *phase.backward, *phase.parameter_bytes) if n not in names]:
                raise CostError(f"costs of {self.name!r}: layer {unknown[0]!r} of phase {phase.name!r} is not a layer")
        for shared in self.shared:
            if unknown := [n for n in shared.layers if n not in names]:
                raise CostError(f"costs of {self.name!r}: {shared.name!r} is shared by {unknown[0]!r}, no layer")
        return self

    @cached_property
    def layer_by_name(self) -> Mapping[str, LayerCosts]:
        return {layer.name: layer for layer in self.layers}

    @cached_property
    def has_variants(self) -> bool:
        """Whether some layer can be run in several ways."""
        return any(layer.variants for layer in self.layers)

    @cached_property
    def largest_degree(self) -> int:
        """The most devices that a variant of some layer is shared by; 1 where there are no variants."""
        return max((variant.degree for layer in self.layers for variant in layer.variants), default=1)

    @cached_property
    def position_by_layer(self) -> Mapping[str, int]:
        """Position of each layer in `layers`."""
        return {layer.name: i for i, layer in enumerate(self.layers)}

    @cached_property
    def tensor_by_name(self) -> Mapping[str, TensorCosts]:
        return {t.name: t for t in (*self.inputs, *(t for layer in self.layers for t in layer.outputs))}

    @cached_property
    def producer_by_tensor(self) -> Mapping[str, str]:
        """The layer that writes each tensor; graph inputs are not in it."""
        return {t.name: layer.name for layer in self.layers for t in layer.outputs}

    @cached_property
    def consumers_by_tensor(self) -> Mapping[str, tuple[str, ...]]:
        """The layers that read each tensor, in order, each once; tensors nobody reads have none."""
        readers: dict[str, dict[str, None]] = {name: {} for name in self.tensor_by_name}
        for layer in self.layers:
            for tensor in layer.inputs:
                readers[tensor][layer.name] = None
        return {name: tuple(layers) for name, layers in readers.items()}

    @cached_property
    def graph(self) -> nx.DiGraph[str]:
        """Layers and the edges between them, each with the names of its `tensors`. Frozen."""
        graph: nx.DiGraph[str] = nx.DiGraph(name=self.name)
        graph.add_nodes_from(layer.name for layer in self.layers)
        for layer in self.layers:
            for tensor in dict.fromkeys(layer.inputs):
                producer = self.producer_by_tensor.get(tensor)
                if producer is None:
                    continue
                if graph.has_edge(producer, layer.name):
                    graph.edges[producer, layer.name]["tensors"] += (tensor,)
                else:
                    graph.add_edge(producer, layer.name, tensors=(tensor,))
        nx.freeze(graph)
        return graph

    def at(self, samples: int) -> GraphCosts:
        """The same graph at another micro-batch size: seconds affine, tensors proportional.

        Args:
            samples: at least 1.
        """
        if samples < 1:
            raise CostError(f"{samples} samples: a micro-batch has at least 1")
        if samples == self.samples:
            return self
        ratio = samples / self.samples

        def tensor(t: TensorCosts) -> TensorCosts:
            if not t.scales:
                return t
            return t.model_copy(
                update={"bytes": math.ceil(t.bytes * ratio), "gradient_bytes": math.ceil(t.gradient_bytes * ratio)}
            )

        def layer(c: LayerCosts) -> LayerCosts:
            factor = c.fixed_fraction + (1 - c.fixed_fraction) * ratio
            return c.model_copy(
                update={
                    "forward_seconds": c.forward_seconds * factor,
                    "backward_input_seconds": c.backward_input_seconds * factor,
                    "backward_weight_seconds": c.backward_weight_seconds * factor,
                    "fixed_fraction": c.fixed_fraction / factor if factor else 0.0,
                    "saved_bytes": math.ceil(c.saved_bytes * ratio),
                    **_working_bytes_at(c, ratio),
                    "outputs": tuple(tensor(t) for t in c.outputs),
                    "variants": tuple(variant(v) for v in c.variants),
                }
            )

        def variant(v: Variant) -> Variant:
            return v.model_copy(
                update={
                    "seconds": v.seconds * ratio,
                    "saved_bytes": math.ceil(v.saved_bytes * ratio),
                    "border_bytes": tuple((name, math.ceil(amount * ratio)) for name, amount in v.border_bytes),
                }
            )

        return GraphCosts(
            name=self.name,
            samples=samples,
            device=self.device,
            inputs=tuple(tensor(t) for t in self.inputs),
            layers=tuple(layer(c) for c in self.layers),
            colocated=self.colocated,
            phases=self.phases,
            shared=self.shared,
            sharing=self.sharing,
        )

    def in_phase(self, name: str) -> GraphCosts:
        """The same layers in the same order; those that the phase does not run read and cost nothing.

        Raises:
            CostError: there is no such phase.
        """
        phase = next((p for p in self.phases if p.name == name), None)
        if phase is None:
            known = ", ".join(p.name for p in self.phases) or "none"
            raise CostError(f"costs of {self.name!r}: there is no phase {name!r}; there is {known}")
        runs, backward, gradients = set(phase.layers), set(phase.backward), set(phase.gradients)
        shared = tuple(s.model_copy(update={"is_trained": True}) for s in self.shared if s.name in phase.shared)
        charged = {layer.name: phase.parameter_bytes.get(layer.name, 0) for layer in self.layers}
        if self.sharing == "copies":
            for tensor in (s for s in shared if s.is_copyable):
                counted = next(n for n in tensor.layers if n in backward)
                for user in tensor.layers:
                    charged[user] += tensor.bytes if user != counted else 0

        def layer(c: LayerCosts) -> LayerCosts:
            outputs = tuple(t if t.name in gradients else t.model_copy(update={"gradient_bytes": 0}) for t in c.outputs)
            changes: dict[str, object] = {
                "outputs": outputs,
                "has_backward": c.name in backward,
                "parameter_bytes": charged[c.name],
            }
            if c.name not in backward:
                changes |= {"backward_input_seconds": 0.0, "backward_weight_seconds": 0.0}
            if c.name not in runs:
                changes |= {"inputs": (), "forward_seconds": 0.0, "saved_bytes": 0, "statistics_bytes": 0}
            return c.model_copy(update=changes)

        return self.model_copy(update={"layers": tuple(map(layer, self.layers)), "shared": shared, "phases": ()})


def _all_bytes(layer: LayerCosts) -> int:
    moved = sum(tensor.bytes + tensor.gradient_bytes for tensor in layer.outputs)
    ways = max((v.parameter_bytes + v.resident_bytes + v.saved_bytes for v in layer.variants), default=0)
    return layer.parameter_bytes + layer.saved_bytes + moved + ways


def _working_bytes_at(layer: LayerCosts, ratio: float) -> dict[str, int | None]:
    """What a layer holds inside, at another number of samples."""
    fixed = layer.backward_fixed_bytes
    return {
        "internal_bytes": None if layer.internal_bytes is None else math.ceil(layer.internal_bytes * ratio),
        "fixed_in_place_bytes": math.ceil(layer.fixed_in_place_bytes * ratio),
        "forward_working_bytes": math.ceil(layer.forward_working_bytes * ratio),
        "bare_working_bytes": math.ceil(layer.bare_working_bytes * ratio),
        "backward_working_bytes": fixed + math.ceil((layer.backward_working_bytes - fixed) * ratio),
    }


def total_seconds(layers: Iterable[LayerCosts]) -> float:
    """Forward and backward seconds of all of them, added in order."""
    return math.fsum(layer.seconds for layer in layers)
