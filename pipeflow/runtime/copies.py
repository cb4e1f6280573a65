"""Copies of shared parameters: which stage keeps the one that counts, and who sums with whom.

Every stage with a layer that uses a shared parameter holds a copy. All copies start alike, are
given the same sum of gradients, and take the same step of optimizers in the same state, so they
stay alike to the last bit. The one on the stage of its first user is the parameter: its gradient
is in the norm, it and its optimizer state are saved; a checkpoint is loaded into all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from pipeflow.errors import PlanError
from pipeflow.execution_plan import Plan
from pipeflow.graphs.layer_graph import LayerGraph
from pipeflow.graphs.sharing import shared_groups
from pipeflow.program import Placement, ReduceShared, ranks_of
from pipeflow.runtime.distributed import DistributedTransport
from pipeflow.runtime.precision import Precision
from pipeflow.runtime.replica import StageReplica


@dataclass(frozen=True, slots=True)
class Copies:
    """What a plan keeps copies of.

    Attributes:
        names_by_stages: trained parameters, by the stages that hold them.
        owner_by_name: the stage that counts and saves, of every parameter and saved buffer on several.
    """

    names_by_stages: Mapping[tuple[int, ...], tuple[str, ...]]
    owner_by_name: Mapping[str, int]

    def mark(self, replica: StageReplica, stage: int) -> None:
        """Tells a replica of the stage which of its tensors are copies."""
        replica.copied = frozenset(n for held, names in self.names_by_stages.items() if stage in held for n in names)
        replica.borrowed = frozenset(n for n, owner in self.owner_by_name.items() if owner != stage)

    def ranks_by_stages(self, placement: Placement) -> dict[tuple[int, ...], tuple[int, ...]]:
        """The ranks of each sum over several stages."""
        return {stages: ranks_of(placement, ReduceShared(stages)) for stages in self.names_by_stages}

    def agree(
        self,
        graph: LayerGraph,
        placement: Placement,
        replicas: Mapping[int, StageReplica],
        remote: DistributedTransport,
        precision: Precision,
    ) -> None:
        """Gives all copies the value of their owner's first replica. Collective over all ranks.

        Args:
            replicas: of this rank, by stage.
            precision: for the types in which they are held.
        """
        specs = {**graph.parameters, **graph.buffers}
        for name, stage in self.owner_by_name.items():
            rank = placement[stage][0]
            own = replicas[stage].tensors()[name] if rank == remote.rank else None
            value = remote.give_shaped(own, specs[name].shape_at(1), precision.stored(specs[name]), rank)
            for replica in replicas.values():
                if name in replica.borrowed and name in (tensors := replica.tensors()):
                    with torch.no_grad():
                        tensors[name].copy_(value)
                    replica.written()


def find_copies(graph: LayerGraph, plan: Plan) -> Copies:
    """What the plan keeps copies of.

    Raises:
        PlanError: layers that share something are on several stages, and the plan's costs do not
            know how to keep copies of it.
    """
    known = {shared.name for shared in plan.costs.shared if shared.is_copyable and plan.shared == "copies"}
    saved = {**graph.parameters, **graph.buffers}
    owners = {}
    for shared in graph.shared:
        stages = sorted({plan.stage_by_layer[layer] for layer in shared.layers})
        if len(stages) == 1:
            continue
        if shared.name not in known:
            raise PlanError(
                f"layers {', '.join(shared.layers)} share {shared.name!r} and are on stages "
                f"{', '.join(map(str, stages))}, which the plan's costs know nothing of; profile the graph and plan "
                "with those costs, with shared='copies' to keep the layers apart"
            )
        if shared.name in saved:
            owners[shared.name] = plan.stage_by_layer[graph.owner(shared.name)]
    groups = shared_groups(plan.costs, [stage.layers for stage in plan.stages])
    return Copies({group.stages: group.names for group in groups}, owners)
