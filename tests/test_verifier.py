from __future__ import annotations

import dataclasses
from collections import deque
from typing import Literal

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from pipeflow.errors import PlanError, VerificationError
from pipeflow.execution_plan import Plan
from pipeflow.flows import flows
from pipeflow.lowering import lower
from pipeflow.partitioners.cluster import Cluster
from pipeflow.program import (
    Action,
    Compute,
    Direction,
    Free,
    Kind,
    Mode,
    Program,
    Receive,
    Reduce,
    ReduceShared,
    Send,
    Step,
    parse_action,
    rank_of,
)
from pipeflow.testing.drawn_plans import check_program, plans
from pipeflow.testing.hand import chain_costs, hand_plan
from pipeflow.verifier import Proof, verify

Semantics = Literal["posted", "rendezvous"]


class Oracle:
    """Runs a program naively, with sets of tensors instead of tensors; another reading of the rules.

    Works from layers and tensors, not from routes per stage, and waits where a device would.
    """

    def __init__(self, program: Program, plan: Plan, semantics: Semantics) -> None:
        self.program, self.plan, self.semantics = program, plan, semantics
        self.training = program.mode is Mode.TRAIN
        self.flows = flows(plan.costs, [stage.layers for stage in plan.stages])
        self.held: dict[tuple[int, int], set[str]] = {}
        self.computed: list[Compute] = []
        self.freed: list[Free] = []
        self.channels: dict[tuple[int, int], deque[tuple[object, int]]] = {}
        self.started: list[list[Action]] = [[] for _ in program.actions_by_rank]
        self.stepped: list[tuple[int, int]] = []
        self.position = [0] * program.num_ranks

    def learns(self, stage: int) -> bool:
        layers = [self.plan.costs.layer_by_name[n] for n in self.plan.stages[stage].layers]
        return self.training and any(c.has_backward for c in layers)

    def sums(self, stage: int) -> dict[str, Action | None]:
        """What the stage trains, by name, and the sum that each takes part in."""
        if not self.training:
            return {}
        costs, names = self.plan.costs, self.plan.stages[stage].layers
        copied = [s for s in costs.shared if costs.sharing == "copies" and s.is_copyable and s.bytes]
        alone = Reduce(stage) if len(self.plan.stages[stage].devices) > 1 else None
        result: dict[str, Action | None] = {}
        for layer in (costs.layer_by_name[n] for n in names):
            if layer.has_backward and layer.parameter_bytes > sum(s.bytes for s in copied if layer.name in s.layers):
                result[layer.name] = alone
        for shared in copied:
            stages = tuple(sorted({self.plan.stage_by_layer[n] for n in shared.layers}))
            if stage in stages and shared.is_trained:
                result[shared.name] = ReduceShared(stages) if len(stages) > 1 else alone
            elif any(costs.layer_by_name[n].has_backward for n in shared.layers if n in names):
                result[shared.name] = alone
        return result

    def ranks(self, reduction: Action) -> set[int]:
        assert isinstance(reduction, Reduce | ReduceShared)
        stages = (reduction.stage,) if isinstance(reduction, Reduce) else reduction.stages
        return {rank for stage in stages for rank in self.plan.stages[stage].devices}

    def rank(self, stage: int, microbatch: int) -> int:
        return rank_of(self.plan.placement, stage, microbatch)

    def computes(self, stage: int, microbatch: int) -> list[Compute]:
        kinds = [Kind.FORWARD, Kind.BACKWARD] if self.learns(stage) else [Kind.FORWARD]
        return [Compute(kind, stage, microbatch) for kind in kinds]

    def accepts(self) -> bool:
        """Whether every rank comes to its end with everything done and nothing left over."""
        try:
            while sum(self.run(rank) for rank in range(self.program.num_ranks)):
                pass
        except (AssertionError, KeyError):
            return False
        everything = [(s, m) for s in range(len(self.plan.stages)) for m in range(self.plan.num_microbatches)]
        replicas = [(rank, s) for s, stage in enumerate(self.plan.stages) for rank in stage.devices if self.sums(s)]
        return (
            all(p == len(a) for p, a in zip(self.position, self.program.actions_by_rank, strict=True))
            and sorted(map(str, self.computed)) == sorted(str(c) for s, m in everything for c in self.computes(s, m))
            and sorted(self.freed) == everything
            and not any(self.held.values())
            and not any(self.channels.values())
            and sorted(self.stepped) == sorted(replicas)
        )  # fmt: skip

    def run(self, rank: int) -> bool:
        """Runs one action; False if the rank waits or has ended."""
        actions = self.program.actions_by_rank[rank]
        if self.position[rank] == len(actions):
            return False
        action = actions[self.position[rank]]
        match action:
            case Compute():
                self.compute(rank, action)
            case Send():
                if not self.send(rank, action):
                    return False
            case Receive():
                channel = self.channels.get((action.peer, rank))
                if not channel:
                    return False
                assert channel.popleft() == (action.route, action.microbatch)
                assert self.rank(action.route.target, action.microbatch) == rank
                self.hold(action.route.target, action.microbatch, action.route.direction, action.route.payload)
            case Free(stage, microbatch):
                assert all(c in self.computed for c in self.computes(stage, microbatch))
                assert self.rank(stage, microbatch) == rank
                self.held.pop((stage, microbatch))
                self.freed.append(action)
            case Reduce() | ReduceShared():
                assert action not in self.started[rank]
                assert rank in self.ranks(action)
                summed = [s for s in range(len(self.plan.stages)) if action in self.sums(s).values()]
                assert summed
                for stage in summed:
                    if rank in self.plan.stages[stage].devices:
                        self.check_gradients(rank, stage)
                self.started[rank].append(action)
            case Step(stage):
                self.check_gradients(rank, stage)
                for reduction in filter(None, self.sums(stage).values()):
                    assert reduction in self.started[rank]
                    if not self.is_reduced(reduction, []):
                        return False
                self.stepped.append((rank, stage))
        self.position[rank] += 1
        return True

    def hold(self, stage: int, microbatch: int, direction: Direction, names: tuple[str, ...]) -> None:
        held = self.held.setdefault((stage, microbatch), set())
        for name in names:
            assert f"{direction.value} {name}" not in held
            held.add(f"{direction.value} {name}")

    def compute(self, rank: int, action: Compute) -> None:
        kind, stage, microbatch = action
        assert self.rank(stage, microbatch) == rank
        assert action in self.computes(stage, microbatch)
        assert action not in self.computed
        earlier = [c for c in self.computed if (c.kind, c.stage, self.rank(*c[1:])) == (kind, stage, rank)]
        assert all(c.microbatch < microbatch for c in earlier)
        if kind is Kind.FORWARD:
            given = [f.tensor for f in self.flows.values() if f.source not in (None, stage) and stage in f.targets]
            assert all(f"F {name}" in self.held.get((stage, microbatch), set()) for name in given)
        else:
            assert action._replace(kind=Kind.FORWARD) in self.computed
            given = [p.name for f in self.flows.values() if f.source == stage for p in f.parts if p.stage != stage]
            assert all(f"B {name}" in self.held[stage, microbatch] for name in given)
        self.computed.append(action)
        self.held.setdefault((stage, microbatch), set()).add(str(kind))
        for flow in self.flows.values():
            if kind is Kind.FORWARD and flow.source == stage:
                for target in flow.targets:
                    self.give(rank, target, microbatch, Direction.FORWARD, flow.tensor)
            if kind is Kind.BACKWARD and flow.source not in (None, stage):
                for part in flow.parts:
                    if part.stage == stage:
                        self.give(rank, flow.source or 0, microbatch, Direction.BACKWARD, part.name)

    def give(self, rank: int, target: int, microbatch: int, direction: Direction, name: str) -> None:
        """Hands over what a stage on the same rank needs."""
        if self.rank(target, microbatch) == rank:
            self.hold(target, microbatch, direction, (name,))

    def send(self, rank: int, action: Send) -> bool:
        route, microbatch, peer = action
        kind = Kind.FORWARD if route.direction is Direction.FORWARD else Kind.BACKWARD
        assert str(kind) in self.held[route.source, microbatch]
        assert self.rank(route.source, microbatch) == rank
        assert peer != rank
        if self.semantics == "rendezvous":
            actions = self.program.actions_by_rank[peer]
            if self.position[peer] == len(actions):
                return False
            there = actions[self.position[peer]]
            if not isinstance(there, Receive) or there.peer != rank:
                return False
        self.channels.setdefault((rank, peer), deque()).append((route, microbatch))
        return True

    def check_gradients(self, rank: int, stage: int) -> None:
        assert self.sums(stage)
        assert rank in self.plan.stages[stage].devices
        for microbatch in range(self.plan.num_microbatches):
            if self.rank(stage, microbatch) == rank:
                assert self.computes(stage, microbatch)[-1] in self.computed

    def is_reduced(self, reduction: Action, below: list[Action]) -> bool:
        """All its ranks have started it, after others that can end before it."""
        if reduction in below:
            return False
        started = [self.started[rank] for rank in self.ranks(reduction)]
        return all(
            reduction in s and all(self.is_reduced(other, [*below, reduction]) for other in s[: s.index(reduction)])
            for s in started
        )


