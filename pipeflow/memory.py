"""The one memory model: what each rank holds while it follows its program.

    always            parameters; while training, the optimizer's state; the inputs of the whole batch
                      that layers here read
    receive           + the payload
    send              + the payload, unless the stage keeps it anyway, until a message from the receiver
                      shows that it has arrived (`pipeflow.arrivals`)
    F, B or I, W      as `pipeflow.stage_memory` has it for one micro-batch of a stage; the first
                      backward of a stage leaves the gradients of its parameters
    offload, fetch    - what offloaded layers keep, unless it is on its way to another rank; + the same
    reduce            + a copy of these, until the step
    handed over       what a stage is given by another on the same rank counts as its own from
                      then on: gradients, and activations that the other does not keep itself
    free stage,m      - all of that stage and micro-batch
    step              - the gradients of the parameters

Shared by the verifier, which compares it with the devices, and the simulator, which reports it.
What an optimizer allocates only while it steps is not counted, nor are buffers of layers.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from pipeflow.arrivals import known_arrivals
from pipeflow.execution_plan import Plan
from pipeflow.graphs.sharing import held_bytes
from pipeflow.program import (
    Action,
    Compute,
    Direction,
    Fetch,
    Free,
    Kind,
    Mode,
    Offload,
    Placement,
    Program,
    Receive,
    Reduce,
    ReduceShared,
    Reduction,
    Route,
    Send,
    Step,
    stages_of,
)
from pipeflow.stage_memory import StageBytes, stage_bytes
from pipeflow.units import format_bytes
from pipeflow.wiring import Wiring


@dataclass(frozen=True, slots=True)
class Peak:
    """The most that a rank holds at once.

    Attributes:
        bytes: in total.
        static_bytes: of these, parameters, optimizer state and the batch.
        position: index of the action at which the peak is first reached; -1 before the first.
    """

    bytes: int
    static_bytes: int
    position: int


def peak_by_rank(program: Program, plan: Plan, wiring: Wiring) -> tuple[Peak, ...]:
    """The peak of every rank.

    Args:
        program: a valid program of `plan`.
        wiring: of `plan` in the program's mode.
    """
    ledger = _ledger(plan, wiring)
    arrived = known_arrivals(program)
    result = []
    for rank, static in enumerate(_static_bytes_by_rank(plan, wiring)):
        peak, position, _ = _replay(rank, program.actions_by_rank[rank], arrived[rank], ledger)
        result.append(Peak(static + peak, static, position))
    return tuple(result)


def offloaded_bytes(plan: Plan, wiring: Wiring) -> list[int]:
    """What of a micro-batch of each stage goes to the host and comes back."""
    return [stage.offloaded for stage in _ledger(plan, wiring).stages]


def peak_story(program: Program, plan: Plan, wiring: Wiring, rank: int, peak: Peak) -> tuple[str, ...]:
    """What a rank holds just before the action of its peak, and what that needs, a line each."""
    lines = [f"parameters, optimizer state and the batch: {format_bytes(peak.static_bytes)}"]
    if peak.position < 0:
        return tuple(lines)
    actions = program.actions_by_rank[rank]
    _, _, held = _replay(rank, actions[: peak.position], known_arrivals(program)[rank], _ledger(plan, wiring))
    for stage in sorted({stage for stage, _ in held}):
        own = {m: n for (s, m), n in sorted(held.items()) if s == stage and n}
        if stage == _SENT:
            lines += [f"on its way to rank {peer}: {format_bytes(n)}" for peer, n in own.items()]
            continue
        if gradients := own.pop(_GRADIENTS, 0) + own.pop(_REDUCTION, 0):
            lines.append(f"gradients of the parameters of stage {stage}: {format_bytes(gradients)}")
        if own:
            names = f"{len(own)} micro-batches from {min(own)} to {max(own)}"
            lines.append(f"stage {stage}, {names}: {format_bytes(sum(own.values()))}")
    rest = peak.bytes - peak.static_bytes - sum(held.values())
    return (*lines, f"'{actions[peak.position]}' itself: {format_bytes(rest)}")


_Handover = tuple[int, tuple[int, ...], int]
"""(target stage, its ranks, bytes)"""

_GRADIENTS, _REDUCTION = -1, -2
"""Instead of a micro-batch: the gradients of a stage's parameters, and their copy for the reduction."""

