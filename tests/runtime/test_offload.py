"""What is saved on the host comes back as it was, and meanwhile takes no memory of the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pipeflow as pf
from pipeflow.errors import Infeasible, PlanError, VerificationError
from pipeflow.lowering import lower
from pipeflow.program import Fetch, Mode, Offload, Program, parse_action
from pipeflow.runtime.offload import HostStore
from pipeflow.testing import check_layout_invariance, run_ranks, unit_costs
from pipeflow.testing.graphs import sample_batch
from tests.runtime.models import make_plan, sgd

NUM_MICROBATCHES = 7


def chain(*layers: Any) -> pf.LayerGraph:
    graph = pf.LayerGraph("chain")
    value: Any = graph.input("x", ("B", 6))
    for i, layer in enumerate(layers):
        value = graph.add(f"l{i}", layer, value)
    graph.loss("loss", mean_square, value)
    return graph


def mean_square(x: Tensor) -> Tensor:
    return x.square().mean()


def offloading(plan: pf.Plan, *names: str) -> pf.Plan:
    """The plan with these layers offloaded, or all."""
    every = [layer.name for layer in plan.costs.layers]
    return plan.model_copy(update={"offload": tuple(n for n in every if n in names or not names)})


def planned(graph: pf.LayerGraph, schedule: str = "gpipe", num_microbatches: int = NUM_MICROBATCHES) -> pf.Plan:
    first, *rest = graph.layers
    half = len(rest) // 2
    stages = [([first, *rest[:half]], (0,)), (rest[half:], (1,))]
    return make_plan(graph, stages, num_microbatches=num_microbatches, schedule=schedule)


class Chunks(nn.Module):
    """Saves three views of one storage, with strides of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(6, 18)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.mix(x).chunk(3, dim=-1)
        result: Tensor = (q.t() @ k).tanh() @ v.t()
        return result.t()


class Cell(nn.Module):
    """Its gates are parts of one storage, written to one after the other while the first are saved already."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        h, c = self.cell(x)
        result: Tensor = h + c
        return result


class OnContext(torch.autograd.Function):
    """Keeps a tensor where autograd does not see it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.kept = x.exp()
        return x.exp()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        result: Tensor = gradient * ctx.kept
        return result


