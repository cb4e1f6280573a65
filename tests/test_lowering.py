from __future__ import annotations

import pytest
from hypothesis import given, settings

from pipeflow.errors import PlanError
from pipeflow.execution_plan import Plan
from pipeflow.graphs.costs import GraphCosts, LayerCosts, TensorCosts
from pipeflow.lowering import lower, routes_of
from pipeflow.partitioners.partition import Mesh, Stage
from pipeflow.program import (
    Compute,
    Direction,
    Free,
    Kind,
    Mode,
    Placement,
    Receive,
    Reduce,
    Route,
    Send,
    Step,
    parse_action,
    rank_of,
)
from pipeflow.schedules import SCHEDULES, ComputeOrder, OrderFunction, Schedule
from pipeflow.testing.drawn_plans import plans
from pipeflow.testing.hand import chain_costs, hand_plan


def with_layer(plan: Plan, layer: LayerCosts) -> Plan:
    """The plan with one layer's costs exchanged."""
    costs = plan.costs
    layers = tuple(layer if old.name == layer.name else old for old in costs.layers)
    return plan.model_copy(update={"costs": GraphCosts(name=costs.name, inputs=costs.inputs, layers=layers)})


def test_the_text_of_a_small_program() -> None:
    """A skip from a stage of two replicas, whose last reader shares a rank with one of them."""
    plan = hand_plan(chain_costs(3, skips=((0, 2),)), ((0, 1), (2,), (3,)), 3)
    assert str(lower(plan)) == (
        "rank 0: 0F0; send 0>1F0 l0; send 0>2F0 l0; 0F2; send 0>1F2 l0; send 0>2F2 l0; "
        "recv 1>0B0 l0#0; recv 2>0B0 l0#1; 0B0; free 0,0; recv 1>0B2 l0#0; recv 2>0B2 l0#1; 0B2; free 0,2; "
        "reduce 0; step 0\n"
        "rank 1: 0F1; send 0>1F1 l0; send 0>2F1 l0; recv 1>0B1 l0#0; recv 2>0B1 l0#1; 0B1; free 0,1; reduce 0; step 0\n"
        "rank 2: recv 0>1F0 l0; 1F0; send 1>2F0 l1; recv 0>1F1 l0; 1F1; send 1>2F1 l1; recv 2>1B0 l1; 1B0; "
        "send 1>0B0 l0#0; free 1,0; recv 0>1F2 l0; 1F2; send 1>2F2 l1; recv 2>1B1 l1; 1B1; send 1>0B1 l0#0; free 1,1; "
        "recv 2>1B2 l1; 1B2; send 1>0B2 l0#0; free 1,2; step 1\n"
        "rank 3: recv 1>2F0 l1; recv 0>2F0 l0; 2F0; 2B0; send 2>1B0 l1; send 2>0B0 l0#1; free 2,0; "
        "recv 1>2F1 l1; recv 0>2F1 l0; 2F1; 2B1; send 2>1B1 l1; send 2>0B1 l0#1; free 2,1; "
        "recv 1>2F2 l1; recv 0>2F2 l0; 2F2; 2B2; send 2>1B2 l1; send 2>0B2 l0#1; free 2,2; step 2"
    )


def test_the_text_of_a_program_for_inference() -> None:
    plan = hand_plan(chain_costs(2), ((0, 1), (2,)), 3)
    assert str(lower(plan, mode=Mode.INFER)) == (
        "rank 0: 0F0; send 0>1F0 l0; free 0,0; 0F2; send 0>1F2 l0; free 0,2\n"
        "rank 1: 0F1; send 0>1F1 l0; free 0,1\n"
        "rank 2: recv 0>1F0 l0; 1F0; free 1,0; recv 0>1F1 l0; 1F1; free 1,1; recv 0>1F2 l0; 1F2; free 1,2"
    )


def test_a_channel_is_received_in_the_order_it_is_sent() -> None:
    """Rank 1's message to rank 0 for stage 2 stands before the gradient it is asked for first."""
    plan = hand_plan(chain_costs(4), ((0,), (1,), (0,), (1,)), 4, schedule="gpipe")
    program = lower(plan)
    for a, b in ((0, 1), (1, 0)):
        sent = [(s.route, s.microbatch) for s in program.actions_by_rank[a] if isinstance(s, Send)]
        received = [(r.route, r.microbatch) for r in program.actions_by_rank[b] if isinstance(r, Receive)]
        assert sent == received