def is_proved(program: Program, plan: Plan, semantics: Semantics = "posted") -> bool:
    try:
        verify(program, plan=plan, semantics=semantics)
    except VerificationError as error:
        assert error.counterexample
        return False
    return True


def with_actions(program: Program, rank: int, actions: list[Action]) -> Program:
    by_rank = list(program.actions_by_rank)
    by_rank[rank] = tuple(actions)
    return dataclasses.replace(program, actions_by_rank=tuple(by_rank))


@given(plans())
@settings(max_examples=150)
def test_every_plan_is_proved(plan: Plan) -> None:
    check_program(plan)


@given(plans(max_microbatches=4), st.sampled_from(Mode), st.sampled_from(["posted", "rendezvous"]))
@settings(max_examples=100)
def test_the_proof_and_the_oracle_agree(plan: Plan, mode: Mode, semantics: Semantics) -> None:
    program = lower(plan, mode=mode)
    accepts = Oracle(program, plan, semantics).accepts()
    assert is_proved(program, plan, semantics) == accepts
    assert accepts or semantics == "rendezvous"
    event(f"{semantics} {accepts}")


@given(plans(max_microbatches=4), st.sampled_from(Mode), st.data())
@settings(max_examples=300)
def test_a_mutated_program_is_refused_or_still_does_the_same(plan: Plan, mode: Mode, data: st.DataObject) -> None:
    program = lower(plan, mode=mode)
    rank = data.draw(st.sampled_from([r for r, a in enumerate(program.actions_by_rank) if a]), label="rank")
    actions = list(program.actions_by_rank[rank])
    index = data.draw(st.integers(0, len(actions) - 1), label="index")
    mutation = data.draw(st.sampled_from(["drop", "duplicate", "swap", "swap", "move"]), label="mutation")
    action = actions[index]
    if mutation == "drop":
        del actions[index]
    elif mutation == "duplicate":
        actions.insert(data.draw(st.integers(0, len(actions)), label="at"), action)
    elif mutation == "swap":
        other = data.draw(st.integers(0, len(actions) - 1), label="other")
        actions[index], actions[other] = actions[other], action
    else:
        del actions[index]
        actions.insert(data.draw(st.integers(0, len(actions)), label="to"), action)
    mutant = with_actions(program, rank, actions)
    proved = is_proved(mutant, plan)
    assert proved == Oracle(mutant, plan, "posted").accepts()
    if mutation in ("drop", "duplicate"):
        assert not proved
    event(f"{mutation} {proved}")


