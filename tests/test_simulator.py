from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeflow.errors import VerificationError
from pipeflow.execution_plan import Plan
from pipeflow.graphs.costs import GraphCosts
from pipeflow.lowering import lower
from pipeflow.partitioners.cluster import Cluster, Device
from pipeflow.program import Compute, Kind, Mode, Receive, Reduce, Send, Step, rank_of
from pipeflow.schedules import SCHEDULES
from pipeflow.simulator import simulate
from pipeflow.testing.drawn_plans import plans
from pipeflow.testing.hand import chain_costs, hand_plan


@pytest.mark.parametrize("schedule", SCHEDULES)
@given(
    num_stages=st.integers(1, 6),
    num_microbatches=st.integers(1, 9),
    forward=st.integers(1, 5),
    backward=st.integers(0, 9),
)
@settings(max_examples=40)
def test_equal_stages_and_free_transfers_give_the_makespan_of_the_papers(
    schedule: str, num_stages: int, num_microbatches: int, forward: int, backward: int
) -> None:
    """(M + S - 1) (f + b), for GPipe as for 1F1B."""
    update = {"forward_seconds": forward, "backward_input_seconds": backward, "backward_weight_seconds": 0}
    chain = chain_costs(num_stages)
    costs = GraphCosts(
        name="even", inputs=chain.inputs, layers=tuple(layer.model_copy(update=update) for layer in chain.layers)
    )
    plan = hand_plan(costs, tuple((s,) for s in range(num_stages)), num_microbatches, schedule=schedule)
    timeline = simulate(plan)
    assert timeline.makespan == (num_microbatches + num_stages - 1) * (forward + backward)
    assert timeline.busy_seconds_by_rank == (num_microbatches * (forward + backward),) * num_stages
    assert timeline.bubble == pytest.approx((num_stages - 1) / (num_microbatches + num_stages - 1))


def longest_path(plan: Plan, program_seconds: dict[Compute, float]) -> float:
    """Of the computes that every micro-batch needs one after the other, by the edges of the graph."""
    edges = {(plan.stage_by_layer[a], plan.stage_by_layer[b]) for a, b in plan.costs.graph.edges}
    best = 0.0
    for microbatch in range(plan.num_microbatches):
        end: dict[int, float] = {}
        for stage in range(len(plan.stages)):
            before = [end[a] for a, b in edges if b == stage and a != stage]
            end[stage] = max(before, default=0.0) + program_seconds[Compute(Kind.FORWARD, stage, microbatch)]
        for stage in range(len(plan.stages)):
            backward = program_seconds.get(Compute(Kind.BACKWARD, stage, microbatch), 0.0)
            best = max(best, end[stage] + backward)
    return best


@given(plans())
@settings(max_examples=100)
def test_the_laws_of_any_timeline(plan: Plan) -> None:
    program = lower(plan)
    timeline = simulate(program, plan=plan)
    assert simulate(plan) == timeline
    events_by_rank = [[e for e in timeline.events if e.rank == rank] for rank in range(program.num_ranks)]
    assert tuple(tuple(e.action for e in events) for events in events_by_rank) == program.actions_by_rank
    seconds = {e.action: e.seconds for e in timeline.events if isinstance(e.action, Compute)}
    slack = 1 - 1e-9
    assert timeline.makespan >= longest_path(plan, seconds) * slack
    assert timeline.makespan >= max(timeline.busy_seconds_by_rank) * slack
    assert timeline.makespan == pytest.approx(max(e.end for e in timeline.events))
    # Waits and work fill the time of a rank, but for rounding, until its last action.
    for rank, events in enumerate(events_by_rank):
        waits = math.fsum(s for (waiting, _), s in timeline.wait_seconds.items() if waiting == rank)
        last = max((e.end for e in events if not isinstance(e.action, Send | Reduce)), default=0.0)
        assert timeline.busy_seconds_by_rank[rank] + waits == pytest.approx(last)


@given(plans())
@settings(max_examples=100)
def test_nothing_happens_before_what_it_needs(plan: Plan) -> None:
    timeline = simulate(plan)
    arrivals = {(e.action.route, e.action.microbatch): e.end for e in timeline.events if isinstance(e.action, Send)}
    for event in timeline.events:
        if isinstance(event.action, Receive):
            assert event.end >= arrivals[event.action.route, event.action.microbatch]
    ends = {e.action: e.end for e in timeline.events if isinstance(e.action, Compute)}
    for event in timeline.events:
        if isinstance(event.action, Send):
            kind = Kind.FORWARD if event.action.route.direction.value == "F" else Kind.BACKWARD
            assert event.start >= ends[Compute(kind, event.action.route.source, event.action.microbatch)]
    reduced = {(e.rank, e.action.stage): e for e in timeline.events if isinstance(e.action, Reduce)}
    for event in timeline.events:
        if isinstance(event.action, Step) and (event.rank, event.action.stage) in reduced:
            assert event.end >= reduced[event.rank, event.action.stage].end


