from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeflow.errors import Infeasible, PlanError
from pipeflow.execution_plan import Plan
from pipeflow.graphs.costs import GraphCosts
from pipeflow.partitioners import PARTITIONERS
from pipeflow.partitioners.cluster import Cluster, Device
from pipeflow.partitioners.partition import Partition
from pipeflow.partitioners.problem import PartitionProblem
from pipeflow.plan_table import plan_table
from pipeflow.planner import plan
from pipeflow.program import Placement
from pipeflow.schedules import SCHEDULES, ComputeOrder, Schedule
from pipeflow.simulator import simulate
from pipeflow.testing.drawn_plans import learnable_costs
from pipeflow.testing.drawn_problems import clusters
from pipeflow.testing.hand import chain_costs, hand_plan
from pipeflow.verifier import verify


@dataclass(frozen=True)
class Graph:
    """What the planner asks of a layer graph."""

    name: str = "model"
    layers: dict[str, None] = field(default_factory=lambda: dict.fromkeys(["l0", "l1"]))
    digest: str = "d" * 64


@given(learnable_costs(max_layers=5), clusters(max_devices=3), st.integers(1, 12), st.sampled_from(["auto", "chain"]))
@settings(max_examples=40)
def test_what_is_planned_is_proved_and_the_same_every_time(
    costs: GraphCosts, cluster: Cluster, batch_size: int, partitioner: str
) -> None:
    def attempt() -> Plan | tuple[str, ...]:
        try:
            return plan(None, costs, cluster, batch_size=batch_size, partitioner=partitioner)
        except Infeasible as error:
            return error.reasons

    made = attempt()
    if isinstance(made, Plan):
        verify(made)
        assert made.costs == costs.at(-(-batch_size // made.num_microbatches))
        assert 1 <= made.num_microbatches <= batch_size
        assert made.certificate.lower_bound <= made.certificate.objective * (1 + 1e-9)
        again = attempt()
        assert isinstance(again, Plan)
        assert again.model_dump_json() == made.model_dump_json()
        assert str(made).count("< bottleneck") == 1
    else:
        assert made
        assert attempt() == made


@given(learnable_costs(max_layers=5), clusters(max_devices=3, limited=False), st.integers(1, 12))
@settings(max_examples=30)
def test_no_other_choice_is_faster_than_what_is_left_open(costs: GraphCosts, cluster: Cluster, batch: int) -> None:
    chosen = simulate(plan(None, costs, cluster, batch_size=batch)).makespan
    for schedule in SCHEDULES:
        for count in {1, batch}:
            given_all = plan(None, costs, cluster, batch_size=batch, schedule=schedule, num_microbatches=count)
            assert chosen <= simulate(given_all).makespan * (1 + 1e-8)


def test_what_is_given_is_kept() -> None:
    made = plan(
        None,
        chain_costs(6),
        Cluster.uniform(3),
        batch_size=24,
        partitioner="chain",
        schedule="gpipe",
        replicas=[2, 1],
        num_microbatches=5,
        optimizer_ratio=1.0,
    )
    assert [stage.num_replicas for stage in made.stages] == [2, 1]
    assert (made.schedule, made.num_microbatches, made.batch_size) == ("gpipe", 5, 24)
    assert (made.optimizer_ratio, made.costs.samples) == (1.0, 5)
    assert made.certificate.partitioner == "chain"
    assert len(plan(None, chain_costs(6), Cluster.uniform(3), batch_size=4, num_stages=2, max_replicas=1).stages) == 2


def test_ties_go_to_fewer_devices_then_to_fewer_micro_batches() -> None:
    free = plan(None, chain_costs(1, parameter_bytes=0), Cluster.uniform(2), batch_size=1)
    assert (free.num_ranks, free.num_microbatches) == (1, 1)
    alone = plan(None, chain_costs(3), Cluster.uniform(1), batch_size=8)
    assert (len(alone.stages), alone.num_microbatches) == (1, 1)


def test_the_layer_graph_is_recognised() -> None:
    made = plan(Graph(), chain_costs(2), Cluster.uniform(2), batch_size=4)  # type: ignore[arg-type]
    assert made.graph_digest == Graph().digest


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (["l0", "l1", "l2"], "lack layer 'l2' of graph 'model'"),
        (["l0"], "have layer 'l1', graph 'model' not"),
        (["l1", "l0"], "in another order"),
    ],
)
def test_costs_of_another_graph_are_refused(layers: list[str], message: str) -> None:
    graph = Graph(layers=dict.fromkeys(layers))
    with pytest.raises(PlanError, match=message):
        plan(graph, chain_costs(2), Cluster.uniform(1), batch_size=1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"partitioner": "best"}, "'best' is no partitioner; known are '"),
        ({"schedule": "best"}, "no schedule; known are 'gpipe', '1f1b'"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"num_microbatches": 0}, "num_microbatches=0"),
        ({"num_microbatches": 5}, "num_microbatches=5 for a batch of 4; each has at least 1 sample"),
        ({"optimizer_ratio": float("nan")}, "optimizer_ratio=nan"),
        ({"optimizer_ratio": float("inf")}, "optimizer_ratio=inf"),
        ({"optimizer_ratio": -1.0}, "optimizer_ratio=-1.0"),
        ({"partitioner": lambda problem: None}, "gave a NoneType; it must return a Partition"),
        ({"num_stages": 0}, "num_stages=0"),
        ({"schedule": lambda placement, count: ()}, "define it at the head of a module"),
    ],
)
def test_mistakes_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        plan(None, chain_costs(2), Cluster.uniform(2), **{"batch_size": 4, **options})  # type: ignore[arg-type]


