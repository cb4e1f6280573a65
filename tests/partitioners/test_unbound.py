"""What unbound atoms cost a stage at least is never more than what they do cost."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeflow.graphs.costs import GraphCosts, LayerCosts, TensorCosts
from pipeflow.partitioners import PARTITIONERS
from pipeflow.partitioners.cluster import Cluster
from pipeflow.partitioners.objective import objective
from pipeflow.partitioners.partition import Stage
from pipeflow.partitioners.problem import PartitionProblem
from pipeflow.partitioners.unbound import unbound_groups


@st.composite
def training_problems(draw: st.DrawFn) -> PartitionProblem:
    """Chains of up to four forward layers, some with a backward partner, and up to four backward ones without."""
    num_forward, num_free = draw(st.integers(2, 4)), draw(st.integers(1, 4))
    names = [f"f{i}" for i in range(num_forward)] + [f"u{i}" for i in range(num_free)]
    layers = []
    inputs: dict[str, tuple[str, ...]] = {}
    for i, name in enumerate(names):
        earlier = names[:i]
        reads = set(draw(st.lists(st.sampled_from(earlier), max_size=3))) if earlier else set()
        if name.startswith("f") and i:
            reads = {names[i - 1]}
        inputs[name] = tuple(sorted(reads))
    for name in names:
        tensor = TensorCosts(name=name, bytes=draw(st.integers(0, 5)))
        seconds = draw(st.integers(0, 5))
        layers.append(LayerCosts(name=name, inputs=inputs[name], outputs=(tensor,), forward_seconds=seconds))
    return PartitionProblem(
        costs=GraphCosts(layers=tuple(layers)),
        cluster=Cluster.uniform(draw(st.integers(2, 3)), bandwidth=1.0),
        max_replicas=1,
        fan_out="tensor",
        unordered=frozenset(name for name in names if name.startswith("u")),
    )


def best_by_hand(problem: PartitionProblem) -> float:
    """Every cut of the chain, with the free layers on any of its stages or on one of their own."""
    chain = [layer.name for layer in problem.costs.layers if layer.name.startswith("f")]
    free = [layer.name for layer in problem.costs.layers if layer.name.startswith("u")]
    position = problem.costs.position_by_layer
    best = float("inf")
    count = problem.cluster.num_devices
    for places in itertools.product(range(count), repeat=len(chain) + len(free)):
        if list(places[: len(chain)]) != sorted(places[: len(chain)]):
            continue
        groups = [[n for n, p in zip(chain + free, places, strict=True) if p == k] for k in range(count)]
        stages = [
            Stage.replicated(sorted(group, key=position.__getitem__), [k])
            for k, group in enumerate(g for g in groups if g)
        ]
        best = min(best, objective(problem, stages))
    return best


@given(problem=training_problems())
@settings(max_examples=150)
def test_bounds_hold_and_the_programme_finds_what_it_certifies(problem: PartitionProblem) -> None:
    best = best_by_hand(problem)
    for name in ("ideals", "auto"):
        found = PARTITIONERS[name](problem)
        assert found.certificate.lower_bound <= best * (1 + 1e-9)
        assert found.certificate.objective >= best * (1 - 1e-9)


def test_a_group_costs_the_least_of_taking_it_and_leaving_it() -> None:
    """One unbound layer between two bound ones: with one of these, pay a transfer, or the layer and the other."""
    layers = (
        LayerCosts(name="a", outputs=(TensorCosts(name="a", bytes=5),), forward_seconds=1),
        LayerCosts(name="b", inputs=(), outputs=(TensorCosts(name="b", bytes=0),), forward_seconds=1),
        LayerCosts(name="u", inputs=("a",), outputs=(TensorCosts(name="u", bytes=2),), forward_seconds=2),
        LayerCosts(name="c", inputs=("u",), outputs=(TensorCosts(name="c"),), forward_seconds=1),
    )
    problem = PartitionProblem(
        costs=GraphCosts(layers=layers),
        cluster=Cluster.uniform(2, bandwidth=1.0),
        unordered=frozenset({"u"}),
        fan_out="tensor",
        max_replicas=1,
    )
    [group] = unbound_groups(problem)
    atoms = {problem.atoms.members[atom][0]: atom for atom in range(problem.atoms.count)}
    order = [ends[0] for ends in group.nets]
    assert set(order) == {atoms["a"], atoms["c"]}
    for a, c, expected in ((0, 0, 0.0), (1, 0, 4.0), (0, 1, 2.0), (1, 1, 2.0)):
        held = {atoms["a"]: a, atoms["c"]: c}
        assert group.seconds([np.array([held[end]]) for end in order]).tolist() == [expected]
