"""What layers computed, put together in the order of the batch.

Each micro-batch's outputs lie with the rank that computed them; here they come to every rank that
asks. A batch that came whole is given back whole, micro-batches that came one by one are given
back one by one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from pipeflow.errors import EngineError
from pipeflow.execution_plan import Plan
from pipeflow.graphs.layer_graph import LayerGraph
from pipeflow.graphs.sizes import size_of
from pipeflow.program import rank_of
from pipeflow.runtime.cut import LengthPairs
from pipeflow.runtime.distributed import DistributedTransport
from pipeflow.runtime.microbatch import MicroBatches
from pipeflow.runtime.rank_state import RankState
from pipeflow.runtime.state import needed_layers


def check_outputs(graph: LayerGraph, outputs: Iterable[str] | None, *, whole: bool) -> tuple[str, ...]:
    """The names of what is to be given back, if it can be as the batch came.

    Args:
        outputs: tensors that layers compute; None for those of the graph.
        whole: whether the batch came whole.

    Raises:
        EngineError: the names are one text, no layer computes one; or outputs of micro-batches
            cannot be joined along their first dimension.
    """
    if isinstance(outputs, str):
        raise EngineError(f"outputs={outputs!r} is text; give a list of names, for example [{outputs!r}]")
    names = tuple(graph.outputs if outputs is None else outputs)
    needed_layers(graph, names)
    for name in names if whole else ():
        spec = graph.specs[name]
        if not spec.shape or not size_of(spec.shape[0]).batch:
            raise EngineError(
                f"output {name!r} is {spec}, whose first dimension is not the batch, so what micro-batches give cannot "
                "be joined; give a list of micro-batches, of one if need be, and it is given for each"
            )
    return names


def gather_outputs(
    graph: LayerGraph,
    plan: Plan,
    names: Sequence[str],
    microbatches: MicroBatches,
    states: Mapping[int, RankState],
    remote: DistributedTransport | None,
) -> dict[str, Tensor] | list[dict[str, Tensor]]:
    """The outputs of the last run, on every rank.

    Args:
        names: what was kept.
        microbatches: what was run.
        states: of the ranks in this process.
        remote: this rank's end, where each rank is a process. All of them call this.
    """
    producer = {tensor: layer.name for layer in graph.layers.values() for tensor in layer.outputs}
    gathered: dict[str, list[Tensor | None]] = {}
    for name in names:
        stage = plan.stage_by_layer[producer[name]]
        parts = gathered[name] = []
        for m, size in enumerate(microbatches.cut.sizes):
            owner = rank_of(plan.placement, stage, m)
            kept = states[owner].outputs[name][m] if size and owner in states else None
            if size and remote is not None:
                kept = remote.give(kept, name, m, owner)
            parts.append(kept)
    return arrange_outputs(graph, gathered, microbatches)


def arrange_outputs(
    graph: LayerGraph, parts_by_name: Mapping[str, Sequence[Tensor | None]], microbatches: MicroBatches
) -> dict[str, Tensor] | list[dict[str, Tensor]]:
    """The outputs as the batch came: whole, or for each micro-batch that was given.

    Args:
        parts_by_name: for each micro-batch what it gave, None for those without samples.
    """
    if isinstance(microbatches.given, Mapping):
        present = {name: [p for p in parts if p is not None] for name, parts in parts_by_name.items()}
        return {name: torch.cat([p.to(parts[0].device) for p in parts]) for name, parts in present.items()}
    arranged: list[dict[str, Tensor]] = [{} for _ in microbatches.given]
    for name, parts in parts_by_name.items():
        device = next(part.device for part in parts if part is not None)
        for m, outputs in enumerate(arranged):
            part = parts[m]
            outputs[name] = _empty(graph, name, microbatches.cut.lengths[m], device) if part is None else part
    return arranged


def _empty(graph: LayerGraph, name: str, lengths: LengthPairs, device: torch.device) -> Tensor:
    """What a micro-batch without samples gives; lengths that layers would have made of it are 0."""
    spec = graph.specs[name]
    sizes = {**dict.fromkeys(spec.lengths, 0), **dict(lengths)}
    return torch.empty(spec.shape_at(0, sizes), dtype=getattr(torch, spec.dtype), device=device)