_SENT = -1
"""Instead of a stage: what is on its way to a rank."""


@dataclass(frozen=True, slots=True)
class _Ledger:
    """Per stage: what a micro-batch holds, what is handed over at a compute, bytes of parameters that learn."""

    placement: Placement
    stages: list[StageBytes]
    handed: dict[Kind, list[tuple[_Handover, ...]]]
    learned: list[int]
    reduced: dict[Reduction, int]
    payload: dict[Route, int]
    payload_by_id: dict[int, int]
    sent: dict[Route, list[tuple[str, int]]]
    sent_by_id: dict[int, list[tuple[str, int]]]
    bytes_of: Mapping[str, int]


def _ledger(plan: Plan, wiring: Wiring) -> _Ledger:
    payload = dict(wiring.payload_bytes)
    tensors = plan.costs.tensor_by_name
    stages = [
        stage_bytes(
            plan.costs,
            stage,
            gradients_in=sum(payload[route] for route in wiring.gradient_in[s]),
            gradients_out=sum(payload[route] for route in wiring.gradient_out[s]),
            gradients_summed=sum(tensors[t].gradient_bytes for t in _in_parts(wiring.gradient_in[s])),
            train=wiring.has_backward[s],
            offload=plan.offload_set,
        )
        for s, stage in enumerate(plan.stages)
    ]

    def alone(route: Route) -> list[tuple[str, int]]:
        """What is given, with bytes, without what its producer keeps until its backward anyway."""
        if route.direction is Direction.BACKWARD:
            return [(part, tensors[part.partition("#")[0]].gradient_bytes) for part in route.payload]
        stays = stages[route.source].kept
        return [(t, tensors[t].bytes) for t in route.payload if t not in stays]

    def handed(outgoing: Sequence[Route]) -> tuple[_Handover, ...]:
        result = []
        for route in outgoing:
            if not set(wiring.placement[route.source]).isdisjoint(wiring.placement[route.target]):
                result.append((route.target, wiring.placement[route.target], sum(n for _, n in alone(route))))
        return tuple(result)

    forward, backward = ([handed(out) for out in outs] for outs in (wiring.forward_out, wiring.gradient_out))
    return _Ledger(
        placement=wiring.placement,
        stages=stages,
        handed={
            Kind.FORWARD: forward,
            Kind.BACKWARD: backward,
            Kind.BACKWARD_INPUT: backward,
            Kind.BACKWARD_WEIGHT: [()] * len(stages),
        },
        learned=[held.trained for held in held_bytes(plan.costs, [stage.layers for stage in plan.stages])],
        reduced=dict(wiring.reduced_bytes),
        payload=payload,
        payload_by_id={},
        sent={route: alone(route) for route in wiring.routes},
        sent_by_id={},
        bytes_of={name: tensor.bytes for name, tensor in tensors.items()},
    )


