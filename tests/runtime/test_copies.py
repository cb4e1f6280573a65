"""Parameters shared by layers on several stages: copies that train as the one parameter they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import pipeflow as pf
from pipeflow.errors import Infeasible, PlanError
from pipeflow.graphs.sharing import held_bytes, with_copies
from pipeflow.lowering import lower
from pipeflow.partitioners.objective import objective
from pipeflow.partitioners.problem import PartitionProblem
from pipeflow.program import ReduceShared
from pipeflow.runtime.reference import Reference
from pipeflow.testing import check_layout_invariance, layer_graphs, plans, unit_costs
from pipeflow.testing.graphs import concatenate, sample_batch
from pipeflow.testing.processes import run_ranks
from tests.runtime.models import Stages, make_plan, mean_square

VOCABULARY, WIDTH, LENGTH = 11, 6, 4


def scores(x: Tensor) -> Tensor:
    """(B, T, V) to (B, V, T), as cross entropy reads them."""
    return x.transpose(1, 2).contiguous()


def tied_embeddings() -> pf.LayerGraph:
    """A language model that reads tokens and writes them by one matrix, on the first stage and the last."""
    embedding = nn.Embedding(VOCABULARY, WIDTH, dtype=torch.float64)
    projection = nn.Linear(WIDTH, VOCABULARY, bias=False, dtype=torch.float64)
    projection.weight = embedding.weight
    graph = pf.LayerGraph("language")
    tokens = graph.input("tokens", ("B", LENGTH), "int64")
    labels = graph.input("labels", ("B", LENGTH), "int64")
    h = graph.add("embed", embedding, tokens)
    h = graph.add("mix", pf.lazy(nn.Linear, WIDTH, WIDTH, dtype=torch.float64), h)
    h = graph.add("scores", scores, graph.add("project", projection, graph.add("act", torch.tanh, h)))
    graph.loss("loss", functional.cross_entropy, h, labels)
    return graph


def shared_towers() -> pf.LayerGraph:
    """Two inputs go through the same two layers, on stages of their own, and meet."""
    first, second = (nn.Linear(WIDTH, WIDTH, dtype=torch.float64) for _ in range(2))
    graph = pf.LayerGraph("towers")
    ends = []
    for side in ("left", "right"):
        h = graph.add(f"{side}1", first, graph.input(side, ("B", WIDTH), "float64"))
        ends.append(graph.add(f"{side}2", second, graph.add(f"{side}act", torch.tanh, h)))
    both = graph.add("both", concatenate, *ends)
    graph.loss("loss", mean_square, graph.add("out", pf.lazy(nn.Linear, 2 * WIDTH, 3, dtype=torch.float64), both))
    return graph


def used_twice_in_a_chain() -> pf.LayerGraph:
    """One layer three times in a row; the middle one with more around it, in the same module."""
    shared = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)
    graph = pf.LayerGraph("chain")
    h = graph.add("a", shared, graph.input("x", ("B", WIDTH), "float64"))
    h = graph.add("b", nn.Sequential(nn.Tanh(), shared, nn.Tanh(), shared), h)
    h = graph.add("c", shared, graph.add("act", torch.sin, h))
    graph.loss("loss", mean_square, h)
    return graph


def a_user_without_backward() -> pf.LayerGraph:
    """The parameter's first user leads to no loss: it learns nothing, but what it uses is trained."""
    shared = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)
    graph = pf.LayerGraph("monitor")
    x = graph.input("x", ("B", WIDTH), "float64")
    graph.add("look", torch.abs, graph.add("watch", shared, x))
    h = graph.add("learn", shared, graph.add("widen", pf.lazy(nn.Linear, WIDTH, WIDTH, dtype=torch.float64), x))
    graph.loss("loss", mean_square, h)
    return graph


