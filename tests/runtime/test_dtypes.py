"""Tensors of every dtype between stages, and in predictions; numbers that torch keeps as conjugates or negatives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import pipeflow as pf
from pipeflow.graphs.tensor_spec import ITEMSIZE_BY_DTYPE
from pipeflow.testing import check_layout_invariance, run_ranks
from pipeflow.testing.graphs import sample_batch
from tests.runtime.models import make_plan, sgd
from tests.runtime.test_known_cases import finish, linear, stages_of, start


class Cast(nn.Module):
    """To another dtype; with a buffer of it, which replicas agree on at the start."""

    kept: Tensor

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("kept", torch.ones((), dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return (3 * x.abs()).to(self.kept.dtype)


def back(x: Tensor) -> Tensor:
    return (x.real if x.is_complex() else x).to(torch.float64)


def through(dtype: str) -> pf.LayerGraph:
    graph, h = start(dtype)
    cast = graph.add("cast", pf.lazy(Cast, getattr(torch, dtype)), h)
    assert cast.spec.dtype == dtype
    again = graph.add("back", back, cast)
    return finish(graph, graph.add("sum", torch.add, again, graph.add("second", linear(), h)))


def conjugate(x: Tensor) -> tuple[Tensor, Tensor]:
    """A conjugate and a negative, neither of which torch computes here."""
    z = torch.complex(x, x.square()).conj()
    return z, z.imag


def marks_on_memory() -> pf.LayerGraph:
    """Only the marks tell `z` from its conjugate: what is sent must be the numbers themselves."""
    graph, h = start("conjugate")
    z, negative = graph.add("conjugate", conjugate, h)
    assert graph.layers["conjugate"].strided_outputs == {0, 1}
    turned = graph.add("turn", torch.mul, z, graph.add("factor", torch.complex, h, negative))
    return finish(graph, graph.add("real", back, graph.add("again", torch.conj, turned)))


def check(graph: pf.LayerGraph, replicas: bool) -> None:
    layout = [(layers, (0, 1) if replicas and i % 2 else (i % 2,)) for i, layers in enumerate(stages_of(graph))]
    plan = make_plan(graph, layout, num_microbatches=4)
    check_layout_invariance(graph, plan, [sample_batch(graph, n, seed=n) for n in (10, 3)])
    if "cast" in graph.layers:
        with pf.Engine(graph, plan, sgd) as engine:
            batch = sample_batch(graph, 5)
            seen = engine.predict(batch, ["cast"])["cast"]
            expected = pf.Reference(graph, sgd, num_microbatches=4).predict(batch, ["cast"])["cast"]
            assert seen.dtype == expected.dtype
            assert torch.equal(seen.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("dtype", ITEMSIZE_BY_DTYPE)
def test_passes_between_stages(dtype: str) -> None:
    for replicas in (False, True):
        check(through(dtype), replicas)


@pytest.mark.parametrize("replicas", [False, True])
def test_conjugates_and_negatives_are_numbers_where_they_arrive(replicas: bool) -> None:
    check(marks_on_memory(), replicas)


def over_gloo(rank: int) -> None:
    for case in (*map(through, ITEMSIZE_BY_DTYPE), marks_on_memory()):
        for replicas in (False, True):
            check(case, replicas)


def test_passes_between_processes() -> None:
    for result in run_ranks(over_gloo, 2):
        assert result.error is None, result.trace