def parse(text: str, plan: Plan, mode: Mode = Mode.TRAIN) -> Program:
    lines = [line.partition(": ")[2] for line in text.splitlines()]
    return Program(
        mode=mode,
        num_microbatches=plan.num_microbatches,
        placement=plan.placement,
        actions_by_rank=tuple(
            tuple(parse_action(action, plan.placement) for action in line.split("; ") if action) for line in lines
        ),
    )


PAIR = hand_plan(chain_costs(2), ((0,), (1,)), 2)
"""rank 0: 0F0; send 0>1F0 l0; 0F1; send 0>1F1 l0; recv 1>0B0 l0; 0B0; free 0,0; recv 1>0B1 l0; 0B1; free 0,1; step 0
rank 1: recv 0>1F0 l0; 1F0; 1B0; send 1>0B0 l0; free 1,0; recv 0>1F1 l0; 1F1; 1B1; send 1>0B1 l0; free 1,1; step 1"""

TWINS = hand_plan(chain_costs(1), ((0, 1),), 2)
"""rank 0: 0F0; 0B0; free 0,0; reduce 0; step 0
rank 1: 0F1; 0B1; free 0,1; reduce 0; step 0"""


@pytest.mark.parametrize(
    ("plan", "old", "new", "counterexample"),
    [
        (PAIR, "recv 0>1F0 l0; 1F0;", "1F0; recv 0>1F0 l0;",
         ("rank 1, action 0: '1F0'", "rank 1, action 1: 'recv 0>1F0 l0'")),
        (PAIR, "send 0>1F0 l0; ", "", ("rank 0, action 5: 'free 0,0'", "rank 0, nowhere: 'send 0>1F0 l0'")),
        (PAIR, "recv 0>1F1 l0; ", "", ("rank 1, action 5: '1F1'", "rank 1, nowhere: 'recv 0>1F1 l0'")),
        (PAIR, "0B1; ", "0B1; 0B1; ", ("rank 0, action 9: '0B1'", "rank 0, action 8: '0B1'")),
        (PAIR, "0B0; free 0,0;", "free 0,0; 0B0;", ("rank 0, action 5: 'free 0,0'", "rank 0, action 6: '0B0'")),
        (PAIR, "send 1>0B0 l0; free 1,0;", "free 1,0; send 1>0B0 l0;",
         ("rank 1, action 3: 'free 1,0'", "rank 1, action 4: 'send 1>0B0 l0'")),
        (PAIR, "1F0; 1B0;", "1B0; 1F0;", ("rank 1, action 1: '1B0'", "rank 1, action 2: '1F0'")),
        (PAIR, "; free 0,1", "", ("rank 0, nowhere: 'free 0,1'",)),
        (PAIR, "; step 1", "", ("rank 1, nowhere: 'step 1'",)),
        (PAIR, "step 1", "step 0", ("rank 1, action 10: 'step 0'",)),
        (PAIR, "step 1", "reduce 1; step 1", ("rank 1, action 10: 'reduce 1'",)),
        (PAIR, "step 1", "1F9", ("rank 1, action 10: '1F9'",)),
        (PAIR, "send 0>1F1 l0;", "send 0>1F1 x;", ("rank 0, action 3: 'send 0>1F1 x'",)),
        (PAIR, "step 0", "step 0; 1F0", ("rank 0, action 11: '1F0'",)),
        (PAIR, "0F0; send 0>1F0 l0; 0F1; send 0>1F1 l0;", "0F0; 0F1; send 0>1F1 l0; send 0>1F0 l0;",
         ("rank 0: 'send 0>1F1 l0'", "rank 1: 'recv 0>1F0 l0'")),
        (PAIR, "0F0; send 0>1F0 l0; 0F1; send 0>1F1 l0;", "0F1; send 0>1F1 l0; 0F0; send 0>1F0 l0;",
         ("rank 0, action 2: '0F0'", "rank 0, action 0: '0F1'")),
        (PAIR, "send 0>1F1 l0; recv 1>0B0 l0; 0B0;", "recv 1>0B0 l0; 0B0; send 0>1F1 l0;", ()),
        (PAIR, "0F1; send 0>1F1 l0; recv 1>0B0 l0; 0B0; free 0,0; recv 1>0B1 l0;",
         "recv 1>0B0 l0; recv 1>0B1 l0; 0F1; send 0>1F1 l0; 0B0; free 0,0;",
         ("rank 0 waits at 'recv 1>0B1 l0' for rank 1", "rank 1 waits at 'recv 0>1F1 l0' for rank 0")),
        (TWINS, "free 0,1; reduce 0; step 0", "free 0,1; step 0",
         ("rank 1, action 3: 'step 0'", "rank 1, nowhere: 'reduce 0'")),
        (TWINS, "0B1; free 0,1; reduce 0;", "reduce 0; 0B1; free 0,1;",
         ("rank 1, action 1: 'reduce 0'", "rank 1, action 2: '0B1'")),
        (TWINS, "0F1", "0I1", ("rank 1, action 0: '0I1'", "rank 1, nowhere: '0F1'")),
    ],
)  # fmt: skip
def test_a_refusal_names_the_actions(plan: Plan, old: str, new: str, counterexample: tuple[str, ...]) -> None:
    text = str(lower(plan))
    assert text.count(old) >= 1
    program = parse(text.replace(old, new, 1), plan)
    if not counterexample:
        assert is_proved(program, plan)
        return
    with pytest.raises(VerificationError) as caught:
        verify(program, plan=plan)
    assert caught.value.counterexample == counterexample


