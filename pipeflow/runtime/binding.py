"""Each action of a program, bound once to the rows it works on.

`bind` turns an action into a function without arguments. All names, shapes and peers are
resolved here; what is left for the step is list access and torch calls.

A micro-batch with no samples is not computed, but its transfers still happen, empty: the
number of messages depends on the program alone, so ranks that disagree about a batch never
wait for each other in vain.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from pipeflow.errors import PlanError
from pipeflow.flows import Flow
from pipeflow.program import (
    Action,
    Compute,
    Direction,
    Fetch,
    Free,
    Kind,
    Offload,
    Placement,
    Receive,
    Reduce,
    ReduceShared,
    Route,
    Send,
    Step,
    ranks_of,
)
from pipeflow.runtime.messages import Messages
from pipeflow.runtime.randomness import letting_others
from pipeflow.runtime.rank_state import RankState
from pipeflow.runtime.reduction import reduce_gradients
from pipeflow.runtime.stage import Call, Slots
from pipeflow.runtime.synchronised_norm import Group
from pipeflow.runtime.transport import Transport

Closure = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Binder:
    """What actions are bound to.

    Attributes:
        rank: this rank.
        state: its rows.
        transport: its end of the communication.
        placement: ranks of each stage's replicas.
        flow_by_tensor: of the plan.
        carried: (tensor, target stage) pairs that a forward transfer carries; others stay behind.
        keep: tensors to keep as outputs.
        train: whether backward will follow.
        reduces: whether gradients are summed over replicas, or only added up here.
        shared: names of the parameters that the same stages hold copies of, by those stages.
        offloaded: the (stage, micro-batch) pairs of which something is on the host in between.
        messages: what each route carries.
    """

    rank: int
    state: RankState
    transport: Transport
    placement: Placement
    flow_by_tensor: Mapping[str, Flow]
    carried: frozenset[tuple[str, int]]
    keep: tuple[str, ...]
    train: bool
    reduces: bool = True
    shared: Mapping[tuple[int, ...], tuple[str, ...]] = field(default_factory=dict)
    offloaded: Collection[tuple[int, int]] = ()
    messages: Messages = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "messages", Messages(self.placement, self.flow_by_tensor, self.carried))

    def bind(self, action: Action) -> Closure | None:
        """The action as a function, or None where nothing is left to do."""
        match action:
            case Compute(kind=Kind.FORWARD):
                return self._forward(action.stage, action.microbatch)
            case Compute(kind=Kind.BACKWARD):
                return self._backward(action.stage, action.microbatch)
            case Compute():
                raise PlanError(
                    f"action {action} splits the backward, which this version does not run; choose a schedule "
                    "with whole backwards"
                )
            case Send():
                return self._send(action)
            case Receive():
                return self._receive(action)
            case Free():
                return self._free(action)
            case Offload():
                return self._offload(action)
            case Fetch():
                return self._fetch(action)
            case Reduce():
                return self._reduce(action.stage)
            case ReduceShared():
                return self._reduce_shared(action)
            case Step():
                return self._step(action.stage)

    def _forward(self, index: int, m: int) -> Closure:
        state, stage = self.state, self.state.stages[index]
        compiled, arrivals, live, sizes = stage.compiled, stage.arrivals, stage.live, state.sizes
        outbox = stage.outbox
        blank: Slots = [None] * compiled.num_slots
        feed, feeds = state.feed, compiled.feeds
        leaves = [(leaf.tensor, leaf.slot, leaf.needs_gradient and self.train) for leaf in compiled.leaves]
        calls = self._saving(index, m)
        losses = [(state.losses, name, slot) for name, slot in compiled.loss_slots]
        kept = [(t, compiled.slot_by_tensor[t]) for t in self.keep if t in compiled.slot_by_tensor]
        handover = [
            (self.state.stages[route.target], tensor, compiled.slot_by_tensor[tensor])
            for route in self.messages.routes_to_rank(Direction.FORWARD, index, m, self.rank)
            for tensor in self.messages.needed(route)
        ]
        keyed_layers, train = stage.keyed_layers, self.train
        note = Tensor.item if state.device.type == "cpu" else _copy
        outgoing = self._outgoing(index, m)
        roots = [*(root.slot for root in compiled.roots), *(slot for _, slot in compiled.loss_slots)]
        kept_slots = {*roots, *(s for _, s, needed in leaves if needed)}
        done = [slot for slot in range(compiled.num_slots) if slot not in kept_slots] if self.train else []

        def forward() -> None:
            if not sizes[m]:
                return
            slots = blank.copy()
            live[m] = slots
            for name, slot in feeds:
                slots[slot] = feed[name][m]
            if leaves:
                row = arrivals[m]
                for name, slot, needs_gradient in leaves:
                    leaf = row[name].detach()
                    slots[slot] = leaf.requires_grad_() if needs_gradient else leaf
                row.clear()
            for layer in keyed_layers:
                layer.first_sample = state.offsets[m]
            for call in calls:
                call(slots)
            for target, name, slot in handover:
                target.arrivals[m][name] = slots[slot]
            for table, name, slot in losses:
                table[name][m] = note(slots[slot])
            for name, slot in kept:
                state.outputs.setdefault(name, {})[m] = slots[slot].detach()
            for reader, sent in outgoing:
                outbox[m][reader] = [slots[slot].detach() for slot in sent]
            # From here on autograd holds what backward needs, and a send what it sends: nothing else stays.
            for slot in done:
                slots[slot] = None
            if train:
                for slot in roots:
                    slots[slot] = _edge(slots[slot])

        return self._recorded(forward, index, m)

    def _saving(self, index: int, m: int) -> Sequence[Call]:
        """The stage's work; as one call that saves on the host, where that is wanted of the micro-batch."""
        stage = self.state.stages[index]
        compiled, store = stage.compiled, stage.store
        if store is None or (index, m) not in self.offloaded:
            return compiled.work
        staying = [slot for _, slot in compiled.feeds] + [leaf.slot for leaf in compiled.leaves]

        def save(slots: Slots) -> None:
            with store.saving(m, [slots[slot] for slot in staying]):
                for call in compiled.work:
                    call(slots)

        return [save]

    def _recorded(self, forward: Closure, index: int, m: int) -> Closure:
        """The forward with its norms' statistics recorded, where replicas tell each other."""
        statistics, sizes = self.state.stages[index].replica.statistics, self.state.sizes
        if statistics is None or not self.train:
            return forward
        group = self._group(index, m)

        def recorded() -> None:
            if sizes[m]:
                with statistics.microbatch(m, group()):
                    forward()

        return recorded

    def _group(self, index: int, m: int) -> Callable[[], Group | None]:
        """Which micro-batches norms of the stage divide by together: those that its replicas run at the same time."""
        statistics, sizes = self.state.stages[index].replica.statistics, self.state.sizes
        ranks, transport = self.placement[index], self.transport
        if statistics is None or not statistics.is_synchronised or len(ranks) == 1:
            return lambda: None
        first = m // len(ranks) * len(ranks)

        def group() -> Group | None:
            members = [n for n in range(first, min(first + len(ranks), len(sizes))) if sizes[n]]
            others = [ranks[n % len(ranks)] for n in members if n != m]
            position = members.index(m)

            def gather(row: Tensor) -> Tensor:
                with letting_others():
                    rows = transport.exchange(others, row)
                return torch.stack([*rows[:position], row, *rows[position:]])

            return Group(len(members), gather) if others else None

        return group

    def _backward(self, index: int, m: int) -> Closure:
        state, stage = self.state, self.state.stages[index]
        compiled, gradients, live, sizes = stage.compiled, stage.gradients, stage.live, state.sizes
        seeds, factors = state.seeds, state.factors
        roots = [(root.slot, root.parts[-1], root.parts[-2::-1]) for root in compiled.roots]
        losses = compiled.loss_slots
        keyed_layers = stage.keyed_layers if compiled.segments else []
        statistics = stage.replica.statistics if compiled.segments else None
        group = self._group(index, m)
        leaf_by_part = {leaf.part: leaf.slot for leaf in compiled.leaves if leaf.needs_gradient}
        handover = [
            (self.state.stages[route.target].gradients, part, leaf_by_part[part])
            for route in self.messages.routes_to_rank(Direction.BACKWARD, index, m, self.rank)
            for part in route.payload
        ]

        def backward() -> None:
            if not sizes[m]:
                return
            slots = live[m]
            assert slots is not None
            for layer in keyed_layers:
                layer.first_sample = state.offsets[m]
            tensors: list[Tensor | GradientEdge] = []
            upstream: list[Tensor] = []
            row = gradients[m]
            for slot, last, others in roots:
                if slots[slot] is not None:
                    gradient = row[last]
                    for part in others:
                        gradient = _add(gradient, row[part])
                    if gradient is not None:
                        tensors.append(slots[slot])
                        upstream.append(gradient)
            for name, slot in losses:
                if slots[slot] is not None and factors[name][m]:
                    tensors.append(slots[slot])
                    upstream.append(seeds[name][m])
            if tensors:
                # What is computed again is normalised as it was.
                with nullcontext() if statistics is None else statistics.synchronised(group()):
                    run_backward(tensors, upstream)
            if row:
                row.clear()
            for target, part, slot in handover:
                target[m][part] = slots[slot].grad

        return backward

    def _send(self, action: Send) -> Closure | None:
        names = self.messages.sent(action.route, action.microbatch)
        if not names:
            return None
        stage, m = self.state.stages[action.route.source], action.microbatch
        live, outbox = stage.live, stage.outbox
        send = self.transport.sender(Route(*action.route[:3], names), action.peer)
        if action.route.direction is Direction.FORWARD:
            target = action.route.target
            return lambda: send(m, outbox[m].pop(target, None))
        leaf_by_part = {leaf.part: leaf.slot for leaf in stage.compiled.leaves}
        slots_sent = [leaf_by_part[part] for part in names]

        def post() -> None:
            slots = live[m]
            send(m, None if slots is None else [slots[i].grad for i in slots_sent])

        return post

    def _outgoing(self, stage: int, microbatch: int) -> list[tuple[int, list[int]]]:
        """(target, slots) of what other ranks are sent of this micro-batch."""
        slots = self.state.stages[stage].compiled.slot_by_tensor
        return [
            (route.target, [slots[t] for t in names])
            for route in self.messages.routes_to_others(stage, microbatch, self.rank)
            if (names := self.messages.sent(route, microbatch))
        ]

    def _receive(self, action: Receive) -> Closure | None:
        names = self.messages.sent(action.route, action.microbatch)
        if not names:
            return None
        stage, m = self.state.stages[action.route.target], action.microbatch
        rows: Sequence[dict[str, Any]]
        rows = stage.arrivals if action.route.direction is Direction.FORWARD else stage.gradients
        receive: Callable[[int], Sequence[Any] | None] = self.transport.receiver(
            Route(*action.route[:3], names), action.peer
        )
        also = [(self.state.stages[n].arrivals, common) for n, common in self.messages.shared(action.route, m)]

        def wait() -> None:
            payload = receive(m)
            if payload is not None:
                rows[m].update(zip(names, payload, strict=True))

        def wait_for_several() -> None:
            payload = receive(m)
            if payload is not None:
                row: dict[str, Any] = dict(zip(names, payload, strict=True))
                rows[m].update(row)
                for others, common in also:
                    others[m].update((name, row[name]) for name in common)

        return wait_for_several if also else wait

    def _free(self, action: Free) -> Closure:
        stage, m = self.state.stages[action.stage], action.microbatch
        live, store = stage.live, stage.store

        def free() -> None:
            live[m] = None

        def free_on_host_too() -> None:
            live[m] = None
            if store is not None:
                store.drop(m)

        return free if store is None else free_on_host_too

    def _offload(self, action: Offload) -> Closure | None:
        store = self.state.stages[action.stage].store
        return None if store is None else partial(store.let_go, action.microbatch)

    def _fetch(self, action: Fetch) -> Closure | None:
        store = self.state.stages[action.stage].store
        return None if store is None else partial(store.fetch, action.microbatch)

    def _reduce(self, index: int) -> Closure | None:
        stage, transport, sizes = self.state.stages[index], self.transport, self.state.sizes
        statistics, reduces = stage.replica.statistics, self.reduces
        if not reduces and statistics is None:
            return None
        replica = stage.replica
        own = [p for name, p in replica.parameters.items() if name not in replica.copied]

        def reduce() -> None:
            if reduces:
                replica.collect_gradients()
                trained = [[p] for p in own if p.requires_grad]  # a phase freezes what it does not train
                start = partial(transport.start_reduce, index)
                stage.finish_reduce = reduce_gradients(trained, start, replica.precision.reduced)
            if statistics is not None:
                stage.finish_statistics = statistics.start_exchange(transport, index, sizes)

        return reduce

    def _reduce_shared(self, action: ReduceShared) -> Closure | None:
        if not self.reduces:
            return None
        held = [self.state.stages[index] for index in action.stages if index in self.state.stages]
        copies = [[stage.replica.parameters[name] for stage in held] for name in self.shared[action.stages]]
        start = partial(self.transport.start_shared, action.stages, ranks_of(self.placement, action))
        dtype = held[0].replica.precision.reduced

        def reduce() -> None:
            for stage in held:
                stage.replica.collect_gradients()
            finish = reduce_gradients(copies, start, dtype)
            for stage in held:
                stage.finish_shared.append(finish)

        return reduce

    def _step(self, index: int) -> Closure:
        state, stage = self.state, self.state.stages[index]

        def step() -> None:
            stage.wait_reduce()
            if state.verdict.skip:
                stage.replica.drop_gradients()
            else:
                stage.replica.step()

        return step


def run_backward(roots: list[Tensor | GradientEdge], gradients: list[Tensor]) -> None:
    """`torch.autograd.backward` without what it does around the engine's call.

    It checks shapes that are known to fit and copies the thread's context for compiled graphs,
    which took a tenth of a step of small layers (`benchmarks/runtime.py`, executor alone).
    """
    torch.autograd.Variable._execution_engine.run_backward(
        tuple(roots), tuple(gradients), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


def _copy(loss: Tensor) -> Tensor:
    """The loss alone, without waiting for it: it may lie in memory of the size of what it was reduced from."""
    return loss.detach().clone()


def _edge(root: Tensor) -> GradientEdge | None:
    """Where backward starts, without the tensor; None where nothing needs a gradient."""
    if (node := root.grad_fn) is not None:
        return GradientEdge(node, root.output_nr)
    return get_gradient_edge(root) if root.requires_grad else None


def _add(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    """The sum of two gradients, as autograd adds them: of which either may not have been given."""
    if total is None or part is None:
        return part if total is None else total
    return total + part
