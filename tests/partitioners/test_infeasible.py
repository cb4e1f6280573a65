"""`Infeasible` names a smallest set of rules: together they leave no partition, without any one they do."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
from hypothesis import given, settings

import pipeflow as pf
from pipeflow.errors import Infeasible, Rule
from pipeflow.graphs.costs import GraphCosts, LayerCosts, TensorCosts
from pipeflow.partitioners import PARTITIONERS
from pipeflow.partitioners.cluster import Cluster
from pipeflow.partitioners.infeasible import explained
from pipeflow.partitioners.pins import Pin, Pins
from pipeflow.partitioners.problem import PartitionProblem
from pipeflow.partitioners.rules import held_to, rules_of
from pipeflow.testing.drawn_problems import clusters, costs, problems
from tests.partitioners.test_laws import attempt
from tests.partitioners.test_partitioners import MIB, line


def told(problem: PartitionProblem) -> tuple[Rule, ...] | None:
    """The smallest set of rules for which the oracle finds nothing; None where it finds something."""
    try:
        PARTITIONERS["exhaustive"](problem)
    except Infeasible as error:
        return explained(problem, error).rules
    return None


@given(problem=problems(graphs=costs(max_layers=5), cluster=clusters(max_devices=3), pinned=True))
@settings(max_examples=200)
def test_no_rule_can_be_left_out(problem: PartitionProblem) -> None:
    rules = told(problem)
    if rules is None:
        return
    assert rules
    assert set(rules) <= set(rules_of(problem))
    assert attempt("exhaustive", held_to(problem, rules)) is None
    for rule in rules:
        assert attempt("exhaustive", held_to(problem, [other for other in rules if other != rule])) is not None, rule


@given(problem=problems(graphs=costs(max_layers=5), cluster=clusters(max_devices=3)))
@settings(max_examples=50)
def test_a_problem_without_rules_has_a_partition_and_with_all_of_them_is_the_same(problem: PartitionProblem) -> None:
    assert attempt("exhaustive", held_to(problem, ())) is not None
    assert held_to(problem, rules_of(problem)) == problem


def kinds(error: Infeasible) -> list[tuple[str, tuple[str, ...]]]:
    return [(rule.kind, rule.layers) for rule in error.rules]


def six(pins: Pins, num_devices: int = 3, **more: object) -> PartitionProblem:
    return PartitionProblem(costs=line(*[1.0] * 6), cluster=Cluster.uniform(num_devices), pins=pins, **more)  # type: ignore[arg-type]  # by name


@pytest.mark.parametrize("name", ["auto", "chain", "orders", "uniform", "exhaustive"])
@pytest.mark.parametrize(
    ("pins", "expected"),
    [
        (
            Pins(on=(Pin(layer="b", stage=1), Pin(layer="e", stage=0), Pin(layer="f", stage=-1))),
            [("pin", ("b",)), ("pin", ("e",))],
        ),
        (
            Pins(together=(("a", "c"), ("e", "f")), apart=(("b", "d"), ("b", "a"))),
            [("together", ("a", "c")), ("apart", ("b", "a"))],
        ),
        (
            Pins(no_cut=(("b", "c"), ("c", "d")), max_layers=2),
            [("no_cut", ("b", "c")), ("no_cut", ("c", "d")), ("max_layers", ())],
        ),
        (Pins(apart=(("a", "b", "c", "d"),), max_layers=5), [("apart", ("a", "b", "c", "d"))]),
        (
            Pins(on=(Pin(layer="d", stage=0),), apart=(("a", "c"), ("b", "e"))),
            [("pin", ("d",)), ("apart", ("a", "c"))],
        ),
    ],
)
def test_pins_that_contradict_each_other_are_told_by_every_row(
    name: str, pins: Pins, expected: list[tuple[str, tuple[str, ...]]]
) -> None:
    with pytest.raises(Infeasible) as caught:
        PARTITIONERS[name](six(pins))
    assert kinds(caught.value) == expected
    assert [rule.text for rule in caught.value.rules] == list(caught.value.reasons)
    assert pickle.loads(pickle.dumps(caught.value)).rules == caught.value.rules


def test_the_message_says_all_of_them_and_the_remedy() -> None:
    with pytest.raises(Infeasible) as caught:
        PARTITIONERS["auto"](six(Pins(on=(Pin(layer="b", stage=1), Pin(layer="e", stage=0)))))
    assert str(caught.value) == (
        "these rules leave no partition, drop one of them: layer 'b' is pinned to stage 1; "
        "layer 'e' is pinned to stage 0"
    )


def test_a_layer_that_is_too_large_for_the_device_it_is_pinned_to() -> None:
    costs = line(1, 2, 3, parameter_bytes=MIB)
    model = Cluster.uniform(2)
    small = model.devices[1].model_copy(update={"memory_bytes": 2 * MIB})
    cluster = Cluster(devices=(model.devices[0], small), levels=model.levels)
    problem = PartitionProblem(costs=costs, cluster=cluster, pins=Pins(on=(Pin(layer="b", device=1),)), max_replicas=1)
    with pytest.raises(Infeasible, match=r"layer 'b' needs 4.0 MiB .* to which it is pinned, lacks 2.0 MiB") as caught:
        PARTITIONERS["auto"](problem)
    assert [(rule.kind, rule.devices) for rule in explained(problem, caught.value).rules] == [
        ("pin", (1,)),
        ("memory", (1,)),
    ]


def test_memory_that_cannot_suffice_names_every_device_that_it_takes() -> None:
    with pytest.raises(Infeasible, match=r"together and lack") as caught:
        pf.partition(line(1, 2, 3, parameter_bytes=MIB), num_devices=2, memory_bytes=5 * MIB)
    assert [rule.devices for rule in caught.value.rules] == [(0,), (1,)]


def test_what_only_a_search_can_tell_is_told_by_the_rules() -> None:
    """Each rule alone is harmless; the oracle finds which of the seven matter."""
    costs = line(1, 1, 1, 1, saved_bytes=MIB)
    pins = Pins(apart=(("a", "b"), ("c", "d")), max_layers=4)
    cluster = Cluster.uniform(2, memory_bytes=int(2.5 * MIB))
    with pytest.raises(Infeasible) as caught:
        pf.partition(costs, cluster=cluster, pins=pins, num_microbatches=8, max_replicas=1)
    assert {rule.kind for rule in caught.value.rules} <= {"apart", "memory"}
    assert "apart" in str(caught.value)


def test_plans_tell_the_rules_too() -> None:
    pins = Pins(apart=(("a", "b", "c"),))
    with pytest.raises(Infeasible) as caught:
        pf.plan(None, line(1, 1, 1), Cluster.uniform(2), batch_size=4, pins=pins)
    assert kinds(caught.value) == [("apart", ("a", "b", "c"))]


def test_a_contradiction_among_hundreds_of_layers_is_found_without_a_search() -> None:
    layers = tuple(
        LayerCosts(name=f"l{i}", inputs=(f"l{i - 1}" if i else "x",), outputs=(TensorCosts(name=f"l{i}"),))
        for i in range(300)
    )
    costs = GraphCosts(inputs=(TensorCosts(name="x"),), layers=layers)
    apart = tuple((f"l{i}", f"l{i + 7}") for i in range(0, 280, 7))
    pins = Pins(on=(Pin(layer="l200", stage=2), Pin(layer="l120", stage=1)), apart=apart, max_layers=290)
    problem = PartitionProblem(costs=costs, cluster=Cluster.uniform(64), pins=pins)
    with pytest.raises(Infeasible) as caught:
        PARTITIONERS["auto"](problem)
    rules = caught.value.rules
    assert [rule.kind for rule in rules] == ["pin", "apart", "apart"]
    for rule in rules:
        left = held_to(problem, [other for other in rules if other != rule])
        assert PARTITIONERS["chain"](replace(left, num_stages=4)).stages