def test_a_cyclic_wait_under_rendezvous_is_the_shortest_one() -> None:
    """1F1B's crossing sends: safe while sends are posted, a standstill where they wait."""
    plan = hand_plan(chain_costs(4), ((0,), (1,), (2,), (3,)), 3)
    assert verify(plan).semantics == "posted"
    with pytest.raises(VerificationError) as caught:
        verify(plan, semantics="rendezvous")
    assert caught.value.counterexample == (
        "rank 2 waits at 'send 2>3F1 l2' for rank 3",
        "rank 3 waits at 'send 3>2B0 l2' for rank 2",
    )


def test_gpipe_needs_no_buffers() -> None:
    plan = hand_plan(chain_costs(4), ((0,), (1,), (2,), (3,)), 3, schedule="gpipe")
    assert verify(plan, semantics="rendezvous").semantics == "rendezvous"


def test_reductions_in_contradicting_orders_are_refused() -> None:
    """No two of the three ranks share two stages, and yet no order suits all three."""
    plan = hand_plan(chain_costs(3), ((0, 1), (1, 2), (2, 0)), 2)
    program = lower(plan)

    actions = list(program.actions_by_rank[0])
    actions.remove(Reduce(2))
    actions.insert(actions.index(Reduce(0)) + 1, Reduce(2))
    with pytest.raises(VerificationError, match="orders that contradict") as caught:
        verify(with_actions(program, 0, actions), plan=plan)
    assert sorted(caught.value.counterexample) == [
        "rank 0: 'reduce 0' before 'reduce 2'",
        "rank 1: 'reduce 1' before 'reduce 0'",
        "rank 2: 'reduce 2' before 'reduce 1'",
    ]


