"""Training on one device: the oracle for every plan.

It runs the layers in the graph's order on one micro-batch after another, lets autograd add up
the gradients, and takes one optimizer step. It shares with the engine what defines the result
(how a batch is cut and weighted, how random layers are keyed) and none of how it gets there:
no stages, no program, no transport.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, overload

import torch
from torch import Tensor

from pipeflow.errors import EngineError, NonFiniteError
from pipeflow.graphs.calling import flat_call
from pipeflow.graphs.layer import Layer
from pipeflow.graphs.layer_graph import LayerGraph
from pipeflow.graphs.retyping import retyped
from pipeflow.runtime.decoding import DecodeSession, check_decoding, decoding_callables
from pipeflow.runtime.gradients import GradientPolicy, NonFinite, Verdict, apply, decide, gradient_norms
from pipeflow.runtime.loss_scale import LossScaler, unscale
from pipeflow.runtime.losses import add_parts, class_weights, loss_factors
from pipeflow.runtime.microbatch import Batch, BatchReader, MicroBatches
from pipeflow.runtime.options import check_clip_value, check_seed
from pipeflow.runtime.parameter_groups import ParameterGroups, check_groups
from pipeflow.runtime.phases import OpenPhase, for_each_phase
from pipeflow.runtime.precision import Precision
from pipeflow.runtime.predictions import arrange_outputs, check_outputs
from pipeflow.runtime.randomness import Callables
from pipeflow.runtime.replica import OptimizerFactory, SchedulerFactory, StageReplica
from pipeflow.runtime.result import StepResult
from pipeflow.runtime.running_statistics import BatchNormChoice, check_choice
from pipeflow.runtime.state import check_state, copy_into, needed_layers, read_inputs, required_inputs
from pipeflow.runtime.strides import packed, straight


class Reference:
    """One device that trains a layer graph; same methods as `pipeflow.Engine`.

    A tensor with several reading layers is read through one view per layer, so that the order
    in which their gradients add up is the same as in a pipeline (see `pipeflow.flows`), and what
    passes between layers is contiguous (see `pipeflow.runtime.strides`).

    Args:
        graph: the layer graph; its modules are copied, never changed.
        optimizer: makes an optimizer from a list of parameters; None for inference alone.
        lr_scheduler: makes a learning-rate scheduler from the optimizer.
        parameter_groups, clip_norm, clip_value, nonfinite: as for `pipeflow.Engine`.
        batch_norm: as for `pipeflow.Engine`.
        precision: as for `pipeflow.Engine`; there is nothing to reduce on one device.
        num_microbatches: into how many a batch is cut.
        seed: for lazily built layers and random ones.
        device: where to run.
    """

    def __init__(
        self,
        graph: LayerGraph,
        optimizer: OptimizerFactory | Mapping[str, OptimizerFactory] | None = None,
        *,
        lr_scheduler: SchedulerFactory | Mapping[str, SchedulerFactory] | None = None,
        parameter_groups: ParameterGroups | None = None,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        nonfinite: NonFinite = "ignore",
        precision: Precision | None = None,
        batch_norm: BatchNormChoice = "microbatch",
        num_microbatches: int = 1,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        graph.check()
        check_clip_value(clip_value, graph)
        check_seed(seed)
        self.num_microbatches = num_microbatches
        self._device = torch.device(device)
        self._precision = precision or Precision()
        self.graph = retyped(graph, self._precision.numerics_on([self._device]))
        self._replica = StageReplica(graph, graph.layers, device=self._device, seed=seed, precision=self._precision)
        self._replica.record_statistics(graph, check_choice(batch_norm), num_replicas=1)
        scale = self._precision.loss_scale
        self._scaler = None if scale is None else LossScaler(scale)
        groups = check_groups(parameter_groups, graph)
        schedulers = for_each_phase(graph, lr_scheduler, "lr_scheduler")
        for phase, factory in for_each_phase(graph, optimizer, "optimizer").items():
            self._replica.make_optimizer(factory, schedulers.get(phase), groups, phase)
        self._has_optimizer = optimizer is not None
        self._open = OpenPhase(graph)
        self._policy = GradientPolicy(
            clip_norm=clip_norm, clip_value=clip_value, nonfinite=nonfinite, loss_scaled=scale is not None
        )
        self._step = 0
        self._calls = 0
        readers: dict[str, int] = {}
        for layer in graph.layers.values():
            if layer.has_backward:
                for tensor in set(layer.inputs):
                    readers[tensor] = readers.get(tensor, 0) + 1
        self._viewed = {t for t, n in readers.items() if n > 1 and t in graph.differentiable}

    def accumulate(self, batch: Batch, *, share: float = 1.0, phase: str | None = None) -> StepResult:
        """Adds a batch's gradients to those of the next step. As `pipeflow.Engine.accumulate`."""
        if not self._has_optimizer:
            raise EngineError("this reference has no optimizer and cannot train; pass optimizer=")
        self._open.check(phase)
        self._replica.enter(phase)
        result = self._run(batch, self._layers(phase), train=True, share=share)[0]
        self._open.accumulated(phase)
        self._calls += 1
        return result

    def _layers(self, phase: str | None) -> tuple[str, ...]:
        """What runs: all layers, or those that the losses of a phase depend on."""
        if phase is None:
            return tuple(self.graph.layers)
        needed = needed_layers(self.graph, self.graph.phases[phase].losses)
        return tuple(name for name in self.graph.layers if name in needed)

    def step(self, batch: Batch, *, share: float = 1.0, phase: str | None = None) -> StepResult:
        """Trains on one batch. Arguments and errors as `pipeflow.Engine.step`."""
        result = self.accumulate(batch, share=share, phase=phase)
        self._open.stepped()
        self._replica.collect_gradients()
        if self._scaler is not None:
            unscale(self._replica.parameters.values(), self._scaler.scale)
        verdict = Verdict()
        if self._policy.needs_norms:
            names = tuple(self.graph.parameters)
            norms = gradient_norms(self._replica.parameters, names)
            try:
                verdict = decide(self._policy, norms, names, result.losses, self._step)
            except NonFiniteError:
                self._replica.drop_gradients()
                raise
        apply(self._policy, verdict, self._replica.parameters.values())
        if verdict.skip:
            self._replica.drop_gradients()
        else:
            self._replica.step()
            self._replica.follow_loss(result.loss)
        if self._scaler is not None:
            self._scaler.update(overflow=verdict.overflow)
        self._step += 1
        return replace(result, gradient_norm=verdict.norm, skipped=verdict.skip)

    def evaluate(self, batch: Batch, *, phase: str | None = None) -> StepResult:
        """The losses of a batch in evaluation mode, without training."""
        with torch.no_grad():
            return self._run(batch, self._layers(phase), train=False)[0]

    @overload
    def predict(self, batch: Mapping[str, Tensor], outputs: Iterable[str] | None = None) -> dict[str, Tensor]: ...

    @overload
    def predict(
        self, batch: Sequence[Mapping[str, Tensor]], outputs: Iterable[str] | None = None
    ) -> list[dict[str, Tensor]]: ...

    def predict(
        self, batch: Batch, outputs: Iterable[str] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Output tensors for a batch, in evaluation mode. As `pipeflow.Engine.predict`."""
        names = check_outputs(self.graph, outputs, whole=isinstance(batch, Mapping))
        layers = needed_layers(self.graph, names)
        with torch.no_grad():
            kept, microbatches = self._run(
                batch, tuple(n for n in self.graph.layers if n in layers), train=False, keep=names
            )[1:]
        return arrange_outputs(self.graph, kept, microbatches)

    def decode(self, batch_size: int, outputs: Iterable[str] | None = None) -> DecodeSession:
        """Opens a session that remembers what came before. As `pipeflow.Engine.decode`."""
        names = check_outputs(self.graph, outputs, whole=True)
        check_decoding(self.graph, names, batch_size)
        needed = needed_layers(self.graph, names)
        layers = tuple(n for n in self.graph.layers if n in needed)
        callables = decoding_callables(self.graph, self._replica)

        def run(session: DecodeSession, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
            with torch.no_grad():
                kept, microbatches = self._run(
                    batch, layers, train=False, keep=names, callables=callables, session=session
                )[1:]
            return arrange_outputs(self.graph, kept, microbatches)  # type: ignore[return-value]

        return DecodeSession(batch_size, run, lambda session: None)

    def _run(
        self,
        batch: Batch,
        layers: tuple[str, ...],
        *,
        train: bool,
        keep: tuple[str, ...] = (),
        share: float = 1.0,
        callables: Callables | None = None,
        session: DecodeSession | None = None,
    ) -> tuple[StepResult, dict[str, list[Tensor | None]], MicroBatches]:
        graph = self.graph
        self._precision.check_surroundings()
        read = read_inputs(graph, layers)
        counted = class_weights(graph, self._replica.modules)
        reader = BatchReader(graph, layers, required_inputs(graph, layers), self.num_microbatches, counted)
        microbatches = reader.read(batch)
        if session is not None:
            session.check_rows(microbatches)
        sizes = microbatches.cut.sizes
        feed = {name: microbatches.parts(name, self._device) for name in read}
        self._replica.train(train)
        losses = [name for name in graph.losses if name in layers]
        factors: dict[str, Sequence[float]] = dict(microbatches.factors)
        factors |= {name: loss_factors(graph.layers[name], sizes) for name in losses if name not in factors}
        parts: dict[str, list[float]] = {name: [] for name in losses}
        kept: dict[str, list[Tensor | None]] = {name: [None] * len(sizes) for name in keep}
        scale = None if self._scaler is None or not train else self._scaler.scale
        scaled = share * (scale or 1.0)
        functions, keyed_layers = callables or self._replica.callables
        draw = self._calls + (session.num_steps if session is not None else 0)
        first_sample, statistics = 0, self._replica.statistics
        if statistics is not None:
            statistics.begin(layers)
        for m, size in enumerate(sizes):
            if not size:
                continue
            for layer in keyed_layers:
                layer.step, layer.first_sample = draw, first_sample
            first_sample += size
            with self._autocast(), statistics.microbatch(m) if statistics and train else nullcontext():
                values = self._forward({name: cut[m] for name, cut in feed.items()}, layers, functions)
            for name in keep:
                kept[name][m] = values[name].detach()
            roots = {name: values[graph.layers[name].outputs[0]] for name in losses}
            counted = {name: value for name, value in roots.items() if factors[name][m]}
            for name, value in counted.items():
                parts[name].append(float(value.detach()) * factors[name][m])
            trained = [name for name, value in counted.items() if value.requires_grad]
            if train and trained:
                seeds = [torch.full_like(roots[n], graph.layers[n].weight * factors[n][m] * scaled) for n in trained]
                torch.autograd.backward([roots[n] for n in trained], seeds)
        if statistics is not None:
            statistics.finish_alone(sizes)
        totals = {name: add_parts(values) for name, values in parts.items()}
        weights = {name: graph.layers[name].weight for name in losses}
        return StepResult(sum(sizes), totals, weights, loss_scale=scale), kept, microbatches

    def _autocast(self) -> AbstractContextManager[object]:
        dtype = self._precision.autocast
        if dtype is None:
            return nullcontext()
        # The cache would add up in the half type what one weight's uses in several layers give.
        return torch.autocast(self._device.type, dtype=getattr(torch, dtype), cache_enabled=False)

    def _forward(
        self, values: dict[str, Any], layers: tuple[str, ...], functions: Mapping[str, Callable[..., Any]]
    ) -> dict[str, Any]:
        for name in layers:
            layer = self.graph.layers[name]
            seen = {tensor: self._read(layer, tensor, values[tensor]) for tensor in layer.inputs}
            arguments = [seen[tensor] for tensor in layer.inputs]
            result = flat_call(layer, functions[name])(*arguments)
            outputs = (result,) if layer.outputs == (name,) else result
            for i, (tensor, value) in enumerate(zip(layer.outputs, outputs, strict=True)):
                values[tensor] = packed(value) if i in layer.strided_outputs else value
        return values

    def _read(self, layer: Layer, tensor: str, value: Tensor) -> Tensor:
        if any(layer.inputs[position] == tensor for position in layer.strided_gradients):
            return straight(value)
        return value.view_as(value) if tensor in self._viewed else value

    @property
    def loss_scale(self) -> float | None:
        """What losses of the next step are multiplied by. As `pipeflow.Engine.loss_scale`."""
        return None if self._scaler is None else self._scaler.scale

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of parameters and persistent buffers, by `<layer>.<name>`."""
        return {name: tensor.detach().clone() for name, tensor in self._replica.tensors().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes parameters and buffers by name. Errors as `pipeflow.Engine.load_state_dict`."""
        check_state(self.graph, state, self._precision.stored)
        copy_into(self._replica.tensors(), state)
        self._replica.written()
        self._open.stepped()
        self._replica.drop_gradients()
