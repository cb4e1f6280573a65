"""From an order of computes to a program: each pass adds one kind of action.

    compute order -> drop what is not needed -> sends -> receives -> frees -> offloads -> reductions, steps

Decides where communication stands in each rank's sequence. It never changes the order of the
computes, and knows nothing of time, devices or tensors' contents.

What crosses between two stages on the same rank is handed over where it is produced: there is
no action for it, and from then on it belongs to the consuming stage (a `Free` of the producing
stage does not take it away).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from pipeflow.errors import PipeflowError, PlanError
from pipeflow.execution_plan import Plan
from pipeflow.program import (
    Action,
    Compute,
    Fetch,
    Free,
    Kind,
    Mode,
    Offload,
    Program,
    Receive,
    Reduce,
    Route,
    Send,
    Step,
    rank_of,
)
from pipeflow.schedules import OrderFunction, Schedule, forward_order, resolve_schedule
from pipeflow.wiring import Wiring, routes_of, wire

__all__ = ["lower", "routes_of"]

Actions = Sequence[Sequence[Action]]
"""The actions of each rank, between two passes."""


def lower(plan: Plan, *, mode: Mode = Mode.TRAIN, schedule: str | Schedule | OrderFunction | None = None) -> Program:
    """The program of a plan: what every rank does, in order.

    Args:
        plan: what is where.
        mode: for training, or forward alone (evaluation, prediction).
        schedule: instead of the plan's own; in `Mode.INFER` the default is plain forward order.

    Raises:
        PlanError: an unknown schedule, one whose order is not complete, or a plan that asks for
            what cannot be executed (see `pipeflow.wiring.wire`).
    """
    wiring = wire(plan, mode)
    actions: Actions = compute_order(plan, wiring, schedule)
    passes: tuple[Callable[[Actions, Wiring], Actions], ...]
    passes = (add_sends, add_receives, add_frees, add_offloads, add_reductions)
    for add in passes:
        actions = add(actions, wiring)
    return Program(
        mode=mode,
        num_microbatches=plan.num_microbatches,
        placement=plan.placement,
        actions_by_rank=tuple(tuple(rank) for rank in actions),
    )


def compute_order(
    plan: Plan, wiring: Wiring, schedule: str | Schedule | OrderFunction | None = None
) -> tuple[tuple[Compute, ...], ...]:
    """What each rank computes: the schedule's order without the backwards that nothing needs.

    Raises:
        PlanError: a compute is missing, stands twice or is on another rank than its replica's.
    """
    order: OrderFunction
    if schedule is None and wiring.mode is Mode.INFER:
        name, order = "forward", forward_order
    else:
        row = resolve_schedule(plan.schedule) if schedule is None else resolve_schedule(schedule, allow=None)
        name, order = row.name, row.order
    has_backward = wiring.has_backward
    try:
        result = tuple(
            tuple(c for c in computes if c.kind is Kind.FORWARD or has_backward[c.stage])
            for computes in order(plan.placement, plan.num_microbatches)
        )
        _check_order(name, result, wiring)
    except PipeflowError:
        raise
    except Exception as error:  # a function of anybody's, and whatever it gives
        raise PlanError(
            f"schedule {name!r} fails for {wiring.num_stages} stages and {wiring.num_microbatches} micro-batches: "
            f"{type(error).__name__}: {error}; it must give every rank a tuple of the `Compute`s of its stages"
        ) from error
    return result


def _check_order(name: str, order: Sequence[Sequence[Compute]], wiring: Wiring) -> None:
    """Every micro-batch on every stage: one F, and one B or one I and one W; on its rank."""
    if len(order) != wiring.num_ranks:
        raise PlanError(f"schedule {name!r} orders {len(order)} ranks; the placement has {wiring.num_ranks}")
    counts = {kind: [bytearray(wiring.num_microbatches) for _ in wiring.placement] for kind in Kind}
    for rank, computes in enumerate(order):
        for compute in computes:
            kind, stage, microbatch = compute
            if stage < 0 or microbatch < 0:
                raise PlanError(
                    f"schedule {name!r} orders {compute} on rank {rank}; stages and micro-batches count from 0"
                )
            ranks = wiring.placement[stage]
            if ranks[microbatch % len(ranks)] != rank:
                raise PlanError(
                    f"schedule {name!r} puts {compute} on rank {rank}; its replica is on "
                    f"rank {rank_of(wiring.placement, stage, microbatch)}"
                )
            counts[kind][stage][microbatch] += 1
    for stage in range(wiring.num_stages):
        forward, backward, inputs, weights = (counts[kind][stage] for kind in Kind)
        whole = int(wiring.has_backward[stage])
        for m in range(wiring.num_microbatches):
            if forward[m] != 1 or backward[m] + inputs[m] != whole or inputs[m] != weights[m]:
                raise PlanError(
                    f"schedule {name!r} computes stage {stage}, micro-batch {m}: {forward[m]} F, {backward[m]} B, "
                    f"{inputs[m]} I, {weights[m]} W; it needs one F and one B (or one I and one W)"
                )


def add_sends(actions: Actions, wiring: Wiring) -> Actions:
    """Sends each result right after the compute that gives it, to the nearest stage first.

    Gradients leave after B, or after I where backward is split. Nothing is sent to the rank itself.
    """
    placement = wiring.placement

    def of_rank(rank: int, computes: Iterable[Action]) -> Iterable[Action]:
        for action in computes:
            yield action
            if isinstance(action, Compute):
                kind, stage, microbatch = action
                for route in _by_kind(kind, wiring.forward_out[stage], wiring.gradient_out[stage]):
                    ranks = placement[route.target]
                    peer = ranks[microbatch % len(ranks)]
                    if peer != rank:
                        yield Send(route, microbatch, peer)

    return [list(of_rank(rank, computes)) for rank, computes in enumerate(actions)]


def add_receives(actions: Actions, wiring: Wiring) -> Actions:
    """Receives each payload before the compute that needs it, in the sender's order.

    A channel (one rank to another) is first in, first out. A compute that needs the k-th message
    of a channel therefore has all earlier ones received first. That adds no cyclic wait while
    sends never block: the sender posts the earlier messages before the k-th, so whoever waits
    for the k-th waits for them anyway.
    """
    placement = wiring.placement
    number = {id(route): i for i, route in enumerate(wiring.routes)}
    channels: dict[tuple[int, int], list[Send]] = {}
    index: list[list[int]] = [[-1] * wiring.num_microbatches for _ in wiring.routes]
    for rank, of_rank in enumerate(actions):
        for action in of_rank:
            if isinstance(action, Send):
                channel = channels.setdefault((rank, action.peer), [])
                index[number[id(action.route)]][action.microbatch] = len(channel)
                channel.append(action)

    def with_index(incoming: Sequence[Sequence[Route]]) -> list[list[tuple[Route, list[int]]]]:
        return [[(route, index[number[id(route)]]) for route in routes] for routes in incoming]

    forward_in, gradient_in = with_index(wiring.forward_in), with_index(wiring.gradient_in)
    result: list[list[Action]] = []
    for rank, of_rank in enumerate(actions):
        received: dict[int, int] = {}
        out: list[Action] = []
        for action in of_rank:
            if isinstance(action, Compute):
                kind, stage, microbatch = action
                for route, index_by_microbatch in _by_kind(kind, forward_in[stage], gradient_in[stage]):
                    ranks = placement[route.source]
                    peer = ranks[microbatch % len(ranks)]
                    if peer == rank:
                        continue
                    start = received.get(peer, 0)
                    stop = index_by_microbatch[microbatch] + 1
                    if start < stop:
                        out += [Receive(s.route, s.microbatch, peer) for s in channels[peer, rank][start:stop]]
                        received[peer] = stop
            out.append(action)
        result.append(out)
    return result


_Item = TypeVar("_Item")


def _by_kind(kind: Kind, forward: Sequence[_Item], gradient: Sequence[_Item]) -> Sequence[_Item]:
    """What crosses at a compute: activations at F, gradients at B or I, nothing at W."""
    if kind is Kind.FORWARD:
        return forward
    return () if kind is Kind.BACKWARD_WEIGHT else gradient


def add_frees(actions: Actions, wiring: Wiring) -> Actions:
    """Frees a micro-batch on a stage after its last compute there and the sends of that compute."""
    result: list[list[Action]] = []
    for of_rank in actions:
        last = {
            (action.stage, action.microbatch): position
            for position, action in enumerate(of_rank)
            if isinstance(action, Compute)
        }
        ends = {position: Free(stage, microbatch) for (stage, microbatch), position in last.items()}
        out: list[Action] = []
        pending: Free | None = None
        for position, action in enumerate(of_rank):
            if pending is not None and not isinstance(action, Send):
                out.append(pending)
                pending = None
            out.append(action)
            pending = ends.get(position, pending)
        if pending is not None:
            out.append(pending)
        result.append(out)
    return result


_LEAST_DISTANCE = 4
"""From a forward to its backward, in computes of the rank, below which a copy would come back as it leaves."""


def add_offloads(actions: Actions, wiring: Wiring) -> Actions:
    """Lets go of what is offloaded after the compute that follows a forward, and fetches it one before its backward.

    The copies then run beside one compute each; both stand after the sends of the compute before, which
    nobody should wait for. Where less than a compute would be left between them there are none.
    """
    if not any(wiring.has_offload):
        return actions
    result: list[list[Action]] = []
    for of_rank in actions:
        computes = [a for a in of_rank if isinstance(a, Compute)]
        forward = {(c.stage, c.microbatch): i for i, c in enumerate(computes) if c.kind is Kind.FORWARD}
        after: dict[int, list[Action]] = {}
        for i, (kind, stage, microbatch) in enumerate(computes):
            if kind in (Kind.BACKWARD, Kind.BACKWARD_INPUT) and wiring.has_offload[stage]:
                start = forward[stage, microbatch]
                if i - start >= _LEAST_DISTANCE:
                    after.setdefault(start + 1, []).insert(0, Offload(stage, microbatch))
                    after.setdefault(i - 2, []).append(Fetch(stage, microbatch))
        out: list[Action] = []
        pending: list[Action] = []
        number = -1
        for action in of_rank:
            if pending and not isinstance(action, Send):
                out += pending
                pending = []
            out.append(action)
            if isinstance(action, Compute):
                number += 1
                pending = after.get(number, [])
        result.append(out + pending)
    return result


def add_reductions(actions: Actions, wiring: Wiring) -> Actions:
    """Reduces a stage once all its micro-batches are freed, and steps after everything else.

    A rank that holds several replicated stages reduces them from the deepest to the first, also
    where a replica without a micro-batch could start at once: every rank then starts the
    collectives that it shares with others in one order. Sums over several stages come after all of
    those. A reduction is only started by its action, so that waits for nobody.
    """
    held: list[list[int]] = [[] for _ in actions]
    for stage, ranks in enumerate(wiring.placement):
        for rank in ranks:
            held[rank].append(stage)
    result: list[list[Action]] = []
    for rank, of_rank in enumerate(actions):
        open_by_stage = dict.fromkeys(held[rank], 0)
        for action in of_rank:
            if isinstance(action, Free):
                open_by_stage[action.stage] += 1
        queue = [stage for stage in held[rank] if wiring.has_reduction[stage]]  # ascending: pops the deepest
        out: list[Action] = []

        def reduce_finished(
            out: list[Action] = out, queue: list[int] = queue, open_by_stage: dict[int, int] = open_by_stage
        ) -> None:
            while queue and not open_by_stage[queue[-1]]:
                out.append(Reduce(queue.pop()))

        reduce_finished()
        for action in of_rank:
            out.append(action)
            if isinstance(action, Free):
                open_by_stage[action.stage] -= 1
                reduce_finished()
        out += [reduction for reduction in wiring.shared if not set(reduction.stages).isdisjoint(held[rank])]
        out += [Step(stage) for stage in held[rank] if wiring.has_parameters[stage]]
        result.append(out)
    return result
