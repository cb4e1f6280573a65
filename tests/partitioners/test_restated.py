"""What the laws compare with: the same problem under other names, at another scale, with one more device."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings

from pipeflow.errors import PlanError
from pipeflow.graphs.costs import GraphCosts, LayerCosts, PhaseCosts, SharedTensor, TensorCosts, Variant
from pipeflow.partitioners.cluster import Cluster, Device, Level, Link
from pipeflow.partitioners.objective import objective
from pipeflow.partitioners.pins import Pin, Pins
from pipeflow.partitioners.problem import PartitionProblem
from pipeflow.testing.drawn_problems import clusters, costs, problems
from pipeflow.testing.enumeration import every_partition, least_objective
from pipeflow.testing.oracle import optimum
from pipeflow.testing.restated import copied, picture, renamed, scaled, with_one_more_device

ROUNDING = 1e-9


def everything_named() -> PartitionProblem:
    """A problem in which every field that can names a layer or a tensor, each by a name with OLD in it."""
    layers = (
        LayerCosts(
            name="a_OLD",
            inputs=("x_OLD",),
            outputs=(TensorCosts(name="a_OLD:0", shared_with="x_OLD"), TensorCosts(name="a_OLD:1")),
            forward_seconds=1.0,
            kept_tensors=("x_OLD", "a_OLD:0"),
            variants=(Variant(name="keep", seconds=2.0, border_bytes=(("x_OLD", 3), ("a_OLD:1", 5))),),
        ),
        LayerCosts(name="b_OLD", inputs=("a_OLD:0",), outputs=(TensorCosts(name="b_OLD", shared_with="a_OLD:0"),)),
        LayerCosts(name="c_OLD", inputs=("b_OLD",), backward_input_seconds=1.0, backward_weight_seconds=2.0),
    )
    phase = PhaseCosts(
        name="train",
        layers=("a_OLD", "b_OLD"),
        backward=("b_OLD",),
        gradients=("a_OLD:0",),
        parameter_bytes={"a_OLD": 4},
        shared=("a_OLD.weight",),
    )
    graph = GraphCosts(
        inputs=(TensorCosts(name="x_OLD"),),
        layers=layers,
        colocated=(("a_OLD", "b_OLD"),),
        phases=(phase,),
        shared=(SharedTensor(name="a_OLD.weight", layers=("a_OLD", "b_OLD")),),
    )
    pins = Pins(
        on=(Pin(layer="a_OLD", stage=0),),
        together=(("a_OLD", "b_OLD"),),
        apart=(("a_OLD", "c_OLD"),),
        no_cut=(("a_OLD", "b_OLD"),),
    )
    devices = (Device(name="one_OLD", host_bandwidth=8.0), Device(name="two_OLD"), Device(name="three_OLD"))
    levels = (Level(size=3, bandwidth=4.0, latency=0.5),)
    return PartitionProblem(
        costs=graph,
        cluster=Cluster(devices=devices, levels=levels, links=(Link(a=0, b=1, bandwidth=2.0, latency=0.25),)),
        unordered=frozenset({"b_OLD"}),
        together=(("b_OLD", "c_OLD"),),
        offload=frozenset({"a_OLD"}),
        pins=pins,
    )


def test_no_name_is_forgotten() -> None:
    problem = everything_named()
    assert str(picture(problem)).count("OLD") > 30
    assert "OLD" not in str(picture(renamed(problem)))


def test_names_change_and_nothing_else() -> None:
    problem = everything_named()

    def nameless(text: str) -> str:
        return re.sub(r"(?<=')(\w+_OLD|n\d+|d\d+|in\d+)[\w:.]*(?=')", "", text)

    before, after = replace(problem, pins=Pins()), replace(renamed(problem), pins=Pins())
    assert nameless(str(before)) == nameless(str(after))


def test_no_seconds_are_forgotten() -> None:
    """Every number of seconds is doubled, and every bandwidth halved; no other number changes."""
    problem = everything_named()
    twice = scaled(problem, 2)
    a, b, c = twice.costs.layers
    assert (a.forward_seconds, a.variants[0].seconds, b.seconds, c.seconds) == (2.0, 4.0, 0.0, 6.0)
    assert (c.backward_input_seconds, c.backward_weight_seconds) == (2.0, 4.0)
    assert (twice.cluster.levels[0].bandwidth, twice.cluster.levels[0].latency) == (2.0, 1.0)
    assert (twice.cluster.links[0].bandwidth, twice.cluster.links[0].latency) == (1.0, 0.5)
    assert twice.cluster.devices[0].host_bandwidth == 4.0
    assert picture(scaled(copied(problem), 1)) == picture(problem)


def test_a_copy_is_equal_and_shares_nothing() -> None:
    problem = everything_named()
    copy = copied(problem)
    assert copy == problem
    assert copy.costs is not problem.costs
    assert copy.costs.layer_by_name is not problem.costs.layer_by_name


@given(problem=problems(graphs=costs(max_layers=3), cluster=clusters(max_devices=2), variants=True, together=True))
@settings(max_examples=25)
def test_one_more_device_leaves_what_there_was(problem: PartitionProblem) -> None:
    """Every partition of the problem is one of the larger problem, and takes as long."""
    larger = with_one_more_device(problem)
    assert larger.cluster.num_devices == problem.cluster.num_devices + 1
    for stages in every_partition(problem):
        assert objective(larger, stages) == objective(problem, stages)
    before, after = least_objective(problem), least_objective(larger)
    assert before is None or (after is not None and after <= before * (1 + ROUNDING))


@given(problem=problems(graphs=costs(max_layers=3), nested=True))
@settings(max_examples=25)
def test_nested_levels_grow_by_a_group(problem: PartitionProblem) -> None:
    for stages in every_partition(problem):
        assert objective(with_one_more_device(problem), stages) == objective(problem, stages)


def test_what_is_too_large_for_the_oracle_is_refused() -> None:
    """No wrong answer: neither of many layers, nor of fewer where they can run in several ways."""
    layers = [LayerCosts(name=f"l{i}", forward_seconds=1.0) for i in range(17)]
    many = PartitionProblem(costs=GraphCosts(layers=tuple(layers)), cluster=Cluster.uniform(2))
    with pytest.raises(PlanError, match="17 layers that can be apart; .* draw smaller problems"):
        optimum(many)
    ways = [c.model_copy(update={"variants": (Variant(name="keep"),)}) for c in layers[:7]]
    varied = replace(many, costs=GraphCosts(layers=tuple(ways)))
    with pytest.raises(PlanError, match="7 layers on 2 devices; .* draw smaller problems"):
        optimum(varied)