def test_a_link_serves_one_message_after_the_other_and_latency_comes_on_top() -> None:
    """100 bytes at 25 bytes a second: 4 s on the link, though a forward takes 1 s; then 0.5 s on the way."""
    cluster = Cluster.uniform(2, bandwidth=25.0, latency=0.5)
    plan = hand_plan(chain_costs(2), ((0,), (1,)), 3, cluster=cluster)
    timeline = simulate(lower(plan, mode=Mode.INFER), plan=plan)
    sends = [(e.start, e.end) for e in timeline.events if isinstance(e.action, Send)]
    assert sends == [(1.0, 5.5), (5.0, 9.5), (9.0, 13.5)]
    assert timeline.makespan == 14.5
    assert timeline.wait_seconds == {(1, 0): 11.5}


def test_a_reduction_starts_with_the_last_replica_and_runs_beside_computes() -> None:
    """Two replicas of the last stage: 1000 bytes of gradients, 1000 seconds, and stage 0 goes on."""
    cluster = Cluster.uniform(3, bandwidth=1.0, latency=0.0)
    plan = hand_plan(chain_costs(2, parameter_bytes=1000), ((0,), (1, 2)), 2, cluster=cluster)
    timeline = simulate(plan)
    reductions = [e for e in timeline.events if isinstance(e.action, Reduce)]
    late = max(e.end for e in timeline.events if e.action == Compute(Kind.BACKWARD, 1, 1))
    assert [(e.rank, e.start, e.end) for e in reductions] == [(1, late, late + 1000), (2, late, late + 1000)]
    last = max(e.end for e in timeline.events if isinstance(e.action, Compute))
    assert last > late
    assert timeline.wait_seconds[1, 2] > 1000
    assert timeline.wait_seconds[2, 2] == 1000


def test_devices_have_speeds_of_their_own() -> None:
    devices = (Device(name="a", speed=2.0), Device(name="b", speed=1.0, speed_by_kind={"": 0.5}))
    plan = hand_plan(chain_costs(2), ((0,), (1,)), 1, cluster=Cluster(devices=devices))
    seconds = {str(e.action): e.seconds for e in simulate(plan).events if isinstance(e.action, Compute)}
    assert seconds == {"0F0": 0.5, "0B0": 1.0, "1F0": 2.0, "1B0": 4.0}


def test_a_program_that_cannot_end_is_refused_with_the_reason() -> None:
    plan = hand_plan(chain_costs(2), ((0,), (1,)), 1)
    program = lower(plan)
    first = program.actions_by_rank[0]
    stuck = dataclasses.replace(program, actions_by_rank=((first[0], *first[2:]), program.actions_by_rank[1]))
    with pytest.raises(VerificationError, match="'free 0,0' comes before 'send 0>1F0 l0'"):
        simulate(stuck, plan=plan)


def test_the_text_of_a_timeline() -> None:
    plan = hand_plan(chain_costs(3), ((0,), (1,), (2,)), 4)
    assert simulate(plan).text(width=58).splitlines()[1:] == [
        "rank 0 |001122........aaaa33bbbb..cccc..dddd|  67% 5.3 KiB",
        "rank 1 |..0011....aaaa22bbbb33cccc..dddd....|  67% 5.1 KiB",
        "rank 2 |....00aaaa11bbbb22cccc33dddd........|  67% 4.6 KiB",
    ]


def test_the_text_keeps_its_width_and_names_only_ranks_in_use() -> None:
    plan = hand_plan(chain_costs(2), ((3,), (11,)), 12, schedule="gpipe")
    lines = simulate(plan).text(width=80).splitlines()
    assert [line.partition("|")[0].strip() for line in lines[1:]] == ["rank 3", "rank 11"]
    assert all(len(line) <= 80 for line in lines[1:])


def test_a_trace_file(tmp_path: Path) -> None:
    plan = hand_plan(chain_costs(2), ((0, 1), (2,)), 2, cluster=Cluster.uniform(3, bandwidth=100.0))
    timeline = simulate(plan)
    path = tmp_path / "trace.json"
    timeline.to_chrome(path)
    events = json.loads(path.read_text())["traceEvents"]
    spans = {(e["pid"], e["name"]): e for e in events if e["ph"] == "X"}
    assert spans[0, "1F1"]["cat"] == "forward"
    assert spans[0, "1F1"]["dur"] == pytest.approx(1e6)
    assert (1, "send 0>1F1 l0") in spans
    assert (2, "reduce 0") in spans
    names = {(e["pid"], e["tid"]) for e in events if e["name"] == "thread_name"}
    assert names >= {(e["pid"], e["tid"]) for e in spans.values()}
    tracks = [(e["pid"], e["tid"], e["ts"], e["ts"] + e["dur"]) for e in events if e["ph"] == "X" and e["pid"] == 0]
    for (pid, tid, _, end), (next_pid, next_tid, start, _) in zip(sorted(tracks), sorted(tracks)[1:], strict=False):
        assert (pid, tid) != (next_pid, next_tid) or start >= end - 1e-3


@given(plans(), st.integers(1, 120))
@settings(max_examples=30)
def test_any_timeline_can_be_shown(plan: Plan, width: int) -> None:
    for mode in Mode:
        timeline = simulate(lower(plan, mode=mode), plan=plan)
        lines = timeline.text(width=width).splitlines()
        assert len(lines) == 1 + len({rank_of(plan.placement, s, q) for s, r in enumerate(plan.placement)
                                      for q in range(len(r))})  # fmt: skip