def test_a_function_stands_for_a_partitioner_and_for_a_schedule() -> None:
    def all_on_one(problem: PartitionProblem) -> Partition:
        return PARTITIONERS["uniform"](
            PartitionProblem(costs=problem.costs, cluster=problem.cluster, num_stages=1, max_replicas=1)
        )

    order = SCHEDULES["gpipe"].order
    made = plan(None, chain_costs(4), Cluster.uniform(2), batch_size=4, partitioner=all_on_one, schedule=order)
    assert len(made.stages) == 1
    assert made.schedule == "pipeflow.schedules.gpipe:order"


def another_order(placement: Placement, num_microbatches: int) -> ComputeOrder:
    return SCHEDULES["gpipe"].order(placement, num_microbatches)


def test_a_schedule_of_ones_own_is_found_in_its_process_and_in_files_where_it_is_allowed(tmp_path: Path) -> None:
    made = plan(None, chain_costs(2), Cluster.uniform(2), batch_size=4, schedule=another_order)
    assert made.schedule == f"{__name__}:another_order"
    verify(Plan.model_validate_json(made.model_dump_json()))  # as ranks share it
    made.save(tmp_path / "plan.json")
    with pytest.raises(PlanError, match=r"plan\.json: schedule '.*' may not be named by a file.*allow="):
        Plan.load(tmp_path / "plan.json")
    for allow in ((__name__,), (__name__.partition(".")[0],)):
        assert Plan.load(tmp_path / "plan.json", allow=allow) == made
    with pytest.raises(PlanError, match="give a tuple"):
        Plan.load(tmp_path / "plan.json", allow=__name__)


def test_a_row_must_be_what_its_name_finds() -> None:
    row = Schedule("gpipe", another_order, SCHEDULES["gpipe"].in_flight)
    with pytest.raises(PlanError, match="not what its name finds"):
        plan(None, chain_costs(2), Cluster.uniform(2), batch_size=4, schedule=row)