def frozen_and_buffers() -> pf.LayerGraph:
    """What is shared and never trained is copied and nothing more: a frozen layer, a table of positions."""
    frozen = nn.Linear(WIDTH, WIDTH, dtype=torch.float64).requires_grad_(False)
    table = torch.linspace(-1, 1, WIDTH, dtype=torch.float64)
    graph = pf.LayerGraph("frozen")
    h = graph.add(
        "in", pf.lazy(nn.Linear, WIDTH, WIDTH, dtype=torch.float64), graph.input("x", ("B", WIDTH), "float64")
    )
    for name in ("first", "second"):
        h = graph.add(f"{name}frozen", frozen, h)
        h = graph.add(f"{name}shift", Shift(table), h)
    graph.loss("loss", mean_square, h)
    return graph


class Shift(nn.Module):
    """Adds a table that is in the state, and never changes."""

    table: Tensor

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table


CASES: list[Callable[[], pf.LayerGraph]] = [
    tied_embeddings,
    shared_towers,
    used_twice_in_a_chain,
    a_user_without_backward,
    frozen_and_buffers,
]


def copies_plan(graph: pf.LayerGraph, stages: Stages, *, schedule: str = "1f1b", num_microbatches: int = 4) -> pf.Plan:
    plan = make_plan(graph, [(list(graph.layers), (0,))], num_microbatches=num_microbatches, schedule=schedule)
    ranks = 1 + max(rank for _, on in stages for rank in on)
    return pf.Plan.model_validate(
        {
            **dict(plan),
            "costs": with_copies(plan.costs),
            "cluster": pf.Cluster.uniform(ranks),
            "stages": tuple(pf.Stage.replicated(tuple(layers), tuple(on)) for layers, on in stages),
        }
    )


def layouts(graph: pf.LayerGraph, schedule: str) -> list[pf.Plan]:
    """Each layer a stage: one replica each, a rank with several copies; and replicas, unequal. Of three ranks."""
    names = list(graph.layers)
    looped: Stages = [([name], (i % 3,)) for i, name in enumerate(names)]
    unequal: Stages = [([name], ((0, 1, 2), (1,), (2, 0))[i % 3]) for i, name in enumerate(names)]
    return [copies_plan(graph, stages, schedule=schedule) for stages in (looped, unequal)]


def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3, eps=1e-3)