def test_a_stage_that_learns_nothing_has_no_backward_and_is_freed_after_its_forward() -> None:
    plan = hand_plan(chain_costs(2), ((0,), (1,)), 2)
    output = TensorCosts(name="l0", bytes=100)
    frozen = plan.costs.layers[0].model_copy(update={"has_backward": False, "outputs": (output,)})
    plan = with_layer(plan, frozen)
    assert str(lower(plan)) == (
        "rank 0: 0F0; send 0>1F0 l0; free 0,0; 0F1; send 0>1F1 l0; free 0,1\n"
        "rank 1: recv 0>1F0 l0; 1F0; 1B0; free 1,0; recv 0>1F1 l0; 1F1; 1B1; free 1,1; step 1"
    )


def test_a_replica_without_a_micro_batch_still_reduces_and_steps() -> None:
    plan = hand_plan(chain_costs(1), ((0, 1, 2),), 2)
    assert str(lower(plan)).splitlines()[2] == "rank 2: reduce 0; step 0"


def test_reductions_shared_by_ranks_stand_in_one_order() -> None:
    """Rank 0 ends stage 0 first, rank 1 stage 1: both reduce the deeper one first."""
    program = lower(hand_plan(chain_costs(2), ((0, 1), (1, 0)), 3))
    for actions in program.actions_by_rank:
        assert [a.stage for a in actions if isinstance(a, Reduce)] == [1, 0]


def split_backward(placement: Placement, num_microbatches: int) -> ComputeOrder:
    """One rank, backward in two halves, the weights' last."""
    kinds = (Kind.FORWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT)
    stages = range(len(placement))
    return (
        tuple(
            Compute(kind, s, m)
            for kind in kinds
            for m in range(num_microbatches)
            for s in (stages if kind is Kind.FORWARD else reversed(stages))
        ),
    )


def test_a_split_backward_is_freed_after_its_weight_half() -> None:
    plan = hand_plan(chain_costs(1), ((0,),), 1)
    assert str(lower(plan, schedule=split_backward)) == "rank 0: 0F0; 0I0; 0W0; free 0,0; step 0"


def incomplete(placement: Placement, num_microbatches: int) -> ComputeOrder:
    return tuple(computes[:-1] for computes in SCHEDULES["gpipe"].order(placement, num_microbatches))


def misplaced(placement: Placement, num_microbatches: int) -> ComputeOrder:
    return tuple(reversed(SCHEDULES["gpipe"].order(placement, num_microbatches)))


def too_few_ranks(placement: Placement, num_microbatches: int) -> ComputeOrder:
    return SCHEDULES["gpipe"].order(placement, num_microbatches)[:-1]


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (incomplete, r"test_lowering:incomplete' computes stage 0, micro-batch 2: 1 F, 0 B"),
        (misplaced, r"puts 1F0 on rank 0; its replica is on rank 1"),
        (too_few_ranks, r"orders 1 ranks; the placement has 2"),
        ("unknown", r"no schedule; known are 'gpipe', '1f1b'"),
    ],
)
def test_a_schedule_that_is_not_complete_is_refused(schedule: object, message: str) -> None:
    plan = hand_plan(chain_costs(2), ((0,), (1,)), 3)
    with pytest.raises(PlanError, match=message):
        lower(plan, schedule=schedule)  # type: ignore[arg-type]


def test_what_cannot_be_executed_is_refused_by_name() -> None:
    plan = hand_plan(chain_costs(1), ((0, 1),), 2)
    mesh = Mesh(devices=(0, 1), axes=(("replica", 1), ("tensor", 2)))
    with pytest.raises(PlanError, match="only the axis 'replica' is executed"):
        lower(plan.model_copy(update={"stages": (Stage(layers=("l0",), mesh=mesh),)}))
    stuck = with_layer(plan, plan.costs.layers[0].model_copy(update={"replicable": False}))
    with pytest.raises(PlanError, match="stage 0 has 2 replicas, but its layer 'l0' would not train"):
        lower(stuck)
    assert lower(stuck, mode=Mode.INFER).num_actions == 4


def test_costs_that_contradict_themselves_are_refused() -> None:
    plan = hand_plan(chain_costs(2), ((0,), (1,)), 1)
    broken = with_layer(plan, plan.costs.layers[0].model_copy(update={"has_backward": False}))
    with pytest.raises(PlanError, match="tensors l0 a gradient"):
        lower(broken)


