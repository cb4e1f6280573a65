"""One replica of one stage: its layers, parameters and optimizer, on one device.

State is reached by the model's own names, `<layer>.<parameter>`; no stage or rank is in them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeflow.graphs.layer_graph import LayerGraph
from pipeflow.graphs.phase import trained_parameters
from pipeflow.runtime.fresh_buffers import with_fresh_buffers
from pipeflow.runtime.losses import barring
from pipeflow.runtime.masters import Masters
from pipeflow.runtime.optimizers import check_optimizer, check_scheduler, follows_loss
from pipeflow.runtime.parameter_groups import Grouping
from pipeflow.runtime.precision import Precision
from pipeflow.runtime.randomness import Callables, RandomLayer, layer_key
from pipeflow.runtime.running_statistics import BatchNormChoice, RunningStatistics


@dataclass(frozen=True, slots=True)
class Training:
    """How a replica learns in one phase: what, by which optimizer, at which rates."""

    trained: frozenset[str]
    optimizer: torch.optim.Optimizer | None
    scheduler: Any


OptimizerFactory = Callable[[list[Any]], torch.optim.Optimizer]
"""Makes an optimizer for the parameters it is given, those of one stage: a list of parameters, or
of groups where the engine has `parameter_groups`. torch's optimizers take both."""

SchedulerFactory = Callable[[torch.optim.Optimizer], Any]
"""Makes a learning-rate scheduler for an optimizer."""


