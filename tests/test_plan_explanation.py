"""What a plan says of itself."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings

import pipeflow as pf
from pipeflow.errors import PlanError
from pipeflow.execution_plan import Plan
from pipeflow.graphs.costs import GraphCosts, LayerCosts, TensorCosts
from pipeflow.partitioners.cluster import Cluster
from pipeflow.partitioners.objective import stage_terms
from pipeflow.plan_problem import problem_of_plan
from pipeflow.testing.drawn_plans import plans

COSTS = GraphCosts(
    name="line",
    samples=2,
    inputs=(TensorCosts(name="x"),),
    layers=tuple(
        LayerCosts(
            name=n,
            inputs=(i,),
            outputs=(TensorCosts(name=n, bytes=10, gradient_bytes=5),),
            forward_seconds=s,
            parameter_bytes=100,
            saved_bytes=50,
        )
        for n, i, s in (("a", "x", 1.0), ("b", "a", 2.0), ("c", "b", 4.0), ("d", "c", 4.0))
    ),
)


def made(**more: object) -> Plan:
    cluster = Cluster.uniform(2, bandwidth=100.0, memory_bytes=2500)
    options: dict[str, object] = {"num_stages": 2, "num_microbatches": 8, "schedule": "1f1b", **more}
    return pf.plan(None, COSTS, cluster, batch_size=16, max_replicas=1, **options)  # type: ignore[arg-type]  # by name


def test_a_plan_tells_its_story() -> None:
    story = made().explain()
    assert str(story).splitlines()[0] == (
        "plan of 'line': 7.15 s per micro-batch, set by stage 0 of 2: a .. c (3 layers) on device 0"
    )
    assert "compute 7 s, transfers 150 ms for one micro-batch" in str(story)
    assert "cut 0 | 1: 1 tensor, 15 B, 150 ms for one micro-batch\n  c: 10 B + 5 B back, 150 ms" in str(story)
    assert "one layer earlier: c moves, 8.15 s (+14.0%)" in str(story)
    assert "one layer later: stage 1 has nothing to give" in str(story)
    assert [(r.what, r.is_bound) for r in story.story.richer] == [
        ("the same devices", False),
        ("one more device", False),
        ("links twice as fast", False),
        ("twice the memory", False),
    ]
    assert "one more device           4.3 s  (-39.9%)" in str(story)


def test_bounds_take_no_solver_and_are_below_what_one_finds() -> None:
    plan = made()
    bounded, solved = plan.explain(partitioner=None), plan.explain(partitioner="exhaustive")
    assert "at best: lower bounds" in str(bounded)
    assert (bounded.solver, solved.solver) == ("", "exhaustive")
    for low, high in zip(bounded.story.richer, solved.story.richer, strict=True):
        assert (low.what, low.is_bound, high.is_bound) == (high.what, True, False)
        assert low.seconds <= high.seconds * (1 + 1e-9)
    with pytest.raises(PlanError, match="no partitioner"):
        plan.explain(partitioner="best")


def test_what_may_not_move_says_why() -> None:
    pinned = made(pins=pf.Pins(on=(pf.Pin(layer="c", stage=0),)))
    text = str(pinned.explain(partitioner=None))
    assert "c may not move: layer 'c' is pinned to stage 0, but is on stage 1 of 2" in text
    document = json.loads(json.dumps(pinned.explain(partitioner=None).document(), allow_nan=False))
    assert document["cuts"][0]["earlier"]["seconds"] is None
    assert document["cuts"][0]["bytes"] == 15
    assert document["terms"][0]["layers"] == ["a", "b", "c"]
    assert document["solver"] is None


@given(plans())
@settings(max_examples=60)
def test_any_plan_can_be_explained_and_its_figures_agree(plan: Plan) -> None:
    explained = plan.explain(partitioner=None)
    story, problem = explained.story, problem_of_plan(plan)
    assert story.terms == stage_terms(problem, plan.stages)
    assert len(story.cuts) == len(plan.stages) - 1
    for cut in story.cuts:
        here: set[str] = set()
        there: set[str] = set()
        for name, index in plan.stage_by_layer.items():
            (here if index <= cut.before else there).add(name)
        crossing = {t for a, b in plan.costs.graph.edges if a in here and b in there for t in _tensors(plan, a, b)}
        assert set(cut.tensors) == crossing
        for shift in (cut.earlier, cut.later):
            assert shift is None or (shift.seconds == float("inf")) == bool(shift.obstacle)
    json.dumps(explained.document(), allow_nan=False)
    assert str(explained)


def _tensors(plan: Plan, a: str, b: str) -> tuple[str, ...]:
    tensors: tuple[str, ...] = plan.costs.graph.edges[a, b]["tensors"]
    return tensors
