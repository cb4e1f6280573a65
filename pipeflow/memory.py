"""The one memory model: what each rank holds while it follows its program.

    always            parameters; and while training, for layers that learn, their gradients and
                      the optimizer's state
    receive           + the payload
    F                 + what the stage keeps for backward; without a backward, its outputs
    B or I            + the gradients that it sends away; and while it lasts, what a run of recomputed
                      layers saves (`pipeflow.partitioners.activations`)
    handed over       what a stage is given by another on the same rank counts as its own from
                      then on: gradients, and activations of a stage that is freed before it
    free stage,m      - all of that stage and micro-batch

Shared by the verifier, which compares it with the devices, and the simulator, which reports it.
The batch itself, and what a layer allocates only while it runs, are not counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipeflow.execution_plan import Plan
from pipeflow.graphs.sharing import held_bytes
from pipeflow.partitioners.activations import stage_activations
from pipeflow.program import Action, Compute, Free, Kind, Mode, Program, Receive, Route
from pipeflow.wiring import Wiring


@dataclass(frozen=True, slots=True)
class Peak:
    """The most that a rank holds at once.

    Attributes:
        bytes: in total.
        static_bytes: of these, parameters, gradients and optimizer state.
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
    result = []
    for rank, static in enumerate(_static_bytes_by_rank(plan, wiring)):
        peak, position, _ = _replay(rank, program.actions_by_rank[rank], ledger)
        result.append(Peak(static + peak, static, position))
    return tuple(result)


def held_at_peak(
    program: Program, plan: Plan, wiring: Wiring, rank: int, peak: Peak
) -> tuple[tuple[int, int, int], ...]:
    """(stage, micro-batch, bytes) of all that a rank holds at its peak, in order."""
    _, _, held = _replay(rank, program.actions_by_rank[rank][: peak.position + 1], _ledger(plan, wiring))
    return tuple((stage, microbatch, amount) for (stage, microbatch), amount in sorted(held.items()))


_Handover = tuple[int, tuple[int, ...], int]
"""(target stage, its ranks, bytes)"""


@dataclass(frozen=True, slots=True)
class _Ledger:
    """Per stage: bytes that a forward and a backward add, a backward holds meanwhile, and what may be handed over."""

    forward: list[int]
    backward: list[int]
    transient: list[int]
    handed_forward: list[tuple[_Handover, ...]]
    handed_backward: list[tuple[_Handover, ...]]
    payload: dict[Route, int]
    payload_by_id: dict[int, int]


def _ledger(plan: Plan, wiring: Wiring) -> _Ledger:
    layers = plan.costs.layer_by_name
    payload = dict(wiring.payload_bytes)

    def handed(routes: Sequence[Route]) -> tuple[_Handover, ...]:
        return tuple(
            (route.target, wiring.placement[route.target], payload[route])
            for route in routes
            if not set(wiring.placement[route.source]).isdisjoint(wiring.placement[route.target])
        )

    activations = [stage_activations(plan.costs, stage) for stage in plan.stages]
    return _Ledger(
        forward=[
            kept if has_backward else sum(t.bytes for n in stage.layers for t in layers[n].outputs)
            for stage, (kept, _), has_backward in zip(plan.stages, activations, wiring.has_backward, strict=True)
        ],
        transient=[transient for _, transient in activations],
        backward=[sum(payload[r] for r in out) for out in wiring.gradient_out],
        # While the producer waits for its backward, the activation is counted among what it saves.
        handed_forward=[
            () if has_backward else handed(out)
            for out, has_backward in zip(wiring.forward_out, wiring.has_backward, strict=True)
        ],
        handed_backward=[handed(out) for out in wiring.gradient_out],
        payload=payload,
        payload_by_id={id(route): amount for route, amount in wiring.payload_bytes.items()},
    )


def _replay(rank: int, actions: Sequence[Action], ledger: _Ledger) -> tuple[int, int, dict[tuple[int, int], int]]:
    """(peak over the static bytes, where it is first reached, what is held at the end)."""
    held: dict[tuple[int, int], int] = {}
    total = peak = 0
    position = -1
    for index, action in enumerate(actions):
        if isinstance(action, Compute):
            kind, stage, microbatch = action
            key, meanwhile = (stage, microbatch), 0
            if kind is Kind.FORWARD:
                amount, handed = ledger.forward[stage], ledger.handed_forward[stage]
            elif kind is Kind.BACKWARD_WEIGHT:
                continue
            else:
                amount, handed = ledger.backward[stage], ledger.handed_backward[stage]
                meanwhile = ledger.transient[stage]
            for target, ranks, extra in handed:
                if ranks[microbatch % len(ranks)] == rank:
                    held[target, microbatch] = held.get((target, microbatch), 0) + extra
                    total += extra
                    if kind is not Kind.FORWARD:
                        amount -= extra
        elif isinstance(action, Receive):
            route = action.route
            key, meanwhile = (route.target, action.microbatch), 0
            amount = ledger.payload_by_id.get(id(route), -1)
            if amount < 0:
                amount = ledger.payload_by_id[id(route)] = ledger.payload[route]  # the program keeps it alive
        elif isinstance(action, Free):
            total -= held.pop((action.stage, action.microbatch), 0)
            continue
        else:
            continue
        held[key] = held.get(key, 0) + amount
        total += amount
        if total + meanwhile > peak:
            peak, position = total + meanwhile, index
    return peak, position, held


def _static_bytes_by_rank(plan: Plan, wiring: Wiring) -> list[int]:
    result = [0] * wiring.num_ranks
    held = held_bytes(plan.costs, [stage.layers for stage in plan.stages])
    for stage, parameters in zip(plan.stages, held, strict=True):
        amount = parameters.all
        if wiring.mode is Mode.TRAIN:
            amount += parameters.trained + math.ceil(plan.optimizer_ratio * parameters.trained)
        for rank in stage.devices:
            result[rank] += amount
    return result
