"""Recomputed layers: what they save, what they cost, and which are chosen to make a plan fit."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeflow.errors import Infeasible, PlanError
from pipeflow.execution_plan import Plan
from pipeflow.partitioners.activations import recomputed_runs, stage_activations
from pipeflow.partitioners.cluster import Cluster
from pipeflow.partitioners.objective import stage_terms
from pipeflow.partitioners.partition import Stage
from pipeflow.partitioners.problem import PartitionProblem
from pipeflow.partitioners.recompute import resolve_recompute
from pipeflow.planner import plan
from pipeflow.simulator import simulate
from pipeflow.testing.drawn_plans import check_program, plans
from pipeflow.testing.hand import chain_costs, hand_plan

COSTS = chain_costs(6)  # each layer: 300 bytes saved, an output of 100, 1 s forward, 2 s backward
NAMES = [layer.name for layer in COSTS.layers]


def stage(*recompute: str) -> Stage:
    return Stage.replicated(NAMES, [0], recompute=recompute)


def test_runs_are_as_long_as_can_be() -> None:
    assert recomputed_runs(stage("l4", "l1", "l2")) == (("l1", "l2"), ("l4",))


def test_a_run_keeps_nothing_but_what_recomputed_layers_give_to_others() -> None:
    assert stage_activations(COSTS, stage()) == (6 * 300, 0)
    assert stage_activations(COSTS, stage(*NAMES)) == (0, 6 * 300)
    # l2's output is what l3 reads; l1 and l2 come back together, l4 alone; l4's output is read by l5.
    assert stage_activations(COSTS, stage("l1", "l2", "l4")) == (3 * 300 + 2 * 100, 2 * 300)


def test_the_objective_counts_the_second_forward_and_one_transient_set() -> None:
    problem = PartitionProblem(costs=COSTS, cluster=Cluster.uniform(2), num_microbatches=4)
    halves = [Stage.replicated(NAMES[:3], [0], recompute=NAMES[:3]), Stage.replicated(NAMES[3:], [1])]
    first, second = stage_terms(problem, halves)
    assert (first.compute_seconds, second.compute_seconds) == (12, 9)
    assert first.activation_bytes == 3 * 300  # in flight 2, of which nothing is kept: it reads the batch
    assert second.activation_bytes == 3 * 300 + 100


@pytest.mark.parametrize(
    ("recompute", "story"),
    [
        (("l9",), "recompute names 'l9', which is not a layer of the stage"),
        (("l2", "l1"), "in the order of the stage's layers"),
        (("l1", "l1"), "name each layer once"),
    ],
)
def test_a_stage_refuses_what_it_cannot_recompute(recompute: tuple[str, ...], story: str) -> None:
    with pytest.raises(PlanError, match=story):
        Stage(layers=tuple(NAMES), mesh=stage().mesh, recompute=recompute)


def test_a_plan_carries_it_and_its_digest_tells() -> None:
    made = hand_plan(COSTS, ((0,), (1,)), 4)
    again = made.model_copy(update={"stages": (made.stages[0].with_recompute(NAMES[:3]), made.stages[1])})
    assert Plan.model_validate_json(again.model_dump_json()) == again
    assert again.digest != made.digest
    assert "recomputes l0..l2 (3)" in str(again)
    assert "recomputes" not in str(made)


def test_the_simulator_takes_longer_and_holds_less() -> None:
    made = hand_plan(COSTS, ((0,), (1,)), 4, schedule="gpipe")
    again = made.model_copy(update={"stages": tuple(s.with_recompute(s.layers) for s in made.stages)})
    plain, recomputed = simulate(made), simulate(again)
    assert recomputed.makespan == plain.makespan + 3 * (4 + 2 - 1)  # 3 s more in every backward on the way
    assert max(recomputed.peak_bytes_by_rank) < max(plain.peak_bytes_by_rank)


@pytest.mark.parametrize("rule", ["always", "never", "fit", ["l[1-3]"], ["l0", "l5"]])
def test_rules_and_patterns_name_layers(rule: str | list[str]) -> None:
    made = plan(None, COSTS, Cluster.uniform(2), batch_size=4, num_stages=2, recompute=rule)
    expected = {"always": NAMES, "never": [], "fit": []}.get(str(rule), ["l0", "l5"])
    if rule == ["l[1-3]"]:
        expected = ["l1", "l2", "l3"]
    assert [name for s in made.stages for name in s.recompute] == expected
    assert made.certificate.objective >= made.certificate.lower_bound


def test_an_unknown_rule_or_pattern_is_refused() -> None:
    with pytest.raises(PlanError, match="give 'never', 'always', 'fit' or a list"):
        resolve_recompute("sometimes", COSTS)
    with pytest.raises(PlanError, match="'conv', which fits no layer"):
        resolve_recompute(["conv"], COSTS)


def test_fit_recomputes_the_cheapest_layers_that_make_room() -> None:
    cheap = COSTS.model_copy(
        update={
            "layers": tuple(
                layer.model_copy(update={"forward_seconds": 0.25 if layer.name in ("l1", "l4") else 1.0})
                for layer in COSTS.layers
            )
        }
    )
    options = {"batch_size": 4, "num_stages": 2, "num_microbatches": 4, "schedule": "gpipe", "optimizer_ratio": 0.0}
    free = plan(None, cheap, Cluster.uniform(2), **options)  # type: ignore[arg-type]
    needed = max(simulate(free).peak_bytes_by_rank)
    tight = Cluster.uniform(2, memory_bytes=needed - 500)
    with pytest.raises(Infeasible):
        plan(None, cheap, tight, **options)  # type: ignore[arg-type]
    made = plan(None, cheap, tight, recompute="fit", **options)  # type: ignore[arg-type]
    chosen = {name for s in made.stages for name in s.recompute}
    assert chosen & {"l1", "l4"}
    assert max(simulate(made).peak_bytes_by_rank) <= needed - 500
    with pytest.raises(Infeasible):
        plan(None, cheap, Cluster.uniform(2, memory_bytes=7000), recompute="fit", **options)  # type: ignore[arg-type]


@given(plans(), st.data())
def test_any_plan_with_any_layers_recomputed_is_a_program_that_holds_no_more(made: Plan, data: st.DataObject) -> None:
    stages = tuple(s.with_recompute(data.draw(st.sets(st.sampled_from(s.layers)))) for s in made.stages)
    again = made.model_copy(update={"stages": stages})
    bare = made.model_copy(update={"stages": tuple(s.with_recompute(()) for s in made.stages)})
    check_program(again)
    assert simulate(again).makespan >= simulate(bare).makespan * (1 - 1e-12)
