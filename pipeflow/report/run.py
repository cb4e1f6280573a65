"""What a training run was like, and how that is shown: predicted beside measured, pipeline beside one device.

Holds figures and words. Does not train.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from pipeflow.program import Compute, Kind
from pipeflow.report.table import Table
from pipeflow.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from pipeflow.execution_plan import Plan
    from pipeflow.runtime.measurement import Measurement
    from pipeflow.timeline import Timeline


@dataclass(frozen=True, slots=True)
class Epoch:
    """One pass over the training data.

    Attributes:
        index: counted from 0.
        loss: mean over the training samples.
        test_loss: mean over the test samples.
        metric: of the recipe, over the test samples; None where it has none.
        seconds: of training, the test apart.
    """

    index: int
    loss: float
    test_loss: float
    metric: float | None
    seconds: float


@dataclass(frozen=True, slots=True)
class StageSeconds:
    """One stage and one micro-batch, predicted by the plan's costs and measured."""

    layers: tuple[str, ...]
    devices: tuple[int, ...]
    predicted_forward: float
    measured_forward: float
    predicted_backward: float
    measured_backward: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """The same steps on one device.

    Attributes:
        num_steps: how many.
        largest_loss_difference: over all steps, absolute.
        at_step: where it is.
        largest_parameter_difference: at the end, absolute.
        iteration_seconds: median of a step on one device.
    """

    num_steps: int
    largest_loss_difference: float
    at_step: int
    largest_parameter_difference: float
    iteration_seconds: float


@dataclass(frozen=True, slots=True)
class Run:
    """A whole run.

    Attributes:
        name: of the recipe.
        digest: of the plan.
        ranks: how many, and whether they are threads or processes.
        epochs: in order.
        losses: of every step.
        stages: in order.
        predicted_iteration_seconds, measured_iteration_seconds: of a full batch.
        metric_name: of the recipe.
        metric_goal: of the recipe; None where the run was shorter than the recipe's.
        comparison: with one device, if it was made.
        predicted_bytes_by_rank, measured_bytes_by_rank: at most during one step; measured ones are empty where
            no step was counted.
    """

    name: str
    digest: str
    num_ranks: int
    ranks_are: str
    epochs: tuple[Epoch, ...]
    losses: tuple[float, ...]
    stages: tuple[StageSeconds, ...]
    predicted_iteration_seconds: float
    measured_iteration_seconds: float
    metric_name: str
    metric_goal: float | None
    comparison: Comparison | None
    predicted_bytes_by_rank: tuple[int, ...] = ()
    measured_bytes_by_rank: tuple[int, ...] = ()

    @property
    def misses_goal(self) -> bool:
        """Whether the metric at the end is below what the recipe promises."""
        metric = self.epochs[-1].metric if self.epochs else None
        return self.metric_goal is not None and metric is not None and metric < self.metric_goal

    def document(self) -> dict[str, Any]:
        """The run as JSON can hold it: figures that are no numbers become None."""
        plain: dict[str, Any] = _finite(asdict(self))
        return plain


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def stage_seconds(plan: Plan, timeline: Timeline, measured: Measurement) -> tuple[StageSeconds, ...]:
    """Predicted and measured seconds of every stage; of replicas on unlike devices, the mean.

    Args:
        timeline: the plan simulated, for training.
        measured: of an engine that ran it.
    """
    spans: dict[tuple[int, bool], list[float]] = {}
    for event in timeline.events:
        if isinstance(event.action, Compute):
            spans.setdefault((event.action.stage, event.action.kind is Kind.FORWARD), []).append(event.seconds)

    def mean(stage: int, forward: bool) -> float:
        values = spans.get((stage, forward), [0.0])
        return math.fsum(values) / len(values)

    return tuple(
        StageSeconds(
            layers=stage.layers,
            devices=stage.devices,
            predicted_forward=mean(index, True),
            measured_forward=measured.forward_seconds[index],
            predicted_backward=mean(index, False),
            measured_backward=measured.backward_seconds[index],
        )
        for index, stage in enumerate(plan.stages)
    )


def epoch_line(epoch: Epoch, num_epochs: int, metric_name: str) -> str:
    """One line of progress."""
    metric = "" if epoch.metric is None else f"  test {metric_name} {epoch.metric:.4f}"
    width = len(str(num_epochs))
    return (
        f"epoch {epoch.index + 1:>{width}}/{num_epochs}  loss {epoch.loss:.4f}  test loss {epoch.test_loss:.4f}"
        f"{metric}  {format_seconds(epoch.seconds)}"
    )


def run_tables(run: Run) -> tuple[Table, Table]:
    """Seconds of the stages, then what the whole run comes to."""
    stages = Table(
        title="seconds for one micro-batch, predicted and measured",
        headings=(
            ">stage",
            "layers",
            "devices",
            ">forward",
            ">measured",
            ">backward",
            ">measured",
            ">ratio",
        ),
        rows=tuple(
            (
                str(index),
                f"{s.layers[0]}..{s.layers[-1]}" if len(s.layers) > 1 else s.layers[0],
                ", ".join(map(str, s.devices)),
                format_seconds(s.predicted_forward),
                format_seconds(s.measured_forward),
                format_seconds(s.predicted_backward),
                format_seconds(s.measured_backward),
                _ratio(s.measured_forward + s.measured_backward, s.predicted_forward + s.predicted_backward),
            )
            for index, s in enumerate(run.stages)
        ),
    )
    return stages, Table(title=f"{run.name} on {run.num_ranks} {run.ranks_are}", headings=("", ""), rows=_summary(run))


def _ratio(measured: float, predicted: float) -> str:
    return f"{measured / predicted:.2f}" if predicted else "-"


def _summary(run: Run) -> tuple[tuple[str, str], ...]:
    predicted, measured = run.predicted_iteration_seconds, run.measured_iteration_seconds
    rows = [
        (
            "iteration",
            f"predicted {format_seconds(predicted)}, measured {format_seconds(measured)}, "
            f"ratio {_ratio(measured, predicted)}",
        )
    ]
    rows += [
        (
            f"rank {rank}",
            f"predicted {format_bytes(bytes_)}, measured {format_bytes(seen)} at most, ratio {_ratio(seen, bytes_)}",
        )
        for rank, (bytes_, seen) in enumerate(
            zip(run.predicted_bytes_by_rank, run.measured_bytes_by_rank, strict=False)
        )
    ]
    if (other := run.comparison) is not None:
        rows += [
            ("one device", f"measured {format_seconds(other.iteration_seconds)} for the same step"),
            (
                "loss curve",
                f"{_difference(other.largest_loss_difference)} one device's over {other.num_steps} steps"
                + (f", at step {other.at_step}" if other.largest_loss_difference else ""),
            ),
            ("parameters", f"{_difference(other.largest_parameter_difference)} one device's at the end"),
        ]
    if run.epochs and (metric := run.epochs[-1].metric) is not None:
        goal = "" if run.metric_goal is None else f" (the recipe promises {run.metric_goal:.4g})"
        rows.append((f"test {run.metric_name}", f"{metric:.4f}{goal}"))
    return tuple(rows)


def _difference(amount: float) -> str:
    return f"largest difference {amount:.2g} to" if amount else "largest difference 0 (bitwise equal) to"
