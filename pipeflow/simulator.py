"""A program run by a clock instead of devices.

    computes     the layers' seconds over the device's speed, one after the other on a rank; what is
                 recomputed runs its forward once more in B or I;
    messages     each directed pair of devices has a link of its own, first in, first out: a
                 message occupies it for bytes / bandwidth and arrives one latency later; sends
                 are posted and cost the sender nothing;
    offloading   a copy to the host starts when its forward ends, a copy back with `fetch`; each direction
                 of a device is a link of its own, as fast as `Device.host_bandwidth`; `offload` waits
                 for the one, a backward for the other;
    reductions   a ring all-reduce that starts when all replicas have reached it and their earlier
                 reductions are done, and runs beside computes; `Step` waits for it.

Every micro-batch counts as the one that the plan's costs are for. Decides nothing and proves
nothing: a program that cannot finish is handed to the verifier for its counterexample.
"""

from __future__ import annotations

import math
from collections import deque

from pipeflow.execution_plan import Plan
from pipeflow.graphs.costs import LayerCosts
from pipeflow.memory import offloaded_bytes, peak_by_rank
from pipeflow.partitioners.objective import reduce_seconds
from pipeflow.program import (
    Compute,
    Fetch,
    Kind,
    Offload,
    Program,
    Receive,
    Reduce,
    ReduceShared,
    Reduction,
    Route,
    Send,
    Step,
    ranks_of,
)
from pipeflow.timeline import Event, Timeline
from pipeflow.verifier import program_and_plan, verify
from pipeflow.wiring import Wiring, wire

__all__ = ["Event", "Timeline", "simulate"]


def simulate(plan_or_program: Plan | Program, *, plan: Plan | None = None) -> Timeline:
    """When everything happens.

    Args:
        plan_or_program: a plan, which is lowered for training; or a program.
        plan: what the program is for; needed with a program, and only then.

    Raises:
        VerificationError: the program does not run to its end.
        PlanError: the plan cannot be lowered, or a program comes without its plan.
    """
    program, plan = program_and_plan(plan_or_program, plan)
    wiring = wire(plan, program.mode)
    clock = _Clock(program, plan, wiring)
    if not clock.run():
        verify(program, plan=plan)
        raise AssertionError("a program that passes verification runs to its end")
    return Timeline(
        mode=program.mode,
        num_microbatches=program.num_microbatches,
        placement=program.placement,
        events=tuple(event for events in clock.events for event in events),
        makespan=max(clock.now),
        busy_seconds_by_rank=tuple(clock.busy),
        peak_bytes_by_rank=tuple(peak.bytes for peak in peak_by_rank(program, plan, wiring)),
        wait_seconds=dict(sorted(clock.waits.items())),
    )


class _Link:
    """A directed pair of devices: when it is free again, and the arrivals not yet received."""

    __slots__ = ("arrivals", "bandwidth", "free", "latency")

    def __init__(self, bandwidth: float, latency: float) -> None:
        self.bandwidth, self.latency = bandwidth, latency
        self.free = 0.0
        self.arrivals: deque[float] = deque()


class _HostCopies:
    """What one rank copies to the host and back, each direction in turn.

    Attributes:
        gone: when what an offload waits for has left.
        back: by (stage, micro-batch), when what was fetched is there again.
    """

    def __init__(self, program: Program, plan: Plan, wiring: Wiring, rank: int) -> None:
        self.gone: dict[Offload, float] = {a: 0.0 for a in program.actions_by_rank[rank] if isinstance(a, Offload)}
        self.back: dict[tuple[int, int], float] = {}
        bandwidth = plan.cluster.devices[rank].host_bandwidth if rank < plan.cluster.num_devices else None
        self._seconds = [amount / (bandwidth or math.inf) for amount in offloaded_bytes(plan, wiring)]
        self._out_free = self._in_free = 0.0

    def leave(self, forward: Compute, now: float) -> None:
        """Starts to copy what a forward saved, if an offload will wait for it."""
        offload = Offload(forward.stage, forward.microbatch)
        if offload in self.gone:
            self._out_free = max(now, self._out_free) + self._seconds[forward.stage]
            self.gone[offload] = self._out_free

    def fetch(self, fetch: Fetch, now: float) -> float:
        """Starts to copy it back; the time at which it is there."""
        self._in_free = max(now, self._in_free) + self._seconds[fetch.stage]
        self.back[fetch.stage, fetch.microbatch] = self._in_free
        return self._in_free


