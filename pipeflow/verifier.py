"""The proof that a program will run to its end, or the shortest reason why not.

Checks, in this order, and each refusal names the actions that show it:

    1. each rank by itself: every action is one that the plan needs, once, on the right rank, after
       all it needs; nothing is used after it is freed, and everything is freed    (`rank_check`)
    2. each channel: receives stand in the order of the sends
    3. reductions: all ranks start those they share in one order
    4. no cyclic wait: the programs are played abstractly under the named semantics, replicas that
       compute in lockstep waiting for each other
    5. peak bytes fit the devices                                       (`pipeflow.memory`)

It believes nothing that lowering did: it reads the plan's stages and routes and the program's
actions. It knows nothing of time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from typing import Literal

from pipeflow.errors import PlanError, VerificationError
from pipeflow.execution_plan import Plan
from pipeflow.lowering import lower
from pipeflow.memory import Peak, peak_by_rank, peak_story
from pipeflow.program import (
    Compute,
    Mode,
    Program,
    Receive,
    Reduce,
    ReduceShared,
    Reduction,
    Send,
    Step,
    ranks_of,
    stages_of,
)
from pipeflow.rank_check import Messages, check_ranks
from pipeflow.units import format_bytes
from pipeflow.wiring import Wiring, wire

Semantics = Literal["posted", "rendezvous"]
"""What a send does: "posted", it never waits; "rendezvous", it waits until its receive is reached."""


@dataclass(frozen=True, slots=True)
class Proof:
    """What was proved.

    Attributes:
        mode: of the program.
        semantics: of its sends.
        num_ranks, num_actions, num_messages: its size.
        peak_bytes_by_rank: within the memory of each device.
    """

    mode: Mode
    semantics: Semantics
    num_ranks: int
    num_actions: int
    num_messages: int
    peak_bytes_by_rank: tuple[int, ...]


def verify(
    plan_or_program: Plan | Program,
    *,
    plan: Plan | None = None,
    semantics: Semantics = "posted",
    lockstep: Collection[int] = (),
) -> Proof:
    """Proves that every rank reaches the end of its program with everything computed.

    Args:
        plan_or_program: a plan, which is lowered for training; or a program.
        plan: what the program is for; needed with a program, and only then.
        semantics: see `Semantics`. pipeflow's transports are "posted".
        lockstep: stages whose replicas wait for each other in every compute, since they have synchronised
            norms: with R replicas, micro-batches gR to gR + R - 1 are computed together.

    Raises:
        VerificationError: with the shortest counterexample that was found.
        PlanError: the plan cannot be lowered, or a program comes without its plan.
    """
    if semantics not in ("posted", "rendezvous"):
        raise PlanError(f"semantics {semantics!r}; known are 'posted' and 'rendezvous'")
    program, plan = program_and_plan(plan_or_program, plan)
    wiring = wire(plan, program.mode)
    messages = check_ranks(program, wiring)
    _check_channels(messages)
    _check_reductions(program)
    _Play(program, semantics, frozenset(lockstep)).run()
    peaks = peak_by_rank(program, plan, wiring)
    for rank, peak in enumerate(peaks):
        _check_memory(plan, program, wiring, rank, peak)
    return Proof(
        mode=program.mode,
        semantics=semantics,
        num_ranks=program.num_ranks,
        num_actions=program.num_actions,
        num_messages=sum(len(sent) for sent in messages.sent.values()),
        peak_bytes_by_rank=tuple(peak.bytes for peak in peaks),
    )


def program_and_plan(plan_or_program: Plan | Program, plan: Plan | None) -> tuple[Program, Plan]:
    """The two of them: a plan is lowered for training, a program needs its plan beside it."""
    if isinstance(plan_or_program, Plan):
        if plan is not None:
            raise PlanError("a plan and plan= as well; give plan= only beside a program")
        return lower(plan_or_program), plan_or_program
    if plan is None:
        raise PlanError("a program alone does not say what its stages need; give the plan it is for as plan=")
    return plan_or_program, plan


def _check_channels(messages: Messages) -> None:
    """The k-th receive of a channel is for the k-th send."""
    for channel in sorted(messages.sent.keys() | messages.received.keys()):
        sent, received = messages.sent.get(channel, []), messages.received.get(channel, [])
        if sent == received:
            continue
        k = next((i for i, pair in enumerate(zip(sent, received, strict=False)) if pair[0] != pair[1]), None)
        if k is None:
            raise AssertionError("rank checks pass, so every message is sent and received")
        source, target = channel
        raise VerificationError(
            f"message {k} from rank {source} to rank {target} is not the one that is received",
            (
                f"rank {source}: '{Send(*messages.message(sent[k]), target)}'",
                f"rank {target}: '{Receive(*messages.message(received[k]), source)}'",
            ),
        )


def _check_reductions(program: Program) -> None:
    """One order of all reductions agrees with every rank's."""
    after: dict[Reduction, set[Reduction]] = {}
    rank_by_pair: dict[tuple[Reduction, Reduction], int] = {}
    for rank, actions in enumerate(program.actions_by_rank):
        reduced = [action for action in actions if isinstance(action, Reduce | ReduceShared)]
        for first, second in pairwise(reduced):
            after.setdefault(second, set()).add(first)
            rank_by_pair.setdefault((first, second), rank)
    try:
        TopologicalSorter(after).prepare()
    except CycleError as error:
        cycle: list[Reduction] = list(error.args[1])
        raise VerificationError(
            "ranks start reductions in orders that contradict each other",
            tuple(f"rank {rank_by_pair[a, b]}: '{a}' before '{b}'" for a, b in pairwise(cycle)),
        ) from None


