"""Which tensors cross between stages, and in which order their gradients are summed.

Decides from (costs, stages) alone: the routes of activations, the routes of gradients, and
for every tensor with several readers the order in which the readers' gradients add up.
Knows nothing of ranks, micro-batches or schedules.

Floating-point addition does not associate, so the order matters where a tensor has three
readers or more. On one device autograd adds the readers' gradients from the last reader in
execution order to the first:

    gradient = ((g_last + ... ) + g_2) + g_1                                            [1]

A cut must not change it. Readers that follow each other at the end of the order may be added
where they are, since [1] adds them first; other readers that share a stage are only added
there while [1] is kept, and otherwise each sends its own part. Two addends commute, so the
common cases (a chain, a skip with one or two readers) never send parts.

A reader is a layer. One that uses its input several times inside adds those gradients up by
itself: the runtime and the reference give every reader a view of its own for that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeflow.graphs.costs import GraphCosts
from pipeflow.program import Direction, Route


@dataclass(frozen=True, slots=True)
class Part:
    """Readers of one tensor that one stage adds up by itself, as autograd does.

    Attributes:
        name: the payload name of their gradient: the tensor's if it is the only part that is sent,
            else `tensor#index`.
        stage: where they are.
        readers: layer names, in the graph's order.
    """

    name: str
    stage: int
    readers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Flow:
    """One tensor on its way.

    Attributes:
        tensor: its name.
        source: the stage of its producer; None for an input of the graph.
        targets: the other stages that read it, in stage order.
        parts: where its gradient comes from, in the order [1] reversed: the gradient is the sum
            from the last part to the first. Empty where no gradient is needed. Parts of the
            source's own readers are included.
    """

    tensor: str
    source: int | None
    targets: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def is_natural(self) -> bool:
        """Whether plain autograd on the source stage sums in the order [1].

        It adds what arrives from outside first, then the stage's own readers from last to
        first. That is [1] where the stage's own readers come before all others; and any order
        is right for two addends.
        """
        local = [part.stage == self.source for part in self.parts]
        return sum(len(part.readers) for part in self.parts) <= 2 or local == sorted(local, reverse=True)


def flows(costs: GraphCosts, stages: Sequence[Sequence[str]]) -> Mapping[str, Flow]:
    """The flow of every tensor that somebody reads, by name.

    Args:
        costs: the graph.
        stages: the layers of each stage; together all layers, each once.
    """
    stage_by_layer = {layer: s for s, layers in enumerate(stages) for layer in layers}
    result = {}
    for tensor, readers in costs.consumers_by_tensor.items():
        if not readers:
            continue
        producer = costs.producer_by_tensor.get(tensor)
        source = None if producer is None else stage_by_layer[producer]
        targets = sorted({stage_by_layer[layer] for layer in readers} - {source})
        parts: tuple[Part, ...] = ()
        if producer is not None and costs.tensor_by_name[tensor].gradient_bytes:
            learners = tuple(layer for layer in readers if costs.layer_by_name[layer].has_backward)
            parts = _parts(tensor, learners, source, stage_by_layer)
        result[tensor] = Flow(tensor, source, tuple(targets), parts)
    return result


def _parts(
    tensor: str, readers: tuple[str, ...], source: int | None, stage_by_layer: Mapping[str, int]
) -> tuple[Part, ...]:
    """Groups readers so that adding within groups, then groups from last to first, is [1]."""
    stages = [stage_by_layer[layer] for layer in readers]
    groups: list[list[str]] = []
    if len(set(stages)) <= 1:
        groups = [list(readers)] if readers else []
    else:
        # The longest run of equal stages at the end adds up first in [1], so it may be one part.
        tail = len(readers)
        while tail and stages[tail - 1] == stages[-1]:
            tail -= 1
        groups = [[layer] for layer in readers[:tail]] + [list(readers[tail:])]
    outside = [index for index, group in enumerate(groups) if stage_by_layer[group[0]] != source]
    return tuple(
        Part(
            name=tensor if outside == [index] else f"{tensor}#{index}",
            stage=stage_by_layer[group[0]],
            readers=tuple(group),
        )
        for index, group in enumerate(groups)
    )


def routes(flow_by_tensor: Mapping[str, Flow]) -> tuple[Route, ...]:
    """Everything that crosses between stages: one route per pair of stages and direction.

    Inputs of the graph are not routed: every rank takes its own from the batch. Payloads are in
    the graph's order; routes in the order (source, target), forward before backward.
    """
    forward: dict[tuple[int, int], list[str]] = {}
    backward: dict[tuple[int, int], list[str]] = {}
    for flow in flow_by_tensor.values():
        if flow.source is None:
            continue
        for target in flow.targets:
            forward.setdefault((flow.source, target), []).append(flow.tensor)
        for part in flow.parts:
            if part.stage != flow.source:
                backward.setdefault((part.stage, flow.source), []).append(part.name)
    return tuple(
        Route(direction, source, target, tuple(payload))
        for direction, table in ((Direction.FORWARD, forward), (Direction.BACKWARD, backward))
        for (source, target), payload in sorted(table.items())
    )