class _Clock:
    """The state of the simulation.

    A rank runs on until it waits for what is not known yet. Links and reductions depend only on
    the order of each rank's own actions, so it makes no difference which rank is run first.
    """

    def __init__(self, program: Program, plan: Plan, wiring: Wiring) -> None:
        ranks = range(program.num_ranks)
        self.program, self.plan = program, plan
        self.seconds = [_seconds_by_stage(plan, rank) for rank in ranks]
        self.payload = dict(wiring.payload_bytes)
        self.payload_by_id = {id(route): amount for route, amount in wiring.payload_bytes.items()}
        self.now = [0.0] * program.num_ranks
        self.busy = [0.0] * program.num_ranks
        self.events: list[list[Event]] = [[] for _ in ranks]
        self.waits: dict[tuple[int, int], float] = {}
        self.links: dict[tuple[int, int], _Link] = {}
        # Reductions that a rank has started and that are not known yet, and when its last one ends.
        self.started: list[deque[Reduction]] = [deque() for _ in ranks]
        self.reduction_free = [0.0] * program.num_ranks
        self.reached: dict[Reduction, dict[int, tuple[float, int]]] = {}
        self.reduced: dict[Reduction, tuple[float, int]] = {}
        self.host = [_HostCopies(program, plan, wiring, rank) for rank in ranks] if any(wiring.has_offload) else []
        self.reduced_bytes = wiring.reduced_bytes
        self.awaited = wiring.reductions_by_stage

    def run(self) -> bool:
        """Whether every rank came to its end."""
        queue = deque(range(self.program.num_ranks))
        queued = set(queue)
        while queue:
            rank = queue.popleft()
            queued.discard(rank)
            for woken in sorted(self._advance(rank) - queued):
                queue.append(woken)
                queued.add(woken)
        return all(len(e) == len(a) for e, a in zip(self.events, self.program.actions_by_rank, strict=True))

    def _advance(self, rank: int) -> set[int]:
        """Runs a rank until it waits; returns the ranks that may go on because of it."""
        woken: set[int] = set()
        events, actions, seconds = self.events[rank], self.program.actions_by_rank[rank], self.seconds[rank]
        now = self.now[rank]
        while len(events) < len(actions):
            action, start = actions[len(events)], now
            if isinstance(action, Compute):
                if self.host:
                    start = now = self._wait(rank, rank, now, self.host[rank].back.get(action[1:], now))
                now += seconds[action.stage][_column(action.kind)]
                self.busy[rank] += now - start
                if self.host and action.kind is Kind.FORWARD:
                    self.host[rank].leave(action, now)
            elif isinstance(action, Offload):
                now = self._wait(rank, rank, now, self.host[rank].gone[action])
            elif isinstance(action, Fetch):
                events.append(Event(rank, action, now, self.host[rank].fetch(action, now)))
                continue
            elif isinstance(action, Send):
                link = self._link(rank, action.peer)
                start = max(now, link.free)
                link.free = start + self._payload(action.route) / link.bandwidth
                arrival = link.free + link.latency
                link.arrivals.append(arrival)
                woken.add(action.peer)
                events.append(Event(rank, action, start, arrival))
                continue
            elif isinstance(action, Receive):
                link = self._link(action.peer, rank)
                if not link.arrivals:
                    break
                now = self._wait(rank, action.peer, now, link.arrivals.popleft())
            elif isinstance(action, Reduce | ReduceShared):
                self.reached.setdefault(action, {})[rank] = (now, len(events))
                self.started[rank].append(action)
                events.append(Event(rank, action, now, now))
                woken |= self._reduce(action)
                continue
            elif isinstance(action, Step):
                awaited = [reduction for reduction in self.awaited[action.stage] if reduction in self.reached]
                if any(reduction not in self.reduced for reduction in awaited):
                    break
                for end, latest in sorted(self.reduced[reduction] for reduction in awaited):
                    now = self._wait(rank, latest, now, end)
            events.append(Event(rank, action, start, now))
        self.now[rank] = now
        woken.discard(rank)
        return woken

    def _wait(self, rank: int, peer: int, now: float, until: float) -> float:
        """The time at which the rank goes on, with the wait attributed to the peer."""
        if until <= now:
            return now
        self.waits[rank, peer] = self.waits.get((rank, peer), 0.0) + until - now
        return until

    def _link(self, source: int, target: int) -> _Link:
        link = self.links.get((source, target))
        if link is None:
            link = self.links[source, target] = _Link(*self.plan.cluster.link(source, target))
        return link

    def _payload(self, route: Route) -> int:
        amount = self.payload_by_id.get(id(route))
        if amount is None:
            amount = self.payload_by_id[id(route)] = self.payload[route]  # the program keeps the route alive
        return amount

    def _reduce(self, reduction: Reduction) -> set[int]:
        """Settles the reduction, and those it held up, if all its ranks are there; returns them."""
        woken: set[int] = set()
        pending = [reduction]
        while pending:
            reduction = pending.pop()
            ranks = ranks_of(self.program.placement, reduction)
            if any(not self.started[r] or self.started[r][0] != reduction for r in ranks):
                continue
            reached = self.reached[reduction]
            latest = max(ranks, key=lambda r: (reached[r][0], -r))
            start = max(reached[latest][0], *(self.reduction_free[r] for r in ranks))
            amount = self.reduced_bytes.get(reduction, 0)
            end = start + reduce_seconds(self.plan.cluster, amount, ranks)
            self.reduced[reduction] = (end, latest)
            for r in ranks:
                self.started[r].popleft()
                self.reduction_free[r] = end
                index = reached[r][1]
                self.events[r][index] = self.events[r][index]._replace(start=start, end=end)
                if self.started[r]:
                    pending.append(self.started[r][0])
            woken.update(ranks)
        return woken


