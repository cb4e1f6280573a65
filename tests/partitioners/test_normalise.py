"""Laws of the passes that make a problem smaller: they keep the optimum, or lose no more than they say."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from pipeflow.errors import Infeasible
from pipeflow.graphs.costs import GraphCosts, LayerCosts, TensorCosts
from pipeflow.partitioners.atoms import find_atoms
from pipeflow.partitioners.auto import search
from pipeflow.partitioners.cluster import Cluster
from pipeflow.partitioners.coarsen import coarsen
from pipeflow.partitioners.exhaustive import exhaustive
from pipeflow.partitioners.normalise import fold, join
from pipeflow.partitioners.problem import PartitionProblem
from pipeflow.testing.drawn_problems import clusters, costs, problems

single = problems(cluster=clusters(min_devices=2, max_devices=3, is_uniform=True), graphs=costs(min_layers=3))


def simple(problem: PartitionProblem) -> PartitionProblem:
    """One replica a stage, transfers beside compute: what the passes are for."""
    return replace(problem, max_replicas=1, replicas=None, num_stages=None, transfers="added")


def optimum(problem: PartitionProblem) -> float | None:
    try:
        return exhaustive(problem).certificate.objective
    except Infeasible:
        return None


@given(graph=costs(max_layers=6), parts=st.integers(2, 3))
@settings(max_examples=30)
def test_atoms_are_what_every_valid_cut_keeps_together(graph: GraphCosts, parts: int) -> None:
    """Colocated groups, and the cycles that they close: no cut in order, groups kept, divides an atom."""
    atoms = find_atoms(graph)
    names = [layer.name for layer in graph.layers]
    for places in itertools.product(range(parts), repeat=len(names)):
        stage = dict(zip(names, places, strict=True))
        in_order = all(stage[a] <= stage[b] for a, b in graph.graph.edges)
        if in_order and all(len({stage[n] for n in group}) == 1 for group in graph.colocated):
            assert all(len({stage[n] for n in members}) == 1 for members in atoms.members)


def test_a_cycle_that_a_colocated_group_closes_is_one_atom() -> None:
    layers = tuple(
        LayerCosts(name=n, inputs=i, outputs=(TensorCosts(name=n, bytes=1),), forward_seconds=1.0)
        for n, i in (("a", ()), ("b", ("a",)), ("c", ("b",)), ("d", ("c",)))
    )
    assert find_atoms(GraphCosts(layers=layers, colocated=(("a", "c"),))).members == (("a", "b", "c"), ("d",))


@given(problem=single)
@settings(max_examples=50)
def test_folding_keeps_the_optimum_and_the_memory(problem: PartitionProblem) -> None:
    problem = simple(problem)
    before, after = optimum(problem), optimum(fold(problem))
    assert after == (before if before is None else pytest.approx(before, rel=1e-9))


def line(*amounts: tuple[float, int]) -> PartitionProblem:
    """A chain of layers of (seconds, bytes of output), at a byte a second."""
    names = [chr(ord("a") + i) for i in range(len(amounts))]
    layers = tuple(
        LayerCosts(
            name=name,
            inputs=(before,) if before else (),
            outputs=(TensorCosts(name=name, bytes=size),),
            forward_seconds=seconds,
        )
        for name, before, (seconds, size) in zip(names, ["", *names], amounts, strict=False)
    )
    return PartitionProblem(costs=GraphCosts(layers=layers), cluster=Cluster.uniform(3, bandwidth=1.0), max_replicas=1)


def test_a_free_layer_with_one_neighbour_joins_it() -> None:
    assert fold(line((5.0, 1), (5.0, 1), (0.0, 1))).atoms.members == (("a",), ("b", "c"))


def test_a_series_is_joined_where_its_link_is_dearer_than_the_next() -> None:
    assert fold(line((5.0, 9), (2.0, 3), (9.0, 1))).atoms.members == (("a", "b"), ("c",))


@given(problem=single, most_loss=st.sampled_from([0.05, 0.3, 1.0, 3.0]))
@settings(max_examples=100)
def test_joining_loses_no_more_than_it_says(problem: PartitionProblem, most_loss: float) -> None:
    problem = simple(problem)
    smaller, loss = join(problem, most_atoms=1, most_loss=most_loss)
    before, after = optimum(problem), optimum(smaller)
    assert (before is None) == (after is None)
    assert loss <= most_loss * (1 + 1e-6)
    if before is not None and after is not None:
        event(f"joined {problem.atoms.count - smaller.atoms.count}, lost {after > before * (1 + 1e-9)}")
        assert before * (1 - 1e-9) <= after <= before * (1 + loss) * (1 + 1e-9)


@given(problem=single, most=st.integers(2, 5))
@settings(max_examples=30)
def test_runs_of_the_order_are_partitions_of_the_whole(problem: PartitionProblem, most: int) -> None:
    """They may lose what the certificate's gap says, and never undercut the optimum."""
    problem = simple(problem)
    before, after = optimum(problem), optimum(coarsen(problem, most))
    if after is not None:
        assert before is not None
        assert after >= before * (1 - 1e-9)


@given(problem=single)
@settings(max_examples=40)
def test_the_bound_of_a_problem_that_lost_something_counts_that(problem: PartitionProblem) -> None:
    """`auto` on a problem that is too large for it: the bound of the joined one, over 1 + its loss."""
    problem = simple(problem)
    before = optimum(problem)
    if before is None:
        return
    try:
        found = search(problem, use_solver=False, most_atoms=2)
    except Infeasible:
        return  # coarse cuts may not fit
    assert found.certificate.lower_bound <= before * (1 + 1e-9)
    assert found.certificate.objective >= before * (1 - 1e-9)