class InPlace(nn.Module):
    """Writes to a tensor, and saves what is in it then."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sin().relu_() * 2


def conjugate(x: Tensor) -> Tensor:
    y = torch.complex(x, x.sin()).conj()
    return (y * y.conj().tanh()).real


MODELS: dict[str, Callable[[], pf.LayerGraph]] = {
    "linear": lambda: chain(pf.lazy(nn.Linear, 6, 6), nn.Tanh(), pf.lazy(nn.Linear, 6, 6), nn.GELU()),
    "views of one storage": lambda: chain(pf.lazy(Chunks), pf.lazy(nn.Linear, 6, 6), pf.lazy(Chunks)),
    "dropout and norms": lambda: chain(
        pf.lazy(nn.Linear, 6, 6), nn.Dropout(0.4), pf.lazy(nn.BatchNorm1d, 6), nn.Dropout(0.3)
    ),
    "LSTM cells": lambda: chain(pf.lazy(nn.Linear, 6, 6), pf.lazy(Cell), nn.Tanh(), pf.lazy(Cell)),
    "own functions": lambda: chain(pf.lazy(nn.Linear, 6, 6), OnContext.apply, InPlace(), conjugate),
}


@pytest.mark.parametrize("schedule", pf.SCHEDULES)
@pytest.mark.parametrize("model", MODELS)
def test_trains_as_one_device_does(model: str, schedule: str) -> None:
    graph = MODELS[model]()
    batches = [sample_batch(graph, n, seed=n) for n in (21, 14, 16)]
    plan = planned(graph, schedule)
    check_layout_invariance(graph, offloading(plan), batches, num_accumulated=1)
    check_layout_invariance(graph, offloading(plan, "l0", "l3"), batches)
    again = plan.stages[0].with_recompute(["l1"])
    mixed = plan.model_copy(update={"stages": (again, plan.stages[1])})
    check_layout_invariance(graph, offloading(mixed, "l0", "l2", "loss"), batches)


def over_gloo(rank: int) -> None:
    for model in MODELS.values():
        graph = model()
        plan = offloading(planned(graph))
        check_layout_invariance(graph, plan, [sample_batch(graph, n) for n in (21, 14)])


def test_trains_as_one_device_does_over_processes() -> None:
    for result in run_ranks(over_gloo, 2):
        assert result.error is None, result.trace


def test_each_storage_leaves_once_and_parameters_and_inputs_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of `Chunks`: what the linear layer gives, the square and what is divided into it; not x, nor a weight."""
    sizes: list[int] = []
    copy = HostStore._copy

    def counted(self: HostStore, parcel: Any, target: Tensor, source: Tensor) -> None:
        sizes.append(source.numel() // 4)
        copy(self, parcel, target, source)

    monkeypatch.setattr(HostStore, "_copy", counted)
    graph = chain(pf.lazy(Chunks), nn.Identity())
    plan = offloading(make_plan(graph, [(["l0"], (0,)), (["l1", "loss"], (1,))], num_microbatches=5, schedule="gpipe"))
    with pf.Engine(graph, plan, sgd) as engine:
        engine.step(sample_batch(graph, 20))
    away = sum(isinstance(a, Offload) and a.stage == 0 for rank in lower(plan).actions_by_rank for a in rank)
    assert away == 5
    assert sorted(sizes) == [36] * 2 * away + [72] * 2 * away


def text(program: Program, rank: int) -> str:
    return "; ".join(str(a) for a in program.actions_by_rank[rank] if not str(a).startswith(("send", "recv", "free")))


def test_copies_run_beside_one_compute_each() -> None:
    """And none where less than a compute would be between them."""
    graph = chain(pf.lazy(nn.Linear, 6, 6), pf.lazy(nn.Linear, 6, 6))
    plan = make_plan(graph, [(["l0"], (0,)), (["l1", "loss"], (1,))], num_microbatches=4, schedule="gpipe")
    program = lower(offloading(plan, "l0"))
    assert text(program, 0) == (
        "0F0; 0F1; offload 0,0; 0F2; offload 0,1; fetch 0,0; 0F3; offload 0,2; fetch 0,1; "
        "0B0; offload 0,3; fetch 0,2; 0B1; fetch 0,3; 0B2; 0B3; step 0"
    )
    assert "offload" not in text(program, 1)
    short = lower(offloading(plan.model_copy(update={"num_microbatches": 3}), "l0"))
    assert "offload" not in text(short, 0)
    assert not any(isinstance(a, Offload) for a in lower(offloading(plan, "l0"), mode=Mode.INFER).actions_by_rank[0])
    for action in (Offload(0, 12), Fetch(3, 4)):
        assert parse_action(str(action), plan.placement) == action


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda a: [x for x in a if not (isinstance(x, Fetch) and x.microbatch == 0)], "'0B0' needs 'fetch 0,0'"),
        (
            lambda a: [x for x in a if not (isinstance(x, Offload) and x.microbatch == 0)],
            "'fetch 0,0' needs 'offload 0,0'",
        ),
        (lambda a: [*a[:8], Offload(0, 0), *a[8:]], "'offload 0,0' is done twice"),
        (lambda a: [*a[:-1], Offload(0, 3), a[-1]], "'offload 0,3' comes after '0B3'"),
        (lambda a: [Offload(0, 0), *a], "'offload 0,0' needs '0F0'"),
    ],
)
def test_programs_that_lose_what_is_saved_are_refused(change: Callable[[list[Any]], list[Any]], why: str) -> None:
    graph = chain(pf.lazy(nn.Linear, 6, 6), pf.lazy(nn.Linear, 6, 6))
    plan = make_plan(graph, [(["l0"], (0,)), (["l1", "loss"], (1,))], num_microbatches=4, schedule="gpipe")
    plan = offloading(plan)
    program = lower(plan)
    pf.verify(program, plan=plan)
    changed = tuple(change(list(program.actions_by_rank[0]))), program.actions_by_rank[1]
    wrong = Program(Mode.TRAIN, 4, plan.placement, changed)
    with pytest.raises(VerificationError, match=why):
        pf.verify(wrong, plan=plan)


def test_a_program_that_moves_what_the_plan_keeps_is_refused() -> None:
    graph = chain(pf.lazy(nn.Linear, 6, 6), pf.lazy(nn.Linear, 6, 6))
    plan = make_plan(graph, [(["l0"], (0,)), (["l1", "loss"], (1,))], num_microbatches=4, schedule="gpipe")
    program = lower(offloading(plan, "l0"))
    with pytest.raises(VerificationError, match="'offload 0,0' moves what the plan keeps on the device"):
        pf.verify(program, plan=plan)


def test_a_slow_link_to_the_host_takes_time_and_a_fast_one_none() -> None:
    graph = chain(pf.lazy(nn.Linear, 6, 6), pf.lazy(nn.Linear, 6, 6))
    plan = planned(graph)
    bare = pf.simulate(plan).makespan

    def makespan(bandwidth: float | None) -> float:
        devices = tuple(d.model_copy(update={"host_bandwidth": bandwidth}) for d in plan.cluster.devices)
        cluster = plan.cluster.model_copy(update={"devices": devices})
        return pf.simulate(offloading(plan.model_copy(update={"cluster": cluster}))).makespan

    assert makespan(None) == makespan(1e12) == bare
    slow = pf.simulate(offloading(plan))
    assert (0, 0) not in slow.wait_seconds
    assert makespan(10.0) > makespan(50.0) > bare