class _Play:
    """Runs the programs abstractly: who waits for whom, and nothing else.

    What a rank does next never depends on how the ranks interleave, so one interleaving stands
    for all of them. Expects programs whose channels match.
    """

    def __init__(self, program: Program, semantics: Semantics, lockstep: frozenset[int]) -> None:
        self.placement = program.placement
        self.num_microbatches = program.num_microbatches
        self.rendezvous = semantics == "rendezvous"
        self.actions = [
            [
                a
                for a in actions
                if isinstance(a, Send | Receive | Reduce | ReduceShared | Step)
                or (isinstance(a, Compute) and a.stage in lockstep)
            ]
            for actions in program.actions_by_rank
        ]
        self.met: dict[Compute, set[int]] = {}
        self.position = [0] * program.num_ranks
        self.num_in_channel: dict[tuple[int, int], int] = {}
        self.reached: dict[Reduction, set[int]] = {}
        self.awaited: dict[int, dict[Reduction, None]] = {}
        for actions in self.actions:
            for action in actions:
                if isinstance(action, Reduce | ReduceShared):
                    for stage in stages_of(action):
                        self.awaited.setdefault(stage, {})[action] = None

    def run(self) -> None:
        """Raises VerificationError with the shortest cycle if some rank cannot finish."""
        queue = deque(range(len(self.actions)))
        queued = set(queue)
        while queue:
            rank = queue.popleft()
            queued.discard(rank)
            for woken in sorted(self._advance(rank) - queued):
                queue.append(woken)
                queued.add(woken)
        waiting = [r for r, actions in enumerate(self.actions) if self.position[r] < len(actions)]
        if waiting:
            cycle = self._shortest_cycle(waiting)
            lines = tuple(
                f"rank {a} waits at '{self.actions[a][self.position[a]]}' for rank {b}"
                for a, b in zip(cycle, cycle[1:] + cycle[:1], strict=True)
            )
            raise VerificationError(f"cyclic wait of {len(cycle)} ranks: {', '.join(lines)}", lines)

    def _advance(self, rank: int) -> set[int]:
        """Runs a rank until it waits; returns the other ranks that may go on because of it."""
        woken: set[int] = set()
        actions, position = self.actions[rank], self.position
        while position[rank] < len(actions):
            action = actions[position[rank]]
            if isinstance(action, Step):
                if self._missing(action.stage):
                    break
            elif isinstance(action, Compute):
                head, members = self._group(action)
                self.met.setdefault(head, set()).add(rank)
                if self._absent(action):
                    break
                woken.update(members)
            elif isinstance(action, Reduce | ReduceShared):
                self.reached.setdefault(action, set()).add(rank)
                woken.update(ranks_of(self.placement, action))
            elif self.rendezvous:
                # Whoever arrives second finds the other there, and both go on.
                if not self._is_at(action.peer, Receive if isinstance(action, Send) else Send, rank):
                    break
                position[action.peer] += 1
                woken.add(action.peer)
            elif isinstance(action, Send):
                channel = (rank, action.peer)
                self.num_in_channel[channel] = self.num_in_channel.get(channel, 0) + 1
                woken.add(action.peer)
            else:
                channel = (action.peer, rank)
                if not self.num_in_channel.get(channel, 0):
                    break
                self.num_in_channel[channel] -= 1
            position[rank] += 1
        woken.discard(rank)
        return woken

    def _is_at(self, rank: int, kind: type[Send] | type[Receive], peer: int) -> bool:
        """Whether the rank has arrived at a transfer of this kind with the peer."""
        position, actions = self.position[rank], self.actions[rank]
        if position == len(actions):
            return False
        action = actions[position]
        return isinstance(action, kind) and action.peer == peer

    def _missing(self, stage: int) -> list[int]:
        """Ranks that have not reached a reduction which the stage's step waits for."""
        missing: set[int] = set()
        for reduction in self.awaited.get(stage, ()):
            missing.update(set(ranks_of(self.placement, reduction)) - self.reached.get(reduction, set()))
        return sorted(missing)

    def _group(self, compute: Compute) -> tuple[Compute, list[int]]:
        """What stands for all computes of a group in lockstep, and the ranks that take part."""
        ranks = self.placement[compute.stage]
        first = compute.microbatch // len(ranks) * len(ranks)
        return compute._replace(microbatch=first), list(ranks[: self.num_microbatches - first])

    def _absent(self, compute: Compute) -> list[int]:
        """Ranks that have not come to their compute of a group."""
        head, members = self._group(compute)
        return sorted(set(members) - self.met.get(head, set()))

    def _waits_for(self, rank: int) -> list[int]:
        action = self.actions[rank][self.position[rank]]
        if isinstance(action, Send | Receive):
            return [action.peer]
        if isinstance(action, Compute):
            return self._absent(action)
        assert isinstance(action, Step), "a rank waits at nothing else"
        return self._missing(action.stage)

    def _shortest_cycle(self, waiting: list[int]) -> list[int]:
        """The first of the shortest cycles of ranks that wait for each other, by breadth-first search.

        There is one: channels and reductions match, so nobody waits for a rank that has finished.
        """
        best: list[int] = []
        for start in waiting:
            previous: dict[int, int] = {}
            queue = deque([start])
            while queue and start not in previous:
                rank = queue.popleft()
                for peer in self._waits_for(rank):
                    if peer not in previous:
                        previous[peer] = rank
                        queue.append(peer)
            if start in previous:
                cycle = [start]
                while (rank := previous[cycle[-1]]) != start:
                    cycle.append(rank)
                cycle = [start, *reversed(cycle[1:])]
                if not best or len(cycle) < len(best):
                    best = cycle
        assert best, "ranks wait, but for no one"
        return best


def _check_memory(plan: Plan, program: Program, wiring: Wiring, rank: int, peak: Peak) -> None:
    device = plan.cluster.devices[rank]
    if device.memory_bytes is None or peak.bytes <= device.memory_bytes:
        return
    where = f"'{program.actions_by_rank[rank][peak.position]}'" if peak.position >= 0 else "the start"
    raise VerificationError(
        f"rank {rank} ({device.name}) needs {format_bytes(peak.bytes)} at {where} and has "
        f"{format_bytes(device.memory_bytes)}: {format_bytes(peak.bytes - device.memory_bytes)} too little",
        peak_story(program, plan, wiring, rank, peak),
    )