def test_too_little_memory_is_refused_with_what_is_held() -> None:
    cluster = Cluster.uniform(2, memory_bytes=5200)
    plan = hand_plan(chain_costs(2), ((0,), (1,)), 4, schedule="gpipe", cluster=cluster)
    with pytest.raises(VerificationError, match=r"rank 0 \(device:0\) needs 5.6 KiB at '0B0' and has") as e:
        verify(plan)
    assert e.value.counterexample == (
        "parameters, optimizer state and the batch: 3.3 KiB",
        "stage 0, 4 micro-batches from 0 to 3: 1.3 KiB",
        "'0B0' itself: 1000 B",
    )
    leaner = hand_plan(chain_costs(2), ((0,), (1,)), 4, schedule="1f1b", cluster=cluster)
    assert verify(leaner).peak_bytes_by_rank == (5100, 4700)


def test_a_proof_says_what_was_proved() -> None:
    assert verify(PAIR) == Proof(
        mode=Mode.TRAIN,
        semantics="posted",
        num_ranks=2,
        num_actions=22,
        num_messages=4,
        peak_bytes_by_rank=(4900, 4700),
    )


def test_a_program_of_another_plan_is_refused() -> None:
    with pytest.raises(VerificationError, match="the program is for 2 micro-batches"):
        verify(lower(PAIR), plan=TWINS)
    program = dataclasses.replace(lower(PAIR), actions_by_rank=((),))
    with pytest.raises(VerificationError, match="has 1 ranks, the plan 2"):
        verify(program, plan=PAIR)


def test_a_program_needs_its_plan_and_a_plan_no_other() -> None:
    with pytest.raises(PlanError, match="give the plan it is for"):
        verify(lower(PAIR))
    with pytest.raises(PlanError, match="only beside a program"):
        verify(PAIR, plan=PAIR)
    with pytest.raises(PlanError, match="known are 'posted' and 'rendezvous'"):
        verify(PAIR, semantics="eager")  # type: ignore[arg-type]