def layers_that_save(num_bytes: int) -> pf.GraphCosts:
    graph = chain(*[pf.lazy(nn.Linear, 6, 6) for _ in range(4)])
    costs = unit_costs(graph)
    layers = [c.model_copy(update={"saved_bytes": num_bytes, "parameter_bytes": 0}) for c in costs.layers]
    return costs.model_copy(update={"layers": tuple(layers)})


def test_a_plan_with_offloading_fits_where_one_without_does_not() -> None:
    costs, cluster = layers_that_save(1000), pf.Cluster.uniform(2, memory_bytes=20_000)
    options = {"batch_size": 32, "num_microbatches": 16, "num_stages": 2, "schedule": "gpipe"}
    with pytest.raises(Infeasible):
        pf.plan(None, costs, cluster, **options)  # type: ignore[arg-type]
    plan = pf.plan(None, costs, cluster, offload="always", **options)  # type: ignore[arg-type]
    assert max(pf.verify(plan).peak_bytes_by_rank) <= 20_000
    assert "saved on the host: l0..loss (5)" in str(plan)
    assert pf.Plan.model_validate_json(plan.model_dump_json()) == plan
    with pytest.raises(Infeasible):
        pf.plan(None, costs, pf.Cluster.uniform(2, memory_bytes=2_000), offload="always", **options)  # type: ignore[arg-type]


def test_choices_that_cannot_be_kept_are_refused() -> None:
    costs, cluster = layers_that_save(10), pf.Cluster.uniform(2)
    with pytest.raises(PlanError, match=r"offload names 'block\*', which fits no layer of 'chain'"):
        pf.plan(None, costs, cluster, batch_size=8, offload=["block*"])
    with pytest.raises(PlanError, match="offload='fit'; give 'never', 'always' or a list of layer names"):
        pf.plan(None, costs, cluster, batch_size=8, offload="fit")
    with pytest.raises(PlanError, match="layer 'l1' is offloaded and recomputed"):
        pf.plan(None, costs, cluster, batch_size=8, offload=["l1"], recompute=["l1", "l2"])
    plan = planned(chain(pf.lazy(nn.Linear, 6, 6), nn.Tanh()))
    fields: dict[str, Any] = {name: getattr(plan, name) for name in pf.Plan.model_fields if name != "offload"}
    with pytest.raises(PlanError, match="offload names 'l9', which is not a layer of 'chain'"):
        pf.Plan(**fields, offload=("l9",))
    with pytest.raises(PlanError, match="name each layer once, in the graph's order"):
        pf.Plan(**fields, offload=("l1", "l0"))


def test_what_autograd_does_not_see_is_known_to_stay() -> None:
    graph = chain(pf.lazy(nn.Linear, 6, 6), OnContext.apply)
    costs = pf.profile(graph, sample_batch(graph, 8), num_repeats=1, warmup=0)
    seen, hidden = costs.layers[0], costs.layers[1]
    assert seen.fixed_in_place_bytes == 0
    assert hidden.fixed_in_place_bytes == hidden.internal_bytes == 8 * 6 * 4
    assert hidden.movable_bytes == 0


@pytest.mark.gpu
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_on_a_gpu_too(schedule: str) -> None:
    """The same losses to the last bit, less memory, and the peak within 5 % of the simulator's."""
    graph = pf.LayerGraph("wide")
    value, target = graph.input("x", ("B", 1024)), graph.input("target", ("B", 1024))
    for i in range(6):
        value = graph.add(f"l{i}", nn.Sequential(nn.Linear(1024, 4096), nn.GELU(), nn.Linear(4096, 1024)), value)
    graph.loss("loss", nn.functional.mse_loss, value, target)
    batch = {name: torch.randn(4096, 1024) for name in ("x", "target")}
    costs = pf.profile(graph, {name: v[:512] for name, v in batch.items()}, "cuda")
    seen = []
    for offload in ("never", "always"):
        plan = pf.plan(
            graph,
            costs,
            pf.Cluster.uniform(1, pf.Device(name="cuda", kind="cuda", host_bandwidth=2e10)),
            batch_size=4096,
            num_microbatches=8,
            schedule=schedule,
            offload=offload,
        )
        with pf.Engine(graph, plan, sgd, devices=["cuda:0"], measure=True) as engine:
            losses = [engine.step(batch).loss for _ in range(4)]
            measured = engine.measured()
        [predicted], [counted] = measured.predicted_bytes_by_rank, measured.peak_bytes_by_rank
        assert predicted == pytest.approx(counted, rel=0.05)
        seen.append((losses, counted))
    assert seen[0][0] == seen[1][0]
    if schedule == "gpipe":
        assert seen[1][1] < 0.8 * seen[0][1]
