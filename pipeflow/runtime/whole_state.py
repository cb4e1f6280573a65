"""The state of the whole model, put together from the stages that hold it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from pipeflow.execution_plan import Plan
from pipeflow.graphs.layer_graph import LayerGraph
from pipeflow.runtime.distributed import DistributedTransport
from pipeflow.runtime.precision import Precision
from pipeflow.runtime.replica import StageReplica


def gather_state(
    graph: LayerGraph,
    plan: Plan,
    precision: Precision,
    replicas: Mapping[int, Mapping[int, StageReplica]],
    remote: DistributedTransport | None,
) -> dict[str, Tensor]:
    """Copies of all parameters and persistent buffers, on the CPU, on every rank.

    Args:
        precision: for the types in which they are held.
        replicas: of the ranks in this process, by rank and stage.
        remote: this rank's end, where each rank is a process. All of them call this.
    """
    result = {}
    for name, spec in {**graph.parameters, **graph.buffers}.items():
        stage = plan.stage_by_layer[graph.owner(name)]
        owner = plan.stages[stage].devices[0]
        own = replicas[owner][stage].tensors()[name] if owner in replicas else None
        if remote is None:
            assert own is not None
            result[name] = own.detach().to("cpu", copy=True)
        else:
            result[name] = remote.give_shaped(own, spec.shape_at(1), precision.stored(spec), owner).cpu()
    return result
