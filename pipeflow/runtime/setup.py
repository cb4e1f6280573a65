"""What the ranks of an engine are set up with, and how a process of several becomes one of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from pipeflow.errors import EngineError
from pipeflow.execution_plan import Plan
from pipeflow.graphs.layer_graph import LayerGraph
from pipeflow.graphs.numerics import Numerics
from pipeflow.program import Send
from pipeflow.runtime.copies import Copies
from pipeflow.runtime.distributed import DistributedTransport, connect
from pipeflow.runtime.gradients import GradientPolicy
from pipeflow.runtime.parameter_groups import Grouping
from pipeflow.runtime.precision import Precision
from pipeflow.runtime.prepared import Prepared
from pipeflow.runtime.replica import OptimizerFactory, SchedulerFactory
from pipeflow.runtime.running_statistics import BatchNormChoice


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
    def digest(self) -> str:
        """Of all that ranks must agree on."""
        settings = [
            self.plan.digest,
            self.graph.digest,
            self.seed,
            bool(self.optimizers),
            self.precision.digest,
            self.batch_norm,
        ]
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


def join(setup: Setup) -> DistributedTransport:
    """Makes this process a rank of the job that it was launched in. Collective.

    Raises:
        EngineError: the job has another number of ranks than the plan.
        PlanMismatch: the ranks hold different plans or settings.
    """
    connect()
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    if world_size != setup.plan.num_ranks:
        raise EngineError(
            f"the job has {world_size} ranks and the plan {setup.plan.num_ranks}; start with "
            f"--nproc-per-node {setup.plan.num_ranks}, or plan for {world_size} devices"
        )
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
        digest=setup.digest,
        device=setup.devices[rank],
    )