def _column(kind: Kind) -> int:
    if kind is Kind.FORWARD:
        return 0
    if kind is Kind.BACKWARD:
        return 1
    return 2 if kind is Kind.BACKWARD_INPUT else 3


def _seconds_by_stage(plan: Plan, rank: int) -> dict[int, tuple[float, float, float, float]]:
    """Seconds of F, B, I and W of every stage that the rank holds."""
    device = plan.cluster.devices[rank] if rank < plan.cluster.num_devices else plan.cluster.devices[0]

    def speed(layer: LayerCosts) -> float:
        return device.speed_by_kind.get(layer.kind, device.speed)

    result = {}
    for index, stage in enumerate(plan.stages):
        if rank in stage.devices:
            layers = [plan.costs.layer_by_name[name] for name in stage.layers]
            forward = math.fsum(layer.forward_seconds / speed(layer) for layer in layers)
            # Backward starts with the forward of what is recomputed for it.
            again = [plan.costs.layer_by_name[name] for name in stage.recompute]
            inputs = math.fsum(
                [layer.backward_input_seconds / speed(layer) for layer in layers]
                + [layer.forward_seconds / speed(layer) for layer in again]
            )
            weights = math.fsum(layer.backward_weight_seconds / speed(layer) for layer in layers)
            result[index] = (forward, inputs + weights, inputs, weights)
    return result