def _replay(
    rank: int, actions: Sequence[Action], arrived: Sequence[int], ledger: _Ledger
) -> tuple[int, int, dict[tuple[int, int], int]]:
    """(peak over the static bytes, where it is first reached, what is held at the end)."""
    held: dict[tuple[int, int], int] = {}
    sent: dict[int, deque[list[tuple[tuple[str, int], int]]]] = {}
    on_its_way: dict[tuple[str, int], int] = {}  # a tensor that is sent to several ranks is there once
    stays_here: dict[
        tuple[str, int], int
    ] = {}  # on its way to a rank, and counted as the stage's until it is offloaded
    num_arrived: dict[int, int] = {}
    known = iter(arrived)
    total = peak = 0
    position = -1

    def add(key: tuple[int, int], amount: int) -> None:
        nonlocal total
        held[key] = held.get(key, 0) + amount
        total += amount

    for index, action in enumerate(actions):
        before, meanwhile = total, 0
        if isinstance(action, Compute):
            kind, stage, microbatch = action
            amounts = ledger.stages[stage]
            meanwhile = amounts.peak(kind, first=(stage, _GRADIENTS) not in held)
            add((stage, microbatch), amounts.end(kind))
            if kind in (Kind.BACKWARD, Kind.BACKWARD_WEIGHT) and (stage, _GRADIENTS) not in held:
                add((stage, _GRADIENTS), ledger.learned[stage])
            for target, ranks, amount in ledger.handed[kind][stage]:
                if ranks[microbatch % len(ranks)] == rank:
                    add((target, microbatch), amount)
                    if kind is not Kind.FORWARD:
                        add((stage, microbatch), -amount)
        elif isinstance(action, Receive):
            amount = meanwhile = _of_route(ledger.payload_by_id, ledger.payload, action.route)
            add((action.route.target, action.microbatch), amount)
            for _ in range(num_arrived.get(action.peer, 0), arrived_now := next(known)):
                for tensor, amount in sent[action.peer].popleft():
                    on_its_way[tensor] -= 1
                    if not on_its_way[tensor] and stays_here.pop(tensor, None) is None:
                        add((_SENT, action.peer), -amount)
            num_arrived[action.peer] = arrived_now
        elif isinstance(action, Send):
            message = [
                ((name, action.microbatch), n) for name, n in _of_route(ledger.sent_by_id, ledger.sent, action.route)
            ]
            sent.setdefault(action.peer, deque()).append(message)
            for tensor, amount in message:
                if not on_its_way.get(tensor):
                    if tensor[0] in ledger.stages[action.route.source].away:
                        stays_here[tensor] = action.peer
                    else:
                        add((_SENT, action.peer), amount)
                on_its_way[tensor] = on_its_way.get(tensor, 0) + 1
        elif isinstance(action, Reduce | ReduceShared):
            here = next(stage for stage in stages_of(action) if rank in ledger.placement[stage])
            add((here, _REDUCTION), ledger.reduced.get(action, 0))
        elif isinstance(action, Offload | Fetch):
            moved = ledger.stages[action.stage].offloaded
            add((action.stage, action.microbatch), -moved if isinstance(action, Offload) else moved)
            for tensor in [t for t in stays_here if isinstance(action, Offload) and t[1] == action.microbatch]:
                if tensor[0] in ledger.stages[action.stage].away:
                    add((_SENT, stays_here.pop(tensor)), ledger.bytes_of[tensor[0]])
        elif isinstance(action, Free):
            total -= held.pop((action.stage, action.microbatch), 0)
        elif isinstance(action, Step):
            total -= held.pop((action.stage, _GRADIENTS), 0) + held.pop((action.stage, _REDUCTION), 0)
        if max(total, before + meanwhile) > peak:
            peak, position = max(total, before + meanwhile), index
    return peak, position, held


def _in_parts(incoming: Sequence[Route]) -> list[str]:
    """Tensors whose gradient comes in several parts."""
    parts = Counter(part.partition("#")[0] for route in incoming for part in route.payload)
    return [tensor for tensor, count in parts.items() if count > 1]


_Amount = TypeVar("_Amount")


def _of_route(by_id: dict[int, _Amount], by_route: Mapping[Route, _Amount], route: Route) -> _Amount:
    """Hashing a route takes longer than all else; the program keeps it alive."""
    amount = by_id.get(id(route))
    if amount is None:
        amount = by_id[id(route)] = by_route[route]
    return amount


def _static_bytes_by_rank(plan: Plan, wiring: Wiring) -> list[int]:
    result = [0] * wiring.num_ranks
    inputs: list[set[str]] = [set() for _ in result]
    given = {t.name for t in plan.costs.inputs}
    held = held_bytes(plan.costs, [stage.layers for stage in plan.stages])
    for stage, parameters in zip(plan.stages, held, strict=True):
        layers = [plan.costs.layer_by_name[name] for name in stage.layers]
        amount = parameters.all
        if wiring.mode is Mode.TRAIN:
            amount += math.ceil(plan.optimizer_ratio * parameters.trained)
        for rank in stage.devices:
            result[rank] += amount
            inputs[rank].update(t for layer in layers for t in layer.inputs if t in given)
    sizes = plan.costs.tensor_by_name
    return [
        amount + plan.num_microbatches * sum(sizes[t].bytes for t in read)
        for amount, read in zip(result, inputs, strict=True)
    ]
