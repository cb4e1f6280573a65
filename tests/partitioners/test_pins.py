"""Pins: every row of the table keeps them or refuses by name, and none loses the optimum by them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import permutations, product

import pytest
from hypothesis import given, settings
from pydantic import ValidationError

from pipeflow.errors import Infeasible, PlanError
from pipeflow.partitioners import PARTITIONERS
from pipeflow.partitioners.cluster import Cluster, Device, Level
from pipeflow.partitioners.objective import objective
from pipeflow.partitioners.partition import Certificate, Partition, Stage
from pipeflow.partitioners.pins import Pin, Pins
from pipeflow.partitioners.problem import PartitionProblem
from pipeflow.testing.drawn_problems import clusters, costs, problems
from pipeflow.testing.partitions import check_partition
from tests.partitioners.test_laws import NAMES, ROUNDING, attempt, suited
from tests.partitioners.test_partitioners import line, shape


def every_partition(problem: PartitionProblem) -> Iterator[tuple[Stage, ...]]:
    """All ways to put layers on stages and stages on devices, valid or not."""
    names = [layer.name for layer in problem.costs.layers]
    count = problem.cluster.num_devices
    for num_stages in range(1, min(count, len(names)) + 1):
        for places in product(range(num_stages), repeat=len(names)):
            if len(set(places)) < num_stages:
                continue
            parts = [[n for n, p in zip(names, places, strict=True) if p == s] for s in range(num_stages)]
            for sizes in product(range(1, count + 1), repeat=num_stages):
                for devices in permutations(range(count), sum(sizes)) if sum(sizes) <= count else ():
                    ends = [sum(sizes[: s + 1]) for s in range(num_stages)]
                    groups = [devices[e - n : e] for e, n in zip(ends, sizes, strict=True)]
                    if all(list(g) == sorted(g) for g in groups):
                        yield tuple(Stage.replicated(p, g) for p, g in zip(parts, groups, strict=True))


def is_valid(problem: PartitionProblem, stages: tuple[Stage, ...]) -> bool:
    certificate = Certificate(partitioner="", objective=objective(problem, stages), lower_bound=0.0)
    try:
        check_partition(Partition(stages=stages, certificate=certificate), problem)
    except AssertionError:
        return False
    return True


@given(problem=problems(graphs=costs(max_layers=4), cluster=clusters(max_devices=3), pinned=True))
@settings(max_examples=150)
def test_the_oracle_is_the_best_of_all_that_the_check_lets_pass(problem: PartitionProblem) -> None:
    best = min((objective(problem, s) for s in every_partition(problem) if is_valid(problem, s)), default=math.inf)
    found = attempt("exhaustive", problem)
    assert (found is None) == (best == math.inf)
    if found is not None:
        check_partition(found, problem)
        assert found.certificate.objective == pytest.approx(best, rel=ROUNDING)


@pytest.mark.parametrize("name", NAMES)
@given(problem=problems(pinned=True))
@settings(max_examples=60)
def test_pins_are_kept_by_every_row(name: str, problem: PartitionProblem) -> None:
    problem = suited(name, problem)
    found, best = attempt(name, problem), attempt("exhaustive", problem)
    if found is not None:
        check_partition(found, problem)
        assert best is not None
        assert found.certificate.objective >= best.certificate.objective * (1 - ROUNDING)
        assert found.certificate.lower_bound <= best.certificate.objective * (1 + ROUNDING)


@given(problem=problems(graphs=costs(max_layers=5), cluster=clusters(is_uniform=True), pinned=True))
@settings(max_examples=100)
def test_auto_is_exact_on_a_handful_of_pinned_layers(problem: PartitionProblem) -> None:
    found, best = attempt("auto", problem), attempt("exhaustive", problem)
    assert (found is None) == (best is None)
    if found is not None and best is not None:
        assert found.certificate.objective == pytest.approx(best.certificate.objective, rel=ROUNDING)


@given(problem=problems(graphs=costs(is_chain=True), cluster=clusters(is_uniform=True), pinned=True))
@settings(max_examples=150)
def test_chain_is_optimal_on_pinned_chains(problem: PartitionProblem) -> None:
    found, best = attempt("chain", problem), attempt("exhaustive", problem)
    assert (found is None) == (best is None)
    if found is not None and best is not None:
        assert found.certificate.objective == pytest.approx(best.certificate.objective, rel=ROUNDING)


def six(pins: Pins, **more: object) -> PartitionProblem:
    """Six equal layers in a row, on three alike devices."""
    options: dict[str, object] = {"cluster": Cluster.uniform(3), "num_microbatches": 6, "max_replicas": 1, **more}
    return PartitionProblem(costs=line(1, 1, 1, 1, 1, 1), pins=pins, **options)  # type: ignore[arg-type]  # by name


HONOURING = [name for name in NAMES if name not in ("uniform", "beam")]


@pytest.mark.parametrize("name", HONOURING)
@pytest.mark.parametrize(
    ("pins", "seconds"),
    [
        (Pins(), 2.0),
        (Pins(together=(("b", "c"),), apart=(("c", "d"),)), 3.0),
        (Pins(no_cut=(("b", "c"), ("c", "d")), max_layers=3), 3.0),
        (Pins(apart=(("a", "b", "c"),)), 4.0),
    ],
)
def test_six_layers_are_cut_as_pinned(name: str, pins: Pins, seconds: float) -> None:
    found = PARTITIONERS[name](six(pins))
    assert found.certificate.objective == seconds
    assert not pins.broken(found.stages)


@pytest.mark.parametrize("name", HONOURING)
def test_a_layer_is_on_the_device_it_is_pinned_to(name: str) -> None:
    found = PARTITIONERS[name](six(Pins(on=(Pin(layer="a", device=2), Pin(layer="f", device=1)))))
    assert found.stages[0].devices == (2,)
    assert found.stages[-1].devices == (1,)
    assert found.certificate.objective == 2.0


@pytest.mark.parametrize("name", HONOURING)
def test_a_layer_is_on_the_stage_it_is_pinned_to_or_the_row_refuses(name: str) -> None:
    problem = six(Pins(on=(Pin(layer="b", stage=1), Pin(layer="d", stage=-1))))
    if name in ("ideals", "milp"):
        with pytest.raises(PlanError, match=rf"{name} cannot solve this: layers are pinned to stages; pin them to dev"):
            PARTITIONERS[name](problem)
        return
    assert shape(PARTITIONERS[name](problem)) == ["ax1", "bcx1", "defx1"]


def test_filling_of_stages_refuses_pins_by_name() -> None:
    with pytest.raises(PlanError, match="beam cannot solve this: layers are pinned; use another"):
        PARTITIONERS["beam"](six(Pins(on=(Pin(layer="a", device=2),))))


def test_the_even_cut_says_which_pin_it_breaks() -> None:
    assert PARTITIONERS["uniform"](six(Pins(on=(Pin(layer="a", device=2),)))).stages[0].devices == (2,)
    with pytest.raises(Infeasible, match=r"layer 'c' is pinned to stage 2, but is on stage 1 of 3; use another"):
        PARTITIONERS["uniform"](six(Pins(on=(Pin(layer="c", stage=2),)), num_stages=3))
    with pytest.raises(Infeasible, match=r"layers 'a' and 'b' are to be apart, but are both on stage 0; use another"):
        PARTITIONERS["uniform"](six(Pins(apart=(("a", "b"),))))


def test_replicas_may_be_on_other_devices_too() -> None:
    pins = Pins(on=(Pin(layer="a", device=2), Pin(layer="b", device=0)))
    found = PARTITIONERS["auto"](six(pins, max_replicas=None, max_stages=1))
    assert [s.devices for s in found.stages] == [(0, 1, 2)]


def test_a_slow_device_is_taken_where_a_layer_is_pinned_to_it() -> None:
    cluster = Cluster(devices=(Device(name="slow", speed=0.25), Device(name="fast")), levels=(Level(size=2),))
    free, pinned = (
        PARTITIONERS["auto"](six(pins, cluster=cluster)) for pins in (Pins(), Pins(on=(Pin(layer="f", device=0),)))
    )
    assert free.stages[0].devices == (0,)
    assert pinned.stages[-1].devices == (0,)
    assert pinned.certificate.objective == 5.0


@pytest.mark.parametrize(
    ("pins", "story"),
    [
        ({"on": ({"layer": "z", "stage": 0},)}, "'z', which is not a layer"),
        ({"on": ({"layer": "a"},)}, "give a stage or a device"),
        ({"on": ({"layer": "a", "device": 3},)}, "the cluster has 3 devices"),
        ({"together": (("a",),)}, "at least two layers"),
        ({"apart": (("a", "a"),)}, "each once"),
        ({"no_cut": (("a", "c"),)}, "'c' reads nothing of 'a'"),
    ],
)
def test_pins_of_what_is_not_there_are_refused(pins: dict[str, object], story: str) -> None:
    with pytest.raises(PlanError, match=story):
        six(Pins(**pins))  # type: ignore[arg-type]  # drawn by name


def test_pins_are_a_value() -> None:
    with pytest.raises(ValidationError):
        Pins(max_layers=0)
    pins = Pins(on=(Pin(layer="a", stage=-1),), apart=(("a", "b"),), max_layers=2)
    assert Pins.model_validate_json(pins.model_dump_json()) == pins
    assert pins
    assert not Pins()


def test_several_chunks_take_pins_of_layers_but_not_of_places() -> None:
    with pytest.raises(PlanError, match="set chunks=1"):
        six(Pins(on=(Pin(layer="a", stage=0),)), chunks=2)
    problem = six(Pins(apart=(("a", "b"),), max_layers=3), chunks=2)
    check_partition(PARTITIONERS["auto"](problem), problem)