@given(plans())
@settings(max_examples=150)
def test_lowering_keeps_the_order_of_computes_and_adds_what_must_stand_around_them(plan: Plan) -> None:
    program = lower(plan)
    order = SCHEDULES[plan.schedule].order(plan.placement, plan.num_microbatches)
    for rank, actions in enumerate(program.actions_by_rank):
        computes = [a for a in actions if isinstance(a, Compute)]
        kept = set(computes)
        assert computes == [c for c in order[rank] if c in kept]
        assert all(c.kind is not Kind.FORWARD for c in set(order[rank]) - kept)
        # Nothing is computed after the first step, and each micro-batch is freed once.
        kinds = [type(a) for a in actions]
        if Step in kinds:
            assert set(kinds[kinds.index(Step) :]) == {Step}
        frees = [a for a in actions if isinstance(a, Free)]
        assert len(frees) == len(set(frees)) == len({(c.stage, c.microbatch) for c in computes})


@given(plans())
@settings(max_examples=150)
def test_what_crosses_between_ranks_is_what_the_routes_say(plan: Plan) -> None:
    program = lower(plan)
    expected = {
        (route, m)
        for route in routes_of(plan)
        for m in range(plan.num_microbatches)
        if rank_of(plan.placement, route.source, m) != rank_of(plan.placement, route.target, m)
    }
    actions = [a for rank in program.actions_by_rank for a in rank]
    sent = [(a.route, a.microbatch) for a in actions if isinstance(a, Send)]
    received = [(a.route, a.microbatch) for a in actions if isinstance(a, Receive)]
    assert len(sent) == len(received) == len(expected)
    assert set(sent) == set(received) == expected


@given(plans())
@settings(max_examples=60)
def test_a_program_is_read_back_from_its_text(plan: Plan) -> None:
    program = lower(plan)
    lines = str(program).splitlines()
    parsed = tuple(
        tuple(parse_action(text, plan.placement) for text in line.partition(": ")[2].split("; ") if text)
        for line in lines
    )
    assert parsed == program.actions_by_rank


def test_routes_of_a_plan() -> None:
    plan = hand_plan(chain_costs(3, skips=((0, 2),)), ((0,), (1,), (2,)), 1)
    assert routes_of(plan) == (
        Route(Direction.FORWARD, 0, 1, ("l0",)),
        Route(Direction.FORWARD, 0, 2, ("l0",)),
        Route(Direction.FORWARD, 1, 2, ("l1",)),
        Route(Direction.BACKWARD, 1, 0, ("l0#0",)),
        Route(Direction.BACKWARD, 2, 0, ("l0#1",)),
        Route(Direction.BACKWARD, 2, 1, ("l1",)),
    )


def odd_order(what: object) -> OrderFunction:
    def order(placement: Placement, num_microbatches: int) -> ComputeOrder:
        if isinstance(what, BaseException):
            raise what
        return what  # type: ignore[return-value]

    return order


GOOD = (Compute(Kind.FORWARD, 0, 0), Compute(Kind.BACKWARD, 0, 0))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (ZeroDivisionError("by nought"), "fails for 1 stages and 1 micro-batches: ZeroDivisionError: by nought"),
        (None, "TypeError"),
        (3, "TypeError"),
        ((3,), "TypeError"),
        (("text",), "AttributeError"),
        ((), "orders 0 ranks"),
        ((GOOD, ()), "orders 2 ranks"),
        (((Compute(Kind.BACKWARD, 7, 0), *GOOD),), "IndexError"),
        (((Compute(Kind.FORWARD, 0, 7), *GOOD),), "IndexError"),
        (((Compute(Kind.FORWARD, -1, 0), GOOD[1]),), "count from 0"),
        (((Compute(Kind.FORWARD, 0, -1), GOOD[1]),), "count from 0"),
        ((GOOD[:1],), "it needs one F and one B"),
        (PlanError("only for two stages"), "^only for two stages$"),
    ],
)
def test_a_function_that_gives_no_order_is_named(what: object, message: str) -> None:
    row = Schedule("mine", odd_order(what), SCHEDULES["gpipe"].in_flight)
    with pytest.raises(PlanError, match=message):
        lower(hand_plan(chain_costs(1), ((0,),), 1), schedule=row)
