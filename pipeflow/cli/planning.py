"""From what a person names on the command line to costs, a cluster and a plan.

Shared by the commands that plan. Knows files, modules and options; the search is the planner's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipeflow.errors import FormatError, PlanError

if TYPE_CHECKING:
    from torch import Tensor

    from pipeflow.execution_plan import Plan
    from pipeflow.graphs.costs import GraphCosts
    from pipeflow.graphs.layer_graph import LayerGraph
    from pipeflow.iteration_search import PlanObjective
    from pipeflow.partitioners.cluster import Cluster
    from pipeflow.partitioners.offload import OffloadChoice
    from pipeflow.partitioners.pins import Pins
    from pipeflow.partitioners.recompute import RecomputeChoice
    from pipeflow.recipe import Recipe

_PROFILED_MICROBATCHES = 8
"""Layers are profiled on so many micro-batches to the batch where nobody says how many there are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What was asked for; None where it was left open."""

    devices: int | None
    cluster: str | None
    memory: int | None
    batch_size: int | None = None
    microbatches: int | None
    stages: int | None
    replicas: tuple[int, ...] | None
    partitioner: str | None
    schedule: str | None
    profile_cache: str | None
    shared: Literal["together", "copies"] | None = None
    pins: Pins | None = None
    objective: PlanObjective | None = None
    recompute: RecomputeChoice | None = None
    offload: OffloadChoice | None = None

    def given(self) -> list[str]:
        """The names of what was asked for."""
        names = [field.name for field in fields(self) if getattr(self, field.name) is not None]
        return ["pin" if name == "pins" else name for name in names]

    def for_ranks(self, num_ranks: int, recipe: Recipe | None) -> Request:
        """The request on as many devices as a job has ranks; the recipe's own layout stays if it fits."""
        if recipe is not None and recipe.num_devices == num_ranks and self.stages is None and self.replicas is None:
            return self
        return replace(self, devices=num_ranks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What is planned: costs as they are, or a graph to be profiled.

    Attributes:
        costs: where they are known.
        graph: where there is one.
        recipe: where the graph came with its data.
    """

    costs: GraphCosts | None = None
    graph: LayerGraph | None = None
    recipe: Recipe | None = None


def load_source(source: str, allow: Sequence[str] = ()) -> Source:
    """Reads a recipe (a Python file or a module), a graph file or a costs file.

    Args:
        allow: import prefixes that a graph file may name besides torch's.

    Raises:
        FormatError: it is none of them, or `allow` is given with what does not heed it.
    """
    from pipeflow.recipe import load_recipe
    from pipeflow.values import as_value, read_json

    path = Path(source)
    if path.suffix != ".json":
        _refuse_allow(source, allow)
        recipe = load_recipe(source)
        return Source(recipe=recipe, graph=recipe.graph())
    if not path.is_file():
        raise FormatError(f"{source} is not a file; give a recipe, a graph file or a costs file")
    document = read_json(path, what="a graph or costs file", error=FormatError)
    form = document.get("format") if isinstance(document, dict) else None
    if form == "pipeflow-costs-1":
        _refuse_allow(source, allow)
        from pipeflow.graphs.costs import GraphCosts

        return Source(costs=as_value(GraphCosts, document, source, what="a costs file", error=FormatError))
    if form == "pipeflow-graph-1":
        from pipeflow.graphs.layer_graph import LayerGraph

        return Source(graph=LayerGraph.load(source, allow=tuple(allow)))
    raise FormatError(f"{source} has the format {form!r}; known are 'pipeflow-graph-1' and 'pipeflow-costs-1'")


def _refuse_allow(source: str, allow: Sequence[str]) -> None:
    if allow:
        raise FormatError(f"--allow {allow[0]} is given, but {source} is no graph file; leave it out")


def make_plan(source: Source, request: Request, *, on_phase: Callable[[str], None] = lambda phase: None) -> Plan:
    """Measures what is not known and plans.

    Args:
        on_phase: is told what is going on.

    Raises:
        PlanError: no batch size, or a request that contradicts itself; `Infeasible` where nothing fits.
        FormatError, ClusterError: a file is not what it should be.
    """
    import pipeflow as pf
    from pipeflow.planner import check_cut

    if request.devices is not None and request.cluster is not None:
        raise PlanError("both --devices and --cluster are given; give one")
    if request.profile_cache is not None and source.costs is not None:
        raise PlanError("--profile-cache is given, but a costs file is not measured; leave it out")
    recipe = source.recipe
    batch_size = request.batch_size or (recipe.batch_size if recipe else None)
    if batch_size is None:
        raise PlanError("the batch size is not known; give --batch-size")
    # A layout that was asked for replaces the recipe's as a whole: half of each would fit neither.
    fixed = any(v is not None for v in (request.devices, request.cluster, request.stages, request.replicas))
    layout = None if fixed else recipe
    microbatches = request.microbatches or (recipe.num_microbatches if recipe else None)
    check_cut(batch_size, microbatches)
    cluster = _cluster(request, layout, is_local=source.costs is None)
    costs = source.costs
    if costs is None:
        assert source.graph is not None
        on_phase("profiling")
        size = -(-batch_size // (microbatches or min(_PROFILED_MICROBATCHES, batch_size)))
        costs = pf.profile(source.graph, _sample(source, size), cluster.devices[0].kind, cache=request.profile_cache)
    on_phase("planning")
    return pf.plan(
        source.graph,
        costs,
        cluster,
        batch_size=batch_size,
        partitioner=request.partitioner or (recipe.partitioner if recipe else "auto"),
        schedule=request.schedule or (recipe.schedule if recipe else "auto"),
        num_stages=request.stages or (layout.num_stages if layout else None),
        replicas=request.replicas or (layout.replicas if layout else None),
        num_microbatches=microbatches,
        pins=request.pins,
        objective=request.objective or "bottleneck",
        shared=request.shared or "together",
        recompute=request.recompute or "never",
        offload=request.offload or "never",
    )


def _cluster(request: Request, layout: Recipe | None, *, is_local: bool) -> Cluster:
    """The devices to plan for: a file's, this machine's, or, for costs alone, equal ones with free transfers."""
    from pipeflow.partitioners.cluster import Cluster

    count = request.devices or (layout.num_devices if layout else None)
    if request.cluster is not None:
        cluster = Cluster.from_file(request.cluster)
    elif is_local or count is None:
        cluster = Cluster.local(count)
    else:
        cluster = Cluster.uniform(count)
    if request.memory is None:
        return cluster
    devices = tuple(d.model_copy(update={"memory_bytes": request.memory}) for d in cluster.devices)
    return cluster.model_copy(update={"devices": devices})


def _sample(source: Source, size: int) -> dict[str, Tensor]:
    """A micro-batch to measure on: the recipe's own first samples, else noise and zeros."""
    import torch

    assert source.graph is not None
    if source.recipe is not None:
        batch = next(iter(source.recipe.train_batches(0, 0)), None)
        if batch is None:
            raise PlanError(f"recipe {source.recipe.name!r} gives no training batch in epoch 0; it must give one")
        return {name: tensor[:size] for name, tensor in batch.items()}
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, spec in source.graph.inputs.items():
        dtype = getattr(torch, spec.dtype)
        shape = spec.shape_at(size, source.graph.example_lengths)
        # Zeros are valid wherever numbers mean labels or places in a table.
        noise = dtype.is_floating_point
        tensors[name] = torch.randn(shape, generator=generator).to(dtype) if noise else torch.zeros(shape, dtype=dtype)
    return tensors
