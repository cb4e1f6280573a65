"""`check_partitioner` finds rules that are ignored, and partitions that are none: each bug is planted, and named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import strategies as st

from pipeflow.partitioners.cluster import Cluster
from pipeflow.partitioners.exhaustive import exhaustive
from pipeflow.partitioners.partition import Partition, Stage
from pipeflow.partitioners.pins import Pins
from pipeflow.partitioners.problem import PartitionProblem
from pipeflow.testing.drawn_problems import problems
from tests.partitioners.test_planted_bugs import CLUSTERS, GRAPHS, ROOMY, Partitioner, found_by_laws, priced, unchecked


def without(**nothing: object) -> Partitioner:
    """Solves the problem as if it did not have these rules."""

    def planted(problem: PartitionProblem) -> Partition:
        found = exhaustive(replace(problem, **nothing))  # type: ignore[arg-type]
        return priced(problem, found.stages)

    return planted


def without_pins(*kinds: str) -> Partitioner:
    def planted(problem: PartitionProblem) -> Partition:
        nothing = {kind: None if kind == "max_layers" else () for kind in kinds}
        return without(pins=problem.pins.model_copy(update=nothing))(problem)

    return planted


PINNED = problems(graphs=GRAPHS, cluster=CLUSTERS, pinned=True)


@pytest.mark.parametrize(
    ("planted", "drawn", "story"),
    [
        (without_pins("on"), PINNED, "is pinned to"),
        (without_pins("together"), PINNED, "are to be together"),
        (without_pins("apart"), PINNED, "are to be apart"),
        (without_pins("no_cut"), PINNED, "is not to be cut"),
        (without_pins("max_layers"), PINNED, "more than max_layers"),
        (without(together=()), problems(graphs=GRAPHS, cluster=CLUSTERS, together=True), "layers to be together"),
        (without(num_stages=None, replicas=None), None, "asked for"),
        (without(max_stages=None), None, "more than max_stages"),
        (without(max_replicas=None), None, "replicas"),
        (without(even_replicas=False), None, "evenly"),
    ],
)
def test_rules_that_are_ignored(
    planted: Partitioner, drawn: st.SearchStrategy[PartitionProblem] | None, story: str
) -> None:
    assert story in found_by_laws(planted, drawn, max_examples=400)


def bare(problem: PartitionProblem) -> PartitionProblem:
    """Without what the planted bugs below are not about."""
    return replace(problem, num_stages=None, max_stages=None, replicas=None, max_replicas=None, pins=Pins())


def unlimited(problem: PartitionProblem) -> Partition:
    cluster = problem.cluster
    devices = tuple(d.model_copy(update={"memory_bytes": None}) for d in cluster.devices)
    larger = Cluster(devices=devices, levels=cluster.levels, links=cluster.links)
    found = exhaustive(replace(problem, cluster=larger))
    return priced(problem, found.stages)


def freed(problem: PartitionProblem) -> Partition:
    found = exhaustive(replace(problem, costs=problem.costs.model_copy(update={"colocated": ()})))
    return priced(problem, found.stages)


def replicated_at_will(problem: PartitionProblem) -> Partition:
    layers = tuple(c.model_copy(update={"replicable": True}) for c in problem.costs.layers)
    found = exhaustive(replace(problem, costs=problem.costs.model_copy(update={"layers": layers})))
    return priced(problem, found.stages)


def changed(change: Callable[[list[Stage], PartitionProblem], list[Stage]]) -> Partitioner:
    """What `exhaustive` finds, and then one thing wrong with it."""

    def planted(problem: PartitionProblem) -> Partition:
        found = exhaustive(bare(problem))
        return unchecked(tuple(change(list(found.stages), problem)), found.certificate.objective, 0.0)

    return planted


def one_left_out(stages: list[Stage], problem: PartitionProblem) -> list[Stage]:
    return [s.model_copy(update={"layers": s.layers[1:]}) if len(s.layers) > 1 else s for s in stages]


def one_twice(stages: list[Stage], problem: PartitionProblem) -> list[Stage]:
    first = stages[0].layers[0]
    return [s if first in s.layers else s.model_copy(update={"layers": (first, *s.layers)}) for s in stages]


def one_too_many(stages: list[Stage], problem: PartitionProblem) -> list[Stage]:
    return [stages[0].model_copy(update={"layers": (*stages[0].layers, "other")}), *stages[1:]]


def turned_round(stages: list[Stage], problem: PartitionProblem) -> list[Stage]:
    return stages[::-1]


def on_one_device(stages: list[Stage], problem: PartitionProblem) -> list[Stage]:
    return [Stage.replicated(stage.layers, [0]) for stage in stages]


def beyond_the_devices(stages: list[Stage], problem: PartitionProblem) -> list[Stage]:
    return [*stages[:-1], Stage.replicated(stages[-1].layers, [*stages[-1].devices, problem.cluster.num_devices])]


def recomputed(stages: list[Stage], problem: PartitionProblem) -> list[Stage]:
    return [stage.with_recompute(stage.layers) for stage in stages]


def layers_out_of_order(stages: list[Stage], problem: PartitionProblem) -> list[Stage]:
    return [stage.model_copy(update={"layers": stage.layers[::-1]}) for stage in stages]


TIGHT = problems(graphs=GRAPHS, cluster=CLUSTERS, tight=True)


@pytest.mark.parametrize(
    ("planted", "drawn", "story"),
    [
        (changed(one_left_out), ROOMY, "not complete"),
        (changed(one_twice), ROOMY, "not disjoint"),
        (changed(one_too_many), ROOMY, "not of this graph"),
        (changed(turned_round), ROOMY, "not acyclic"),
        (changed(on_one_device), ROOMY, "hold more than 1 stages"),
        (changed(beyond_the_devices), ROOMY, "do not exist"),
        (changed(layers_out_of_order), ROOMY, "out of the graph's order"),
        (unlimited, TIGHT, "has to hold"),
        (freed, None, "not together"),
        (replicated_at_will, None, "cannot be replicated"),
    ],
)
def test_partitions_that_are_none(
    planted: Partitioner, drawn: st.SearchStrategy[PartitionProblem] | None, story: str
) -> None:
    assert story in found_by_laws(planted, drawn, max_examples=400)


def test_layers_that_are_recomputed_unasked() -> None:
    def planted(problem: PartitionProblem) -> Partition:
        stages = tuple(recomputed(list(exhaustive(problem).stages), problem))
        return priced(problem, stages)

    assert "are recomputed" in found_by_laws(planted, ROOMY)


def test_ways_that_a_layer_does_not_have() -> None:
    """Variants left out: priced as if layers ran in the way that they do not have."""

    def planted(problem: PartitionProblem) -> Partition:
        one = Stage.replicated([layer.name for layer in problem.costs.layers], [0])
        return priced(problem, (one,))

    ways = problems(graphs=GRAPHS, cluster=CLUSTERS, variants=True, constrained=False)
    assert "its (variant, degree) may be" in found_by_laws(planted, ways)
