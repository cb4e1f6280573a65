"""What can be proved of a program by reading each rank's actions once, in order.

Every action must be one that the plan needs, stand once, on its rank, after all it needs there.
What waits on other ranks (that messages match and arrive) is the verifier's; this module also
hands it the messages of each channel in the order of both ends.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NoReturn, assert_never

from pipeflow.errors import VerificationError
from pipeflow.program import (
    Action,
    Compute,
    Direction,
    Fetch,
    Free,
    Kind,
    Mode,
    Offload,
    Program,
    Receive,
    Reduce,
    ReduceShared,
    Reduction,
    Route,
    Send,
    Step,
    rank_of,
    ranks_of,
    stages_of,
)
from pipeflow.wiring import Wiring

_F, _B, _I, _W, _FREED, _AWAY, _BACK = 1, 2, 4, 8, 16, 32, 64
_WHOLE = (_F | _B, _F | _I | _W)
"""What a stage that has a backward computes of a micro-batch: whole, or split."""


@dataclass(frozen=True, slots=True)
class Messages:
    """The messages of every channel, from rank to rank, in the order of its two ends.

    A message is the number `route * num_microbatches + microbatch`.
    """

    routes: tuple[Route, ...]
    num_microbatches: int
    sent: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    received: dict[tuple[int, int], list[int]] = field(default_factory=dict)

    def message(self, number: int) -> tuple[Route, int]:
        route, microbatch = divmod(number, self.num_microbatches)
        return self.routes[route], microbatch


def check_ranks(program: Program, wiring: Wiring) -> Messages:
    """Checks every rank by itself.

    Args:
        wiring: of the plan, in the program's mode.

    Raises:
        VerificationError: names the action, and the other one where the two contradict.
    """
    if (program.placement, program.num_microbatches) != (wiring.placement, wiring.num_microbatches):
        raise VerificationError(
            f"the program is for {program.num_microbatches} micro-batches on {program.placement}, "
            f"the plan for {wiring.num_microbatches} on {wiring.placement}"
        )
    if program.num_ranks != wiring.num_ranks:
        raise VerificationError(f"the program has {program.num_ranks} ranks, the plan {wiring.num_ranks}")
    check = _Check(program, wiring)
    for rank, actions in enumerate(program.actions_by_rank):
        check.read(rank, actions)
    check.finish()
    return check.messages


class _Check:
    """The state while ranks are read, one after the other.

    A stage and micro-batch belong to one rank, and so does each end of a message, so what is
    recorded of them was done earlier on the rank that is read.
    """

    def __init__(self, program: Program, wiring: Wiring) -> None:
        size = wiring.num_microbatches
        self.program, self.wiring = program, wiring
        self.messages = Messages(wiring.routes, size)
        self.number = {route: i for i, route in enumerate(wiring.routes)}
        self.number_by_id = {id(route): i for i, route in enumerate(wiring.routes)}
        self.done = [bytearray(size) for _ in wiring.placement]
        self.sent = [bytearray(size) for _ in wiring.routes]
        self.received = [bytearray(size) for _ in wiring.routes]
        self.reduced: set[tuple[int, Reduction]] = set()
        self.stepped: set[tuple[int, int]] = set()
        # The last micro-batch of each replica, forward and backward.
        self.latest = [[[-1] * len(ranks) for ranks in wiring.placement] for _ in range(2)]
        self.rank = self.position = 0

    def read(self, rank: int, actions: tuple[Action, ...]) -> None:
        self.rank = rank
        for self.position, action in enumerate(actions):
            if isinstance(action, Compute):
                self._compute(action)
            elif isinstance(action, Send):
                self._send(action)
            elif isinstance(action, Receive):
                self._receive(action)
            elif isinstance(action, Free):
                self._free(action)
            elif isinstance(action, Offload | Fetch):
                self._offload(action)
            elif isinstance(action, Reduce | ReduceShared):
                self._reduce(action)
            else:
                self._step(action)

    def _compute(self, action: Compute) -> None:
        kind, stage, microbatch = action
        self._check_place(action, stage, microbatch)
        done = self.done[stage][microbatch]
        bit = _bit(kind)
        if done & _FREED:
            self._refuse(action, "comes after what it needs is freed", Free(stage, microbatch))
        if done & bit:
            self._refuse(action, "is done twice", action)
        if kind is Kind.FORWARD:
            needs, later = self.wiring.forward_in[stage], 0
        else:
            self._check_backward(action, done)
            needs, later = () if kind is Kind.BACKWARD_WEIGHT else self.wiring.gradient_in[stage], 1
        for route in needs:
            ranks = self.wiring.placement[route.source]
            source = ranks[microbatch % len(ranks)]
            if source == self.rank:
                if not self.done[route.source][microbatch] & (_F if later == 0 else _B | _I):
                    self._refuse(action, "needs", Compute(_producer(route), route.source, microbatch))
            elif not self.received[self.number_by_id[id(route)]][microbatch]:
                self._refuse(action, "needs", Receive(route, microbatch, source))
        if kind is not Kind.BACKWARD_INPUT:
            self._check_ascending(action, later)
        self.done[stage][microbatch] = done | bit

    def _check_backward(self, action: Compute, done: int) -> None:
        kind, stage, microbatch = action
        if not self.wiring.has_backward[stage]:
            why = "infers" if self.wiring.mode is Mode.INFER else "learns nothing there"
            self._refuse(action, f"is a backward of a stage that has none (the program {why})")
        if not done & _F:
            self._refuse(action, "needs", Compute(Kind.FORWARD, stage, microbatch))
        if kind is Kind.BACKWARD_WEIGHT:
            if not done & _I:
                self._refuse(action, "needs", Compute(Kind.BACKWARD_INPUT, stage, microbatch))
        elif done & (_B | _I):
            other = Kind.BACKWARD if done & _B else Kind.BACKWARD_INPUT
            self._refuse(action, "repeats", Compute(other, stage, microbatch))
        if done & _AWAY and not done & _BACK:
            self._refuse(action, "needs", Fetch(stage, microbatch))

    def _check_ascending(self, action: Compute, direction: int) -> None:
        """Statistics and gradients build up in the order of one device: 0, 1, 2, ..."""
        _, stage, microbatch = action
        latest = self.latest[direction][stage]
        replica = microbatch % len(latest)
        if latest[replica] > microbatch:
            before = action._replace(microbatch=latest[replica])
            self._refuse(action, "must come before the later micro-batch's", before)
        latest[replica] = microbatch

    def _send(self, action: Send) -> None:
        number, (route, microbatch, peer) = self._number(action), action
        self._check_place(action, route.source, microbatch)
        self._check_peer(action, rank_of(self.wiring.placement, route.target, microbatch))
        done = self.done[route.source][microbatch]
        if done & _FREED:
            self._refuse(action, "comes after what it sends is freed", Free(route.source, microbatch))
        if not done & (_F if route.direction is Direction.FORWARD else _B | _I):
            self._refuse(action, "needs", Compute(_producer(route), route.source, microbatch))
        if self.sent[number][microbatch]:
            self._refuse(action, "is done twice", action)
        self.sent[number][microbatch] = 1
        message = number * self.wiring.num_microbatches + microbatch
        self.messages.sent.setdefault((self.rank, peer), []).append(message)

    def _receive(self, action: Receive) -> None:
        number, (route, microbatch, peer) = self._number(action), action
        self._check_place(action, route.target, microbatch)
        self._check_peer(action, rank_of(self.wiring.placement, route.source, microbatch))
        if self.done[route.target][microbatch] & _FREED:
            self._refuse(action, "comes after its stage is done with the micro-batch", Free(route.target, microbatch))
        if self.received[number][microbatch]:
            self._refuse(action, "is done twice", action)
        self.received[number][microbatch] = 1
        message = number * self.wiring.num_microbatches + microbatch
        self.messages.received.setdefault((peer, self.rank), []).append(message)

    def _offload(self, action: Offload | Fetch) -> None:
        """What is saved goes once, between forward and backward, and comes back once."""
        stage, microbatch = action
        self._check_place(action, stage, microbatch)
        done = self.done[stage][microbatch]
        if not self.wiring.has_offload[stage]:
            self._refuse(action, "moves what the plan keeps on the device")
        if not done & _F:
            self._refuse(action, "needs", Compute(Kind.FORWARD, stage, microbatch))
        if done & (_B | _I):
            kind = Kind.BACKWARD if done & _B else Kind.BACKWARD_INPUT
            self._refuse(action, "comes after", Compute(kind, stage, microbatch))
        bit = _AWAY if isinstance(action, Offload) else _BACK
        if done & bit:
            self._refuse(action, "is done twice", action)
        if bit == _BACK and not done & _AWAY:
            self._refuse(action, "needs", Offload(stage, microbatch))
        self.done[stage][microbatch] = done | bit

    def _free(self, action: Free) -> None:
        stage, microbatch = action
        self._check_place(action, stage, microbatch)
        done = self.done[stage][microbatch]
        if done & _FREED:
            self._refuse(action, "is done twice", action)
        if missing := self._missing_compute(stage, done):
            self._refuse(action, "comes before", Compute(missing, stage, microbatch))
        for routes in (self.wiring.forward_out[stage], self.wiring.gradient_out[stage]):
            for route in routes:
                peer = rank_of(self.wiring.placement, route.target, microbatch)
                if peer != self.rank and not self.sent[self.number_by_id[id(route)]][microbatch]:
                    self._refuse(action, "comes before", Send(route, microbatch, peer))
        self.done[stage][microbatch] = done | _FREED

    def _reduce(self, action: Reduction) -> None:
        held = [stage for stage in stages_of(action) if self._is_held(stage)]
        if not held or action not in self.wiring.reduced_bytes:
            self._refuse(action, "reduces what has nothing shared with this rank")
        if (self.rank, action) in self.reduced:
            self._refuse(action, "is done twice", action)
        for stage in held:
            self._check_gradients(action, stage)
        self.reduced.add((self.rank, action))

    def _step(self, action: Step) -> None:
        if not self._is_held(action.stage) or not self.wiring.has_parameters[action.stage]:
            self._refuse(action, "steps what has no parameters to train on this rank")
        if (self.rank, action.stage) in self.stepped:
            self._refuse(action, "is done twice", action)
        for reduction in self.wiring.reductions_by_stage[action.stage]:
            if (self.rank, reduction) not in self.reduced:
                self._refuse(action, "comes before", reduction)
        self._check_gradients(action, action.stage)
        self.stepped.add((self.rank, action.stage))

    def _check_gradients(self, action: Action, stage: int) -> None:
        """All backwards of this rank's replica are done."""
        ranks = self.wiring.placement[stage]
        done = self.done[stage]
        for microbatch in range(ranks.index(self.rank), self.wiring.num_microbatches, len(ranks)):
            if missing := self._missing_compute(stage, done[microbatch]):
                self._refuse(action, "comes before", Compute(missing, stage, microbatch))

    def finish(self) -> None:
        """Everything that the plan needs was done, and all was freed."""
        for stage, ranks in enumerate(self.wiring.placement):
            for microbatch, done in enumerate(self.done[stage]):
                rank = ranks[microbatch % len(ranks)]
                if missing := self._missing_compute(stage, done):
                    self._never(rank, Compute(missing, stage, microbatch))
                if not done & _FREED:
                    self._never(rank, Free(stage, microbatch))
            for rank in ranks:
                if self.wiring.has_parameters[stage] and (rank, stage) not in self.stepped:
                    self._never(rank, Step(stage))
        for reduction in self.wiring.reduced_bytes:
            for rank in ranks_of(self.wiring.placement, reduction):
                if (rank, reduction) not in self.reduced:
                    self._never(rank, reduction)
        for number, route in enumerate(self.wiring.routes):
            # A missing receive is found where it is needed, a missing send where its stage is freed.
            if self.sent[number] != self.received[number]:
                m = next(m for m, s in enumerate(self.sent[number]) if s != self.received[number][m])
                source, target = (rank_of(self.wiring.placement, s, m) for s in (route.source, route.target))
                action = Receive(route, m, source) if self.sent[number][m] else Send(route, m, target)
                self._never(target if self.sent[number][m] else source, action)

    def _missing_compute(self, stage: int, done: int) -> Kind | None:
        """The next compute of a micro-batch that is not done yet."""
        if not done & _F:
            return Kind.FORWARD
        if not self.wiring.has_backward[stage] or done & (_F | _B | _I | _W) in _WHOLE:
            return None
        return Kind.BACKWARD_WEIGHT if done & _I else Kind.BACKWARD

    def _number(self, action: Send | Receive) -> int:
        number = self.number_by_id.get(id(action.route), -1)
        if number < 0:
            number = self.number.get(action.route, -1)
            if number < 0:
                self._refuse(action, "carries what no stage of the plan sends another")
            self.number_by_id[id(action.route)] = number  # the program keeps the route alive
        return number

    def _is_held(self, stage: int) -> bool:
        return 0 <= stage < self.wiring.num_stages and self.rank in self.wiring.placement[stage]

    def _check_place(self, action: Action, stage: int, microbatch: int) -> None:
        placement = self.wiring.placement
        if not (0 <= stage < len(placement) and 0 <= microbatch < self.wiring.num_microbatches):
            self._refuse(action, "names a stage or micro-batch that does not exist")
        ranks = placement[stage]
        if ranks[microbatch % len(ranks)] != self.rank:
            self._refuse(action, f"belongs on rank {ranks[microbatch % len(ranks)]}")

    def _check_peer(self, action: Send | Receive, peer: int) -> None:
        if peer == self.rank:
            self._refuse(action, "is between stages on one rank, which needs no message")
        if action.peer != peer:
            self._refuse(action, f"has peer rank {action.peer}; the micro-batch is on rank {peer} there")

    def _refuse(self, action: Action, why: str, other: Action | None = None) -> NoReturn:
        """Raises, naming the action and where the other one stands."""
        here = f"rank {self.rank}, action {self.position}: '{action}'"
        if other is None:
            raise VerificationError(f"rank {self.rank}: '{action}' {why}", (here,))
        actions = self.program.actions_by_rank[self.rank]
        # Tuples of two kinds of action are equal where their numbers are.
        places = [i for i, a in enumerate(actions) if type(a) is type(other) and a == other and i != self.position]
        there = f"action {places[0]}" if places else "nowhere"
        raise VerificationError(
            f"rank {self.rank}: '{action}' {why} '{other}'", (here, f"rank {self.rank}, {there}: '{other}'")
        )

    def _never(self, rank: int, action: Action) -> NoReturn:
        raise VerificationError(f"rank {rank} never does '{action}'", (f"rank {rank}, nowhere: '{action}'",))


def _bit(kind: Kind) -> int:
    match kind:
        case Kind.FORWARD:
            return _F
        case Kind.BACKWARD:
            return _B
        case Kind.BACKWARD_INPUT:
            return _I
        case Kind.BACKWARD_WEIGHT:
            return _W
    assert_never(kind)


def _producer(route: Route) -> Kind:
    return Kind.FORWARD if route.direction is Direction.FORWARD else Kind.BACKWARD
