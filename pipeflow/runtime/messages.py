"""What travels: which tensors a route needs in this executor, and which of them are sent.

Both ends of a channel ask the same questions here and so agree on every message. Knows stages,
ranks and names; no tensors, no transport.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pipeflow.flows import Flow, routes
from pipeflow.program import Direction, Placement, Route, rank_of


@dataclass(frozen=True, slots=True)
class Messages:
    """The messages of one executor.

    Attributes:
        placement: ranks of each stage's replicas.
        flow_by_tensor: of the plan.
        carried: (tensor, target stage) pairs that a forward transfer carries; others stay behind.
    """

    placement: Placement
    flow_by_tensor: Mapping[str, Flow]
    carried: frozenset[tuple[str, int]]
    _routes_from: Mapping[tuple[Direction, int], tuple[Route, ...]] = field(init=False)

    def __post_init__(self) -> None:
        table: dict[tuple[Direction, int], tuple[Route, ...]] = {}
        for route in routes(self.flow_by_tensor):
            key = (route.direction, route.source)
            table[key] = (*table.get(key, ()), route)
        object.__setattr__(self, "_routes_from", table)

    def routes_to_rank(self, direction: Direction, stage: int, microbatch: int, rank: int) -> list[Route]:
        """The stage's routes that end on the rank for the micro-batch."""
        return [
            route
            for route in self._routes_from.get((direction, stage), ())
            if rank_of(self.placement, route.target, microbatch) == rank
        ]

    def routes_to_others(self, stage: int, microbatch: int, rank: int) -> list[Route]:
        """The stage's routes of activations that do not end on the rank for the micro-batch."""
        return [
            route
            for route in self._routes_from.get((Direction.FORWARD, stage), ())
            if rank_of(self.placement, route.target, microbatch) != rank
        ]

    def needed(self, route: Route) -> tuple[str, ...]:
        """What the route's target needs of it."""
        if route.direction is Direction.BACKWARD:
            return route.payload
        return tuple(t for t in route.payload if (t, route.target) in self.carried)

    def sent(self, route: Route, microbatch: int) -> tuple[str, ...]:
        """What is sent on the route.

        A rank that runs several stages is sent a tensor once, for the nearest that needs it: that
        message is the first of them, since a stage's sends go to the nearest first (`pipeflow.wiring`).
        """
        names = self.needed(route)
        for other in self._beside(route, microbatch):
            if _distance(other) < _distance(route):
                there = self.needed(other)
                names = tuple(t for t in names if t not in there)
        return names

    def shared(self, route: Route, microbatch: int) -> list[tuple[int, frozenset[str]]]:
        """(stage, names) of other stages on the target's rank that take some of what the route is sent."""
        names = frozenset(self.sent(route, microbatch))
        further = [r for r in self._beside(route, microbatch) if _distance(r) > _distance(route)]
        return [(r.target, common) for r in further if (common := names.intersection(self.needed(r)))]

    def _beside(self, route: Route, microbatch: int) -> list[Route]:
        """The other routes of activations from the stage to the rank that this one goes to."""
        if route.direction is Direction.BACKWARD:
            return []
        peer = rank_of(self.placement, route.target, microbatch)
        every = self.routes_to_rank(Direction.FORWARD, route.source, microbatch, peer)
        return [other for other in every if other.target != route.target]


def _distance(route: Route) -> tuple[int, int]:
    return abs(route.target - route.source), route.target
