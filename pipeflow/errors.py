"""Every error a user of pipeflow can meet.

Each message says the value seen, the rule it breaks and the remedy. Nothing here imports
anything else of pipeflow, nor torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any


class PipeflowError(Exception):
    """Base of all errors that pipeflow raises on purpose."""


class GraphError(PipeflowError, ValueError):
    """A layer graph that cannot be a model: a cycle, a duplicate or dangling name, a lost loss."""


class ShapeError(GraphError):
    """A layer that does not accept the shapes or dtypes it is given, or gives others than declared."""


class CostError(PipeflowError, ValueError):
    """Costs that are negative, incomplete or not a graph."""


class ClusterError(PipeflowError, ValueError):
    """A description of devices and links that contradicts itself."""


class FormatError(PipeflowError, ValueError):
    """A file that is not what its format promises."""


class PlanError(PipeflowError, ValueError):
    """A plan, or a request for one, that breaks a rule of planning."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule of a partition problem, as data.

    Attributes:
        kind: "pin", "together", "apart", "no_cut", "max_layers", "colocated", "replicas",
            "num_stages", "max_stages", "max_replicas", "not_replicable" or "memory".
        index: which of its kind: of a pin or group among the pins, a layer, or a device.
        text: the rule in words.
        layers: that it names.
        devices: that it names.
    """

    kind: str
    index: int
    text: str
    layers: tuple[str, ...] = ()
    devices: tuple[int, ...] = ()


class Infeasible(PlanError):
    """No partition satisfies the problem.

    Attributes:
        reasons: why, in sentences.
        rules: a smallest set of the problem's rules that leaves no partition: without any one of
            them there is one. Empty where a search found nothing but proved nothing either.
    """

    def __init__(self, reasons: Sequence[str], rules: Sequence[Rule] = ()) -> None:
        self.reasons = tuple(reasons)
        self.rules = tuple(rules)
        told = "; ".join(self.reasons)
        if len(self.rules) > 1 and self.reasons == tuple(rule.text for rule in self.rules):
            told = f"these rules leave no partition, drop one of them: {told}"
        super().__init__(told)

    def __reduce__(self) -> tuple[type[Infeasible], tuple[tuple[str, ...], tuple[Rule, ...]]]:
        return type(self), (self.reasons, self.rules)


class VerificationError(PipeflowError):
    """A program that would not run to its end. `counterexample` lists the actions that show it."""

    def __init__(self, message: str, counterexample: tuple[str, ...] = ()) -> None:
        self.message = message
        self.counterexample = counterexample
        lines = [message, *(f"  {line}" for line in counterexample)]
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[type[VerificationError], tuple[str, tuple[str, ...]]]:
        return type(self), (self.message, self.counterexample)


class BatchError(PipeflowError, ValueError):
    """A batch with wrong keys, dtypes or shapes. Raised before anything is sent; the engine goes on.

    Where each rank is a process, ranks that took the batch end with a LayerFailure that says so.
    """


class EngineError(PipeflowError, RuntimeError):
    """An engine that is asked for what it cannot do (closed, failed, missing an optimizer)."""


class NonFiniteError(EngineError):
    """A loss or gradient is infinite or no number, and the engine was asked to stop there.

    Raised on every rank in the same step; parameters are untouched and the engine goes on.
    """


class PlanMismatch(EngineError):
    """Ranks hold different plans, graphs, settings or optimizers. Raised on every rank before the first step."""


class CheckpointError(PipeflowError, RuntimeError):
    """A checkpoint that is incomplete, altered since it was written, or of another model."""


class LayerFailure(EngineError):
    """A layer raised while a step ran. The original exception is the `__cause__` where it happened.

    Attributes:
        rank: the rank on which it happened.
        stage: index of its stage, or None where the failure is not a layer's (a lost connection).
        layer: name of the layer, or None where it is not known.
        microbatch: index of the micro-batch, or None.
        step: index of the step, counted from 0.
        phase: "forward", "backward", "optimizer", "transport"; "batch" or "call" where ranks were given
            different ones or one of them was refused; "interrupt" where a rank was stopped by hand; "construction"
            where it could not be made.
        original: type and message of the original exception, as one line.
        trace: its traceback as text, for ranks on which the exception object is not.
    """

    def __init__(
        self,
        *,
        rank: int,
        step: int,
        phase: str,
        original: str,
        stage: int | None = None,
        layer: str | None = None,
        microbatch: int | None = None,
        trace: str = "",
    ) -> None:
        self.rank = rank
        self.stage = stage
        self.layer = layer
        self.microbatch = microbatch
        self.step = step
        self.phase = phase
        self.original = original
        self.trace = trace
        where = [f"rank {rank}"]
        if stage is not None:
            where.append(f"stage {stage}")
        if layer is not None:
            where.append(f"layer {layer!r}")
        if microbatch is not None:
            where.append(f"micro-batch {microbatch}")
        where.append(f"step {step}")
        super().__init__(f"{original} ({phase} on {', '.join(where)})")

    def record(self) -> dict[str, Any]:
        """The attributes, as JSON can hold them; `LayerFailure(**record)` is equal."""
        names = ("rank", "stage", "layer", "microbatch", "step", "phase", "original", "trace")
        return {name: getattr(self, name) for name in names}

    def __reduce__(self) -> tuple[Callable[..., LayerFailure], tuple[()]]:
        return partial(type(self), **self.record()), ()