@pytest.mark.parametrize("schedule", pf.SCHEDULES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_copies_train_as_one_parameter(case: Callable[[], pf.LayerGraph], schedule: str) -> None:
    graph = case()
    batches = [sample_batch(graph, n, seed=n) for n in (9, 2, 6)]
    options = {"clip_norm": 0.05, "parameter_groups": {next(iter(graph.parameters)): {"lr": 5e-3}}}
    for plan in layouts(graph, schedule):
        check_layout_invariance(graph, plan, batches, num_accumulated=1)
        check_layout_invariance(graph, plan, batches, optimizer=adam, options=options)


def over_gloo(rank: int) -> None:
    for case in CASES:
        torch.manual_seed(rank)  # what a rank builds differs; the owner's values hold
        ours = case()
        torch.manual_seed(0)
        graph = case()
        for plan in layouts(graph, "1f1b"):
            check_layout_invariance(graph, plan, [sample_batch(graph, n, seed=n) for n in (9, 2)], optimizer=adam)
            with pf.Engine(ours, plan, adam) as engine:
                engine.step(sample_batch(graph, 8))
                after = engine.state_dict()
                for replica in engine._ranks.replicas[rank].values():
                    for name in replica.borrowed & replica.tensors().keys():
                        assert torch.equal(replica.tensors()[name], after[name])


def test_copies_train_as_one_parameter_over_processes() -> None:
    for result in run_ranks(over_gloo, 3):
        assert result.error is None, result.trace


@st.composite
def sharing_graphs(draw: st.DrawFn) -> pf.LayerGraph:
    """Drawn graphs with two or three layers more that share a module, some of them leading to a loss."""
    graph = draw(layer_graphs(max_layers=6, dtype="float64", allow_shared=True, allow_buffers=True))
    module = nn.Linear(WIDTH, WIDTH, dtype=torch.float64).requires_grad_(draw(st.booleans()))
    fitting = [t for t, spec in graph.specs.items() if spec.shape == ("B", WIDTH) and spec.dtype == "float64"]
    fitting.append(graph.input("extra", ("B", WIDTH), "float64").name)
    for i in range(draw(st.integers(2, 3))):
        h = graph.add(f"twin{i}", module, draw(st.sampled_from(fitting[::-1])))
        fitting.append(h.name)
        if draw(st.booleans()) and h.spec.requires_grad:
            graph.loss(f"twin_loss{i}", mean_square, h)
    if "extra" not in {t for layer in graph.layers.values() for t in layer.inputs}:
        graph.add("look", torch.abs, "extra")
    return graph.check()


@given(data=st.data())
@settings(max_examples=60)
def test_drawn_graphs_with_copies(data: st.DataObject) -> None:
    graph = data.draw(sharing_graphs())
    plan = data.draw(plans(with_copies(unit_costs(graph)), max_ranks=5, max_stages=6, graph_digest=graph.digest))
    check_layout_invariance(graph, plan, [sample_batch(graph, n) for n in (7, 3)])


@given(data=st.data())
@settings(max_examples=60)
def test_stages_hold_the_bytes_that_plans_count(data: st.DataObject) -> None:
    """Each stage's parameters, and those with a gradient, in bytes; copies included, each once in a stage."""
    graph = data.draw(sharing_graphs())
    plan = data.draw(plans(unit_costs(graph), max_replicas=1, graph_digest=graph.digest))
    with pf.Engine(graph, plan, torch.optim.SGD) as engine:
        for index, held in enumerate(held_bytes(plan.costs, [stage.layers for stage in plan.stages])):
            replica = engine._ranks.replicas[plan.stages[index].devices[0]][index]
            assert held.all == sum(p.nbytes for p in replica.parameters.values())
            assert held.own == held.trained - sum(replica.parameters[n].nbytes for n in replica.copied)


def test_copies_are_the_same_bits_on_every_rank() -> None:
    graph = tied_embeddings()
    plan = layouts(graph, "1f1b")[1]
    with pf.Engine(graph, plan, adam) as engine:
        for n in (9, 5):
            engine.step(sample_batch(graph, n))
        weights = [
            stage.tensors()["embed.weight"]
            for held in engine._ranks.replicas.values()
            for stage in held.values()
            if "embed.weight" in stage.tensors()
        ]
    assert len(weights) == 6  # three replicas of the embedding's stage, and of the projection's
    assert all(torch.equal(weights[0], weight) for weight in weights)


def test_state_and_checkpoint_hold_it_once_and_load_under_any_plan(tmp_path: Path) -> None:
    graph = tied_embeddings()
    apart, together = layouts(graph, "1f1b")[1], make_plan(graph, [(list(graph.layers), (0, 1))])
    batches = [sample_batch(graph, n, seed=n) for n in (8, 6, 7)]
    reference = Reference(graph, adam, num_microbatches=4)
    for batch in batches:
        reference.step(batch)
    for number, (before, after) in enumerate(((apart, together), (together, apart), (apart, apart))):
        folder = tmp_path / str(number)
        with pf.Engine(graph, before, adam) as engine:
            engine.step(batches[0])
            engine.step(batches[1])
            engine.save(folder)
            assert engine.state_dict().keys() == reference.state_dict().keys() == {*graph.parameters, *graph.buffers}
            assert "project.weight" not in engine.state_dict()
            assert "project.weight" not in (folder / "pipeflow.json").read_text()
        with pf.Engine(graph, after, adam, seed=1) as engine:
            engine.load(folder)
            engine.step(batches[2])
            for name, value in reference.state_dict().items():
                assert engine.state_dict()[name].allclose(value, rtol=1e-12, atol=1e-14), name


def test_one_sum_over_all_holders_and_none_twice() -> None:
    """The embedding's stage has nothing else to reduce; the middle's replicas reduce as ever."""
    graph = tied_embeddings()
    stages: Stages = [(["embed"], (0, 1)), (["mix", "act"], (2, 3)), (["project", "scores", "loss"], (4,))]
    plan = copies_plan(graph, stages)
    program = lower(plan)
    shared = ReduceShared((0, 2))
    for rank, actions in enumerate(program.actions_by_rank):
        text = [str(a) for a in actions if str(a).startswith(("reduce", "step"))]
        assert text == (["reduce 1", "step 1"] if rank in (2, 3) else ["reduce 0+2", f"step {0 if rank < 2 else 2}"])
    events = [event for event in pf.simulate(plan).events if event.action == shared]
    assert {event.rank for event in events} == {0, 1, 4}
    assert len({(event.start, event.end) for event in events}) == 1


def test_what_copies_cost_is_in_the_objective() -> None:
    graph = tied_embeddings()
    plan = copies_plan(graph, [(["embed", "mix", "act"], (0,)), (["project", "scores", "loss"], (1,))])
    slow = pf.Cluster.uniform(2, bandwidth=1e6)
    free = plan.costs.model_copy(update={"shared": ()})
    with_sum, without = (
        objective(PartitionProblem(costs=c, cluster=slow, num_microbatches=2), plan.stages) for c in (plan.costs, free)
    )
    assert with_sum - without == pytest.approx(VOCABULARY * WIDTH * 8 / 1e6 / 2)


def test_the_planner_keeps_together_or_copies_as_it_is_told() -> None:
    """Embedding and projection are half of the work each: only copies let two devices share it."""
    graph = tied_embeddings()
    costs = unit_costs(graph)
    together = pf.plan(graph, costs, pf.Cluster.uniform(2), batch_size=8, num_microbatches=4)
    assert together.shared == "together"
    assert together.stage_by_layer["embed"] == together.stage_by_layer["project"]
    apart = pf.plan(
        graph, costs, pf.Cluster.uniform(2), batch_size=8, num_microbatches=4, num_stages=2, shared="copies"
    )
    assert apart.shared == "copies"
    assert apart.stage_by_layer["embed"] != apart.stage_by_layer["project"]
    assert apart.digest != apart.model_copy(update={"costs": costs}).digest
    check_layout_invariance(graph, apart, [sample_batch(graph, 8)])
    with pytest.raises(Infeasible):
        pf.plan(graph, costs, pf.Cluster.uniform(2), batch_size=8, num_stages=3)
    with pytest.raises(PlanError, match="shared='apart'; layers that share parameters stay 'together'"):
        pf.plan(graph, costs, pf.Cluster.uniform(2), batch_size=8, shared="apart")  # type: ignore[arg-type]


def test_a_norm_that_is_shared_stays_on_one_stage() -> None:
    """Its running statistics move with every call, in one order."""
    norm = nn.BatchNorm1d(WIDTH, dtype=torch.float64)
    graph = pf.LayerGraph("normed")
    h = graph.add("a", norm, graph.input("x", ("B", WIDTH), "float64"))
    graph.loss("loss", mean_square, graph.add("b", norm, graph.add("act", torch.tanh, h)))
    assert with_copies(unit_costs(graph)).colocated == (("a", "b"),)


def test_costs_that_know_nothing_of_what_is_shared_are_refused() -> None:
    graph = tied_embeddings()
    plan = layouts(graph, "gpipe")[0]
    ignorant = plan.model_copy(update={"costs": plan.costs.model_copy(update={"shared": ()})})
    with pytest.raises(PlanError, match=r"layers embed, project share 'embed.weight' and are on stages 0, 3"):
        pf.Engine(graph, ignorant, adam)


def test_copies_in_half_types_have_masters_that_stay_alike() -> None:
    """Sums over stages are of the masters' gradients; casts of one master are the same on all stages."""
    graph = tied_embeddings()
    precision = pf.Precision(parameters="bfloat16", reduce="float32")
    plan = layouts(graph, "1f1b")[1]
    batches = [sample_batch(graph, n, seed=n) for n in (9, 5)]
    reference = Reference(graph, adam, num_microbatches=4, precision=precision)
    with pf.Engine(graph, plan, adam, precision=precision) as engine:
        for batch in batches:
            assert engine.step(batch).loss == pytest.approx(reference.step(batch).loss, rel=1e-2)
        stages = [stage for held in engine._ranks.replicas.values() for stage in held.values()]
        masters = [stage.parameters["embed.weight"] for stage in stages if "embed.weight" in stage.parameters]
        assert all(torch.equal(masters[0], master) for master in masters)
        assert masters[0].allclose(reference.state_dict()["embed.weight"], atol=3e-3)
