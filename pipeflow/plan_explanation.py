"""Why a plan costs what it costs, in words and as data: `Plan.explain`.

Decides what is said and how; the figures are those of `pipeflow.partitioners.explain`, in seconds per
micro-batch of the batch. What an iteration takes is the simulator's to say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from pipeflow.errors import PlanError
from pipeflow.partitioners import PARTITIONERS
from pipeflow.partitioners.explain import CutStory, Explanation, Shift, explain
from pipeflow.partitioners.objective import StageTerms
from pipeflow.partitioners.partition import Partition
from pipeflow.partitioners.problem import PartitionProblem
from pipeflow.plan_problem import problem_of_plan
from pipeflow.units import format_bytes, format_seconds, one_line

if TYPE_CHECKING:
    from pipeflow.execution_plan import Plan


@dataclass(frozen=True, slots=True)
class PlanExplanation:
    """The story of a plan; `str` tells it.

    Attributes:
        plan: that is explained.
        story: of its partition.
        solver: the partitioner that solved richer problems; "" where they are bounded instead.
    """

    plan: Plan
    story: Explanation
    solver: str

    def document(self) -> dict[str, Any]:
        """The story as JSON can hold it; seconds that are no number, of what is not allowed, are None."""
        data = asdict(self.story)
        for cut, told in zip(data["cuts"], self.story.cuts, strict=True):
            cut["bytes"], cut["seconds"] = told.bytes, told.seconds
            for shift in (cut["earlier"], cut["later"]):
                if shift is not None and math.isinf(shift["seconds"]):
                    shift["seconds"] = None
        for stage, term in zip(self.plan.stages, data["terms"], strict=True):
            term["layers"], term["devices"] = stage.layers, stage.devices
        return {"digest": self.plan.digest, "solver": self.solver or None, **data}

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        story, plan = self.story, self.plan
        stage, term = plan.stages[story.bottleneck], story.terms[story.bottleneck]
        yield (
            f"plan of {plan.costs.name!r}: {format_seconds(story.seconds)} per micro-batch, set by stage "
            f"{story.bottleneck} of {len(plan.stages)}: {_span(stage.layers)} on "
            f"device{'s' * (len(stage.devices) > 1)} {', '.join(map(str, stage.devices))}"
        )
        yield from (f"  {line}" for line in _stage_lines(term, stage.num_replicas, plan))
        for cut in story.cuts:
            yield ""
            yield from self._cut_lines(cut)
        if story.richer:
            yield ""
            how = f"solved again by {self.solver}" if self.solver else "at best: lower bounds"
            yield f"what more would buy ({how})"
            for richer in story.richer:
                yield f"  {richer.what:<22}{format_seconds(richer.seconds):>9}  {self._change(richer.seconds)}"

    def _cut_lines(self, cut: CutStory) -> Iterator[str]:
        yield (
            f"cut {cut.before} | {cut.after}: {_numbered('tensor', len(cut.moves))}, {format_bytes(cut.bytes)}, "
            f"{format_seconds(cut.seconds)} for one micro-batch"
        )
        largest = sorted(cut.moves, key=lambda move: -move.seconds)[:4]
        for move in largest:
            back = f" + {format_bytes(move.gradient_bytes)} back" if move.gradient_bytes else ""
            yield f"  {one_line(move.tensor)}: {format_bytes(move.bytes)}{back}, {format_seconds(move.seconds)}"
        if len(cut.moves) > len(largest):
            yield f"  and {_numbered('other', len(cut.moves) - len(largest))}"
        yield f"  one layer earlier: {self._shift(cut.earlier, cut.before)}"
        yield f"  one layer later: {self._shift(cut.later, cut.after)}"

    def _shift(self, shift: Shift | None, stage: int) -> str:
        if shift is None:
            return f"stage {stage} has nothing to give"
        if shift.obstacle:
            return f"{_span(shift.layers)} may not move: {one_line(shift.obstacle)}"
        return f"{_span(shift.layers)} moves, {format_seconds(shift.seconds)} {self._change(shift.seconds)}"

    def _change(self, seconds: float) -> str:
        before = self.story.seconds
        if math.isclose(seconds, before, rel_tol=1e-9) or not before:
            return "(no change)"
        return f"({seconds / before - 1:+.1%})"


def explain_plan(plan: Plan, partitioner: str | Callable[[PartitionProblem], Partition] | None) -> PlanExplanation:
    """Explains a plan.

    Args:
        partitioner: a name in `PARTITIONERS` or a function, which solves the problems with more of
            something; None bounds them instead, which takes no time.

    Raises:
        PlanError: an unknown name.
    """
    name = partitioner if isinstance(partitioner, str) else getattr(partitioner, "__name__", "")
    if isinstance(partitioner, str):
        if partitioner not in PARTITIONERS:
            raise PlanError(f"{partitioner!r} is no partitioner; known are {', '.join(PARTITIONERS)}")
        partitioner = PARTITIONERS[partitioner]
    story = explain(problem_of_plan(plan), plan.stages, partitioner=partitioner)
    return PlanExplanation(plan, story, name if partitioner else "")


def _stage_lines(term: StageTerms, num_replicas: int, plan: Plan) -> Iterator[str]:
    yield (
        f"compute {format_seconds(term.compute_seconds)}, transfers {format_seconds(term.transfer_seconds)} for one "
        f"micro-batch; gradients {format_seconds(term.reduce_seconds)} for each reduction; "
        f"{_numbered('replica', num_replicas)} of {plan.num_microbatches} micro-batches"
    )
    yield (
        f"memory {format_bytes(term.total_bytes)}: parameters {format_bytes(term.parameter_bytes)}, gradients "
        f"{format_bytes(term.gradient_bytes)}, optimizer {format_bytes(term.optimizer_bytes)}, activations of "
        f"{_numbered('micro-batch', term.in_flight)} {format_bytes(term.activation_bytes)}"
    )


def _numbered(noun: str, count: int) -> str:
    return f"{count} {noun}{'' if count == 1 else 'es' if noun.endswith('ch') else 's'}"


def _span(names: tuple[str, ...]) -> str:
    shown = [one_line(name) for name in (names if len(names) < 3 else (names[0], names[-1]))]
    return ", ".join(shown) if len(names) < 3 else f"{shown[0]} .. {shown[1]} ({len(names)} layers)"
