"""Training graphs whose memory hardly suffices: bounds hold, and nothing that fits is called infeasible."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeflow.errors import Infeasible
from pipeflow.graphs.costs import GraphCosts, LayerCosts, TensorCosts
from pipeflow.partitioners.auto import has_solver, search
from pipeflow.partitioners.cluster import Cluster
from pipeflow.partitioners.cpsat import cpsat
from pipeflow.partitioners.exhaustive import exhaustive
from pipeflow.partitioners.problem import PartitionProblem, holds_nothing


@st.composite
def tight_problems(draw: st.DrawFn) -> PartitionProblem:
    """Forward layers, backward ones with a partner and without; sizes that fill all devices but for a unit or two."""
    num_forward, num_backward = draw(st.integers(2, 4)), draw(st.integers(2, 4))
    names = [f"f{i}" for i in range(num_forward)] + [f"b{i}" for i in range(num_backward)]
    layers, colocated = [], []
    for i, name in enumerate(names):
        reads = draw(st.lists(st.sampled_from(names[:i]), max_size=3, unique=True)) if i else []
        layers.append(
            LayerCosts(
                name=name,
                inputs=tuple(reads),
                outputs=(TensorCosts(name=name, bytes=draw(st.integers(0, 6))),),
                forward_seconds=draw(st.integers(0, 9)),
                parameter_bytes=draw(st.integers(1, 9)),
            )
        )
    for i in range(min(num_forward, num_backward)):
        if draw(st.booleans()):
            colocated.append((f"f{i}", f"b{i}"))
    num_devices = draw(st.integers(2, 3))
    limit = -(-sum(layer.parameter_bytes for layer in layers) // num_devices) + draw(st.integers(0, 2))
    return PartitionProblem(
        costs=GraphCosts(layers=tuple(layers), colocated=tuple(colocated)),
        cluster=Cluster.uniform(num_devices, memory_bytes=limit, bandwidth=1.0),
        in_flight=holds_nothing,
        optimizer_ratio=0.0,
        gradient_ratio=0.0,
        holds_received=False,
        max_replicas=1,
        fan_out="tensor",
        unordered=frozenset(name for name in names if name.startswith("b")),
    )


@pytest.mark.parametrize(
    "use_solver",
    [False, pytest.param(True, marks=pytest.mark.skipif(not has_solver(), reason="OR-tools is not installed"))],
)
@given(problem=tight_problems())
@settings(max_examples=60)
def test_auto_is_the_oracle(use_solver: bool, problem: PartitionProblem) -> None:
    try:
        best = exhaustive(problem).certificate.objective
    except Infeasible:
        with pytest.raises(Infeasible):
            search(problem, use_solver=use_solver)
        return
    certificate = search(problem, use_solver=use_solver).certificate
    assert certificate.objective == pytest.approx(best, rel=1e-9)
    assert certificate.lower_bound <= best * (1 + 1e-9)


@pytest.mark.skipif(not has_solver(), reason="OR-tools is not installed")
@given(problem=tight_problems())
@settings(max_examples=60)
def test_the_solver_proves_nothing_that_is_not_so(problem: PartitionProblem) -> None:
    """OR-tools 9.15 does, unless a part of its presolve is off."""
    try:
        best = exhaustive(problem).certificate.objective
    except Infeasible:
        return
    certificate = cpsat(problem).certificate
    assert certificate.lower_bound <= best * (1 + 1e-9)
    assert certificate.objective == pytest.approx(best, rel=1e-9)


def halves() -> PartitionProblem:
    """Four layers in a row, of which only the first and third fit a device together, and the others."""
    sizes = (5, 3, 1, 3)
    layers = tuple(
        LayerCosts(
            name=f"l{i}",
            inputs=(f"l{i - 1}",) if i else (),
            outputs=(TensorCosts(name=f"l{i}", bytes=1),),
            forward_seconds=1,
            parameter_bytes=size,
        )
        for i, size in enumerate(sizes)
    )
    return PartitionProblem(
        costs=GraphCosts(layers=layers),
        cluster=Cluster.uniform(2, memory_bytes=6, bandwidth=1.0),
        in_flight=holds_nothing,
        optimizer_ratio=0.0,
        gradient_ratio=0.0,
        holds_received=False,
        max_replicas=1,
    )


def test_what_no_contiguous_cut_fits_may_fit_in_two_chunks() -> None:
    problem = halves()
    with pytest.raises(Infeasible):
        search(problem, use_solver=False)
    if has_solver():
        found = search(replace(problem, chunks=2), use_solver=True)
        assert [stage.layers for stage in found.stages] == [("l0",), ("l1",), ("l2",), ("l3",)]


def test_that_nothing_fits_is_said_once_it_is_proved() -> None:
    """By the programme over ideals, before the solver is asked."""
    names = [f"l{i}" for i in range(12)]
    layers = tuple(
        LayerCosts(name=name, inputs=(names[i - 2],) if i > 1 else (), outputs=(TensorCosts(name=name),),
                   forward_seconds=1, parameter_bytes=2)
        for i, name in enumerate(names)
    )  # fmt: skip
    problem = PartitionProblem(
        costs=GraphCosts(layers=layers),
        cluster=Cluster.uniform(8, memory_bytes=3, bandwidth=1.0),
        in_flight=holds_nothing,
        optimizer_ratio=0.0,
        gradient_ratio=0.0,
        max_replicas=1,
    )
    for use_solver in (False, has_solver()):
        with pytest.raises(Infeasible, match="no cut fits into memory"):
            search(problem, use_solver=use_solver)