class StageReplica:
    """Layers of a stage with their weights.

    Args:
        graph: the layer graph; its modules are copied, never changed.
        layers: names of the stage's layers.
        device: where to put the weights.
        seed: for lazily built layers and for random ones.
        precision: the types of parameters and of sums of gradients.

    Attributes:
        parameters: by the name that the state has them under, each once.
        copied: names of those whose gradients are summed over several stages.
        borrowed: names of parameters and buffers that another stage saves and counts.
    """

    def __init__(
        self,
        graph: LayerGraph,
        layers: Iterable[str],
        *,
        device: torch.device,
        seed: int,
        precision: Precision | None = None,
    ) -> None:
        self._graph = graph
        self.layers = tuple(layers)
        self.device = device
        self.precision = precision or Precision()
        self.modules: dict[str, nn.Module] = {}
        self.functions: dict[str, Callable[..., Any]] = {}
        self.random_layers: list[RandomLayer] = []
        for name, function in graph.build(self.layers, seed=seed).items():
            if isinstance(function, nn.Module):
                self.modules[name] = function.to(device)
                function = with_fresh_buffers(graph.layers[name], function)
            if graph.layers[name].barred_label is not None:
                function = barring(graph.layers[name], function)
            if graph.layers[name].is_random:
                function = RandomLayer(function, key=layer_key(seed, name), device=device)
                self.random_layers.append(function)
            self.functions[name] = function
        self.statistics: RunningStatistics | None = None
        self.parameters = self._named(nn.Module.named_parameters)
        self.copied: frozenset[str] = frozenset()
        self.borrowed: frozenset[str] = frozenset()
        self.masters = self._make_masters(graph) if self.precision.parameters else None
        self.training_by_phase: dict[str | None, Training] = {}
        self.optimizer: torch.optim.Optimizer | None = None
        self.scheduler: Any = None
        self._phase: str | None = None

    def _make_masters(self, graph: LayerGraph) -> Masters:
        """Casts what the layers compute with; what is trained and saved stays as it was."""
        numerics, memo = self.precision.numerics(self.device.type), dict[int, Tensor]()
        for module in self.modules.values():
            numerics.cast(module, memo)
        buffers = self._named(_persistent_buffers)
        masters = Masters(
            self.parameters,
            self._named(nn.Module.named_parameters),
            buffers,
            {name: self.precision.stored(graph.buffers[name]) for name in buffers},
            accumulate=self.precision.accumulate,
        )
        self.parameters = masters.parameters
        return masters

    @property
    def working(self) -> Iterable[nn.Parameter]:
        """The parameters that layers compute with: those of `parameters`, or casts of them."""
        return (p for module in self.modules.values() for p in module.parameters())

    @property
    def callables(self) -> Callables:
        """What to call for each layer, and which of them to tell what they work on."""
        return self.functions, self.random_layers

    def make_optimizer(
        self,
        factory: OptimizerFactory,
        scheduler: SchedulerFactory | None,
        groups: Grouping,
        phase: str | None = None,
    ) -> None:
        """Gives the replica its optimizer for a phase, unless it trains no parameter of it."""
        trained = {name: p for name, p in self.parameters.items() if p.requires_grad}
        if phase is not None:
            of_phase = trained_parameters(self._graph, self._graph.phases[phase])
            trained = {name: p for name, p in self.parameters.items() if name in of_phase}
        if trained:
            self.optimizer = check_optimizer(factory(groups.grouped(trained)), trained)
            groups.check_made(self.optimizer, trained)
            self.scheduler = check_scheduler(scheduler(self.optimizer)) if scheduler else None
        self.training_by_phase[phase] = Training(frozenset(trained), self.optimizer, self.scheduler)
        if phase is not None:
            self.optimizer = self.scheduler = None  # until it is entered

    def enter(self, phase: str | None) -> None:
        """From now on the replica learns as in this phase; what it does not train is frozen."""
        if phase is None or phase == self._phase:
            return
        self._phase = phase
        training = self.training_by_phase[phase]
        self.optimizer, self.scheduler = training.optimizer, training.scheduler
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(name in training.trained)
        if self.masters is not None:
            self.masters.freeze_alike()

    def record_statistics(self, graph: LayerGraph, choice: BatchNormChoice, *, num_replicas: int) -> None:
        """Lets norms record what they see, where replicas share or exchange it or it is taken in once a batch.

        Raises:
            PlanError: a norm is to be deferred or synchronised that is not torch's, or has no running statistics.
        """
        if num_replicas > 1 or choice == "deferred":
            layers = [graph.layers[name] for name in self.layers]
            statistics = RunningStatistics(
                layers,
                self.modules,
                deferred=choice == "deferred",
                num_replicas=num_replicas,
                synchronised=choice == "synchronised",
            )
            self.statistics = statistics or None

    def train(self, mode: bool) -> None:
        for module in self.modules.values():
            module.train(mode)

    def step(self) -> None:
        """The optimizer's step, the scheduler's, and gradients let go."""
        if self.optimizer is not None:
            self.optimizer.step()
            if self.masters is not None:
                self.masters.refresh()
            if self.scheduler is not None and not follows_loss(self.scheduler):
                self.scheduler.step()
            self.drop_gradients()

    def follow_loss(self, loss: float) -> None:
        """The step of a scheduler that takes a metric: the step's loss, once all ranks know it."""
        if follows_loss(self.scheduler):
            self.scheduler.step(loss)

    def collect_gradients(self) -> None:
        """Brings the gradients of micro-batches to `parameters`, where layers compute with casts of these."""
        if self.masters is not None:
            self.masters.collect()

    def drop_gradients(self) -> None:
        """Lets go of all gradients without a step."""
        for parameter in self.parameters.values():
            parameter.grad = None
        if self.masters is not None:
            self.masters.drop_gradients()

    def tensors(self) -> Mapping[str, Tensor]:
        """Parameters and persistent buffers by name, each once; not copies.

        Who writes to them calls `written` after.
        """
        if self.masters is not None:
            self.masters.save_buffers()
            return {**self.parameters, **self.masters.buffers}
        return {**self.parameters, **self._named(_persistent_buffers)}

    def _named(self, listing: Callable[[nn.Module], Iterable[tuple[str, Any]]]) -> dict[str, Any]:
        return {self._graph.canonical(name): value for name, value in named(self.modules, listing)}

    def written(self) -> None:
        """What `tensors` gave has new values: layers that compute with casts of them are given these."""
        if self.masters is not None:
            self.masters.refresh(buffers=True)


def named(modules: Mapping[str, nn.Module], listing: Callable[[nn.Module], Iterable[tuple[str, Any]]]) -> Iterable[Any]:
    """(`<layer>.<name>`, value) of every value that `listing` gives of a module, each value once."""
    seen: set[int] = set()
    for layer, module in modules.items():
        for name, value in listing(module):
            if id(value) not in seen:
                seen.add(id(value))
                yield f"{layer}.{name}", value


def _persistent_buffers(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    persistent = module.state_dict(keep_vars=True).keys()
    return [(name, buffer) for name, buffer in module.named_buffers() if name in persistent]
