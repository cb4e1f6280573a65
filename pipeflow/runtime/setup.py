"""What the ranks of an engine are set up with, and how a process of several becomes one of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from pipeflow.errors import EngineError
from pipeflow.execution_plan import Plan
from pipeflow.graphs.layer_graph import LayerGraph
from pipeflow.graphs.numerics import Numerics
from pipeflow.program import Send
from pipeflow.runtime.copies import Copies, find_copies
from pipeflow.runtime.devices import check_present, resolve_devices
from pipeflow.runtime.distributed import DistributedTransport
from pipeflow.runtime.gradients import GradientPolicy, NonFinite
from pipeflow.runtime.meeting import Meeting, check_same, plain_text
from pipeflow.runtime.options import check_clip_value, check_seed, check_trains
from pipeflow.runtime.parameter_groups import Grouping, ParameterGroups, check_groups
from pipeflow.runtime.phases import for_each_phase
from pipeflow.runtime.precision import Precision
from pipeflow.runtime.prepared import Prepared, in_types, prepare
from pipeflow.runtime.replica import OptimizerFactory, SchedulerFactory
from pipeflow.runtime.running_statistics import BatchNormChoice, check_choice


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """The settings of an engine, checked; all ranks have the same.

    Attributes:
        prepared: by phase, what runs.
        copies: of parameters, on several stages.
        optimizers, schedulers: by phase.
        policy: what to do with gradients before a step.
        devices: one for each rank.
        measure: whether steps are timed.
    """

    graph: LayerGraph
    plan: Plan
    prepared: Mapping[str | None, Prepared]
    copies: Copies
    optimizers: Mapping[str | None, OptimizerFactory]
    schedulers: Mapping[str | None, SchedulerFactory]
    groups: Grouping
    policy: GradientPolicy
    precision: Precision
    numerics: Numerics
    batch_norm: BatchNormChoice
    seed: int
    devices: tuple[torch.device, ...]
    measure: bool

    @property
    def settings(self) -> dict[str, str]:
        """All that ranks must agree on, by the name of the option."""
        return {
            "plan": self.plan.digest[:12],
            "graph": f"{self.graph.name!r} {self.graph.digest[:12]}",
            "optimizer": _given(self.optimizers),
            "lr_scheduler": _given(self.schedulers),
            "parameter_groups": plain_text(self.groups.options_by_pattern),
            "clip_norm": plain_text(self.policy.clip_norm),
            "clip_value": plain_text(self.policy.clip_value),
            "nonfinite": plain_text(self.policy.nonfinite),
            "precision": self.precision.model_dump_json(),
            "batch_norm": self.batch_norm,
            "seed": str(self.seed),
            "measure": str(self.measure),
        }


def _given(factories: Mapping[str | None, object]) -> str:
    """For which phases there are factories."""
    phases = [phase for phase in factories if phase is not None]
    return f"given for {', '.join(phases)}" if phases else "given" if factories else "None"


def make_setup(
    graph: LayerGraph,
    plan: Plan,
    optimizer: OptimizerFactory | Mapping[str, OptimizerFactory] | None,
    *,
    lr_scheduler: SchedulerFactory | Mapping[str, SchedulerFactory] | None,
    parameter_groups: ParameterGroups | None,
    clip_norm: float | None,
    clip_value: float | None,
    nonfinite: NonFinite,
    precision: Precision | None,
    batch_norm: BatchNormChoice,
    seed: int,
    devices: Sequence[torch.device | str] | None,
    measure: bool,
    num_ranks: int | None,
) -> Setup:
    """The settings of an engine from what it is given, as `pipeflow.Engine` describes it.

    Args:
        num_ranks: of the job; None where all ranks are in this process.

    Raises:
        PlanError: the plan is for another graph, or asks for what this version does not run.
        VerificationError: the plan would not run to its end.
        EngineError: an option is none, or contradicts another; or a device or rank is not there.
    """
    prepared = prepare(graph, plan, synchronised=check_choice(batch_norm) == "synchronised")
    if num_ranks is not None:
        check_job(plan, num_ranks)
    precision = precision or Precision()
    training = {
        "lr_scheduler": lr_scheduler,
        "parameter_groups": parameter_groups or None,
        "clip_norm": clip_norm,
        "clip_value": clip_value,
        "nonfinite": None if nonfinite == "ignore" else nonfinite,
        "a loss scale": precision.loss_scale,
    }
    check_trains(optimizer, training)
    check_clip_value(clip_value, graph)
    own_devices = resolve_devices(plan, devices, distributed=num_ranks is not None)
    numerics = precision.numerics_on(own_devices)
    check_present(own_devices, distributed=num_ranks is not None)
    return Setup(
        graph=graph,
        plan=plan,
        prepared=in_types(prepared, numerics),
        copies=find_copies(graph, plan),
        optimizers=for_each_phase(graph, optimizer, "optimizer"),
        schedulers=for_each_phase(graph, lr_scheduler, "lr_scheduler"),
        groups=check_groups(parameter_groups, graph),
        policy=GradientPolicy(
            clip_norm=clip_norm,
            clip_value=clip_value,
            nonfinite=nonfinite,
            loss_scaled=precision.loss_scale is not None,
        ),
        precision=precision,
        numerics=numerics,
        batch_norm=batch_norm,
        seed=check_seed(seed),
        devices=own_devices,
        measure=measure,
    )


def join(setup: Setup, meeting: Meeting) -> DistributedTransport:
    """Makes this process a rank of the job. Collective.

    Raises:
        PlanMismatch: the ranks hold different plans or settings.
    """
    check_same(meeting, setup.settings)
    channels = sorted(
        {
            (source, action.peer)
            for prepared in setup.prepared.values()
            for program in prepared.programs.values()
            for source, actions in enumerate(program.actions_by_rank)
            for action in actions
            if isinstance(action, Send)
        }
    )
    return DistributedTransport(
        setup.plan.placement,
        channels,
        dict(setup.prepared[None].graph.specs),
        sharing=setup.copies.ranks_by_stages(setup.plan.placement),
        meeting=meeting,
        device=setup.devices[meeting.rank],
    )


def check_job(plan: Plan, num_ranks: int) -> None:
    """Whether the job has as many ranks as the plan. Raises EngineError."""
    if num_ranks != plan.num_ranks:
        raise EngineError(
            f"the job has {num_ranks} ranks and the plan {plan.num_ranks}; start with "
            f"--nproc-per-node {plan.num_ranks}, or plan for {num_ranks} devices"
        )