def test_memory_decides_between_schedules() -> None:
    """At 8 micro-batches GPipe's first stage holds 8, 1F1B's as many as there are stages; both the batch."""
    costs, tight = chain_costs(2), Cluster.uniform(2, memory_bytes=4000 + 2 * 300 + 200 + 8 * 100)
    made = plan(None, costs, tight, batch_size=8, num_microbatches=8, max_replicas=1, num_stages=2)
    assert made.schedule == "1f1b"
    with pytest.raises(Infeasible):
        plan(None, costs, tight, batch_size=8, num_microbatches=8, max_replicas=1, num_stages=2, schedule="gpipe")


def test_a_partition_that_the_program_does_not_fit_is_cut_again() -> None:
    """The estimate leaves out gradients on their way; the program's own peak is what is kept."""
    costs = chain_costs(6)
    peaks = set()
    for memory in range(8_000, 18_000, 500):
        cluster = Cluster.uniform(3, memory_bytes=memory)
        try:
            made = plan(None, costs, cluster, batch_size=6, max_replicas=1, partitioner="chain")
        except Infeasible:
            continue
        assert max(verify(made).peak_bytes_by_rank) <= memory
        peaks.add(max(verify(made).peak_bytes_by_rank))
    assert peaks


def test_infeasible_says_what_lacks() -> None:
    with pytest.raises(Infeasible, match="lacks") as caught:
        plan(None, chain_costs(2), Cluster.uniform(2, memory_bytes=10), batch_size=4)
    assert all("micro-batches" in reason for reason in caught.value.reasons)
    with pytest.raises(Infeasible, match="5 stages"):
        plan(None, chain_costs(2), Cluster.uniform(2), batch_size=4, num_stages=5)


def test_a_large_problem_is_planned_with_few_candidates() -> None:
    costs = chain_costs(400)
    made = plan(None, costs, Cluster.uniform(16), batch_size=64, max_replicas=1)
    assert made.num_microbatches == 64
    assert len(made.stages) == 16


def test_unlike_devices_are_planned_for() -> None:
    devices = tuple(Device(name=f"d{i}", speed=1.0 + i) for i in range(3))
    made = plan(None, chain_costs(5), Cluster(devices=devices), batch_size=8)
    assert verify(made).num_ranks == made.num_ranks


def test_the_table() -> None:
    made = plan(
        None,
        chain_costs(6),
        Cluster.uniform(3, bandwidth=1000.0),
        batch_size=24,
        replicas=(2, 1),
        num_microbatches=24,
        schedule="1f1b",
        partitioner="exhaustive",
    )
    lines = plan_table(made).splitlines()
    assert str(made).splitlines() == lines
    digest = made.digest[:12]
    assert lines == [
        f"plan of 'chain': 1f1b, 24 micro-batches of 1 sample, batch of 24, digest {digest}",
        "exhaustive: 6.27 s per micro-batch, lower bound 6.27 s, gap 0.0%",
        "",
        "stage  layers      devices  compute  transfer  reduce  seconds     bytes",
        "    0  l0..l3 (4)  0, 1        12 s    200 ms     4 s   6.27 s  18.0 KiB  < bottleneck",
        "    1  l4, l5      2            6 s    200 ms     0 s    6.2 s   8.5 KiB",
    ]


def test_the_table_counts_transfers_as_the_certificate_does() -> None:
    cluster = Cluster.uniform(2, bandwidth=10.0)
    options = {"batch_size": 8, "num_microbatches": 8, "replicas": (1, 1)}
    added = plan(None, chain_costs(2), cluster, **options)  # type: ignore[arg-type]
    beside = plan(None, chain_costs(2), cluster, overlap=True, **options)  # type: ignore[arg-type]
    assert "23 s" in plan_table(added).splitlines()[4]
    assert "20 s" in plan_table(beside).splitlines()[4]


def test_the_table_shortens_long_names() -> None:
    costs = chain_costs(1)
    name = "encoder.layers.11.attention.projection"
    layer = costs.layers[0].model_copy(update={"name": name})
    long = GraphCosts(name="long", inputs=costs.inputs, layers=(layer,))
    assert f"...{name[-21:]}" in plan_table(hand_plan(long, ((0,),), 1))
