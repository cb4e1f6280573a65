"""Parameters that layers on several stages use: who keeps copies, and what stages hold because of them.

By default layers that share parameters are colocated: they share a stage. `with_copies` gives
costs that leave them free; every stage with such a layer then keeps a copy of its own, and after
backward the gradients of all copies are added up, so that all take the same step.

    layer a ──┐ stage 0, ranks 0, 1      copies of the weight on ranks 0, 1 and 2; one sum over
              │                          the three, whatever the replicas; nothing else reduces it
    layer b ──┘ stage 1, rank 2

Knows costs and sets of layers; nothing of plans, ranks or torch.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

import networkx as nx

from pipeflow.errors import PlanError
from pipeflow.graphs.costs import GraphCosts, SharedTensor


@dataclass(frozen=True, slots=True)
class SharedGroup:
    """Trained parameters that the same stages hold copies of.

    Attributes:
        stages: indices, ascending; at least two.
        names: of the parameters.
        bytes: of one copy of all of them.
    """

    stages: tuple[int, ...]
    names: tuple[str, ...]
    bytes: int


@dataclass(frozen=True, slots=True)
class HeldBytes:
    """Parameters of a stage.

    Attributes:
        all: of every parameter that it holds.
        trained: of those that it steps.
        own: of those that it steps and no other stage holds.
    """

    all: int
    trained: int
    own: int


def with_copies(costs: GraphCosts) -> GraphCosts:
    """The costs with layers that share parameters free to be apart.

    Each of them is charged for a copy, on one stage too, since what one of two layers costs
    cannot depend on where the other is. What cannot be copied, buffers that a forward changes,
    still keeps its layers together.
    """
    if costs.sharing == "copies":
        return costs
    extra = dict.fromkeys(costs.layer_by_name, 0)
    for shared in _copied(costs):
        counted = next((n for n in shared.layers if costs.layer_by_name[n].has_backward), shared.layers[0])
        for name in shared.layers:
            extra[name] += shared.bytes if name != counted else 0
    explained = _components(costs, costs.shared)
    kept = [group for group in costs.colocated if frozenset(group) not in explained]
    stuck = _components(costs, [shared for shared in costs.shared if not shared.is_copyable])
    position = costs.position_by_layer
    return costs.model_copy(
        update={
            "sharing": "copies",
            "colocated": (*kept, *(tuple(sorted(group, key=position.__getitem__)) for group in stuck)),
            "layers": tuple(
                layer.model_copy(update={"parameter_bytes": layer.parameter_bytes + extra[layer.name]})
                for layer in costs.layers
            ),
        }
    )


def share(costs: GraphCosts, shared: str) -> GraphCosts:
    """The costs with shared parameters kept "together", or with "copies".

    Raises:
        PlanError: it is neither, or the costs are for copies already.
    """
    if shared == "copies":
        return with_copies(costs)
    if shared != "together":
        raise PlanError(f"shared={shared!r}; layers that share parameters stay 'together', or stages keep 'copies'")
    if costs.sharing != "together":
        raise PlanError(f"the costs of {costs.name!r} are for copies of shared parameters; pass shared='copies'")
    return costs


def _copied(costs: GraphCosts) -> list[SharedTensor]:
    return [shared for shared in costs.shared if shared.is_copyable]


def _components(costs: GraphCosts, shared: Sequence[SharedTensor]) -> list[frozenset[str]]:
    """The layers that are joined by what they share, in the order of the graph."""
    graph: nx.Graph[str] = nx.Graph()
    for tensor in shared:
        graph.add_edges_from(pairwise(tensor.layers))
    position = costs.position_by_layer
    return sorted(
        map(frozenset, nx.connected_components(graph)), key=lambda group: min(position[name] for name in group)
    )


def shared_groups(costs: GraphCosts, stages: Sequence[Collection[str]]) -> tuple[SharedGroup, ...]:
    """What several stages hold copies of, by the stages that do, in ascending order.

    Args:
        stages: the layers of each.
    """
    if costs.sharing == "together":
        return ()
    stage_of = {layer: index for index, layers in enumerate(stages) for layer in layers}
    groups: dict[tuple[int, ...], list[SharedTensor]] = {}
    for shared in _copied(costs):
        held = tuple(sorted({stage_of[layer] for layer in shared.layers}))
        if shared.is_trained and len(held) > 1:
            groups.setdefault(held, []).append(shared)
    return tuple(
        SharedGroup(held, tuple(s.name for s in tensors), sum(s.bytes for s in tensors))
        for held, tensors in sorted(groups.items())
    )


def held_bytes(costs: GraphCosts, stages: Sequence[Collection[str]]) -> tuple[HeldBytes, ...]:
    """The parameters of every stage, each counted once where several of its layers use it.

    Args:
        stages: the layers of each.
    """
    groups = shared_groups(costs, stages)
    result = []
    for index, names in enumerate(stages):
        layers = [costs.layer_by_name[name] for name in names]
        total = sum(layer.parameter_bytes for layer in layers)
        trained = sum(layer.parameter_bytes for layer in layers if layer.has_backward)
        for shared in _copied(costs) if costs.sharing == "copies" else ():
            users = [costs.layer_by_name[name] for name in shared.layers if name in names]
            learners = sum(layer.has_backward for layer in users)
            if users:
                total -= (len(users) - 1) * shared.bytes
                trained += ((shared.is_trained or learners > 0) - learners) * shared.bytes
        own = trained - sum(group.bytes for group in groups if index in group.stages)
        result.append(HeldBytes(total, trained, own))
    return tuple(result)
