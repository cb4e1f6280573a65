"""From a graph's costs and a cluster to a plan: searches what the caller leaves open.

Decides numbers of micro-batches, the schedule and limits on the number of stages, by the simulated
time of one iteration. Where the layers go is the partitioner's. Pure: the same arguments give the
same plan, byte for byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

from pipeflow.errors import Infeasible, PlanError
from pipeflow.execution_plan import Plan
from pipeflow.graphs.costs import GraphCosts, total_seconds
from pipeflow.graphs.sharing import share
from pipeflow.iteration_search import PlanObjective, Rank, shorten
from pipeflow.partitioners import PARTITIONERS
from pipeflow.partitioners.cluster import Cluster
from pipeflow.partitioners.infeasible import explained
from pipeflow.partitioners.offload import OffloadChoice, cut_with_offload, resolve_offload
from pipeflow.partitioners.partition import Partition
from pipeflow.partitioners.pins import Pins
from pipeflow.partitioners.problem import PartitionProblem
from pipeflow.partitioners.recompute import Recompute, RecomputeChoice, cut_with_recompute, resolve_recompute
from pipeflow.schedules import SCHEDULES, OrderFunction, Schedule, resolve_schedule
from pipeflow.simulator import simulate
from pipeflow.verifier import verify

if TYPE_CHECKING:
    from pipeflow.graphs.layer_graph import LayerGraph

Partitioner = Callable[[PartitionProblem], Partition]

_MOST_MICROBATCHES = 64
"""More are only used when asked for."""

_MOST_STARTS = 3
"""Plans next to which shorter ones are looked for."""

_WORK = 200_000
"""Layers times devices, summed over the partitions that one search makes: seconds, not minutes."""


def plan(
    graph: LayerGraph | None,
    costs: GraphCosts,
    cluster: Cluster,
    *,
    batch_size: int,
    partitioner: str | Partitioner = "auto",
    schedule: str | Schedule | OrderFunction = "auto",
    num_stages: int | None = None,
    replicas: Sequence[int] | None = None,
    num_microbatches: int | None = None,
    optimizer_ratio: float = 2.0,
    max_replicas: int | None = None,
    overlap: bool = False,
    recompute: RecomputeChoice = "never",
    offload: OffloadChoice = "never",
    pins: Pins | None = None,
    objective: PlanObjective = "bottleneck",
    shared: Literal["together", "copies"] = "together",
) -> Plan:
    """The plan with the shortest simulated iteration of all that are tried, verified.

    Ties go to fewer devices, then fewer micro-batches, then less memory. Numbers of micro-batches
    that are tried divide the batch or are powers of two, up to 64.

    Args:
        graph: what the costs are of, by whose digest runs recognise the plan; or None.
        costs: at any micro-batch size; rescaled to the plan's.
        cluster: the devices.
        batch_size: samples of a whole batch.
        partitioner: a name in `PARTITIONERS`, "auto", or a function of a `PartitionProblem`.
        schedule: a name in `SCHEDULES`, "auto", `module:function`, a row or a function that can be
            named so.
        num_stages: exactly so many.
        replicas: exactly so many replicas of each stage in turn.
        num_microbatches: into how many the batch is cut, at most one for each sample.
        optimizer_ratio: bytes of optimizer state for each byte of parameters (Adam: 2).
        max_replicas: at most so many replicas of any stage; 1 forbids replication.
        overlap: whether the partitioner counts transfers as running beside computes.
        recompute: which layers keep nothing for backward and are computed again for it: "never",
            "always", "fit" (on each stage those that cost the least time among what makes it fit its
            devices, none where it fits), or names of layers, `*` and `?` allowed.
        offload: which layers keep what backward needs on the host in between: "never", "always", or names
            of layers, `*` and `?` allowed; none of them may be recomputed (with "fit": those that are
            offloaded save nothing, and are not chosen).
        pins: layers that must be somewhere, together or apart.
        objective: "bottleneck" takes the partitioner's cuts as they are; "iteration" also tries
            partitions next to the best of them, by the simulated time of an iteration, which fewer
            micro-batches make differ more from the bottleneck.
        shared: whether layers that share parameters are kept on one stage ("together"), or may be
            apart, each stage with a copy ("copies").

    Raises:
        PlanError: an unknown name, a count below 1, a pattern that no layer fits, or costs of
            another graph.
        Infeasible: no plan fits; the reasons say which device lacks how many bytes and for what.
    """
    check_cut(batch_size, num_microbatches)
    if costs.has_variants:
        raise PlanError(
            "layers of the costs can run in several ways, which no runtime does; cut them with pf.partition, or leave "
            "`variants` out"
        )
    if graph is not None:
        _check_graph(graph, costs)
    costs = share(costs, shared)
    problem = PartitionProblem(
        costs=costs,
        cluster=cluster,
        num_stages=num_stages,
        replicas=None if replicas is None else tuple(replicas),
        max_replicas=max_replicas,
        optimizer_ratio=optimizer_ratio,
        transfers="overlapped" if overlap else "added",
        pins=pins or Pins(),
        offload=resolve_offload(offload, costs),
    )
    if objective not in get_args(PlanObjective):
        raise PlanError(f"objective={objective!r}; give 'bottleneck' or 'iteration'")
    search = _Search(
        problem=problem,
        graph_digest="" if graph is None else graph.digest,
        batch_size=batch_size,
        partition=_resolve_partitioner(partitioner),
        schedules=_resolve_schedules(schedule),
        recompute=resolve_recompute(recompute, costs),
        objective=objective,
    )
    best = search.run([num_microbatches] if num_microbatches else _candidates(batch_size))
    verify(best)
    return best


def check_cut(batch_size: int, num_microbatches: int | None) -> None:
    """Whether a batch can be cut into so many micro-batches; None leaves the number open.

    Raises:
        PlanError: no samples, no micro-batch, or some without a sample.
    """
    if batch_size < 1:
        raise PlanError(f"batch_size={batch_size}; a batch has at least 1 sample")
    if num_microbatches is not None and not 1 <= num_microbatches <= batch_size:
        raise PlanError(
            f"num_microbatches={num_microbatches} for a batch of {batch_size}; each has at least 1 sample: give 1 to "
            f"{batch_size}, or plan for a larger batch"
        )


def _check_graph(graph: LayerGraph, costs: GraphCosts) -> None:
    names, costed = list(graph.layers), [layer.name for layer in costs.layers]
    if names == costed:
        return
    remedy = "profile or estimate the graph that is planned"
    if lacking := [name for name in names if name not in set(costed)]:
        raise PlanError(f"the costs of {costs.name!r} lack layer {lacking[0]!r} of graph {graph.name!r}; {remedy}")
    if extra := [name for name in costed if name not in set(names)]:
        raise PlanError(f"the costs of {costs.name!r} have layer {extra[0]!r}, graph {graph.name!r} not; {remedy}")
    raise PlanError(f"the costs of {costs.name!r} list the layers of graph {graph.name!r} in another order; {remedy}")


def _resolve_partitioner(partitioner: str | Partitioner) -> Partitioner:
    if not isinstance(partitioner, str):
        return partitioner
    if partitioner in PARTITIONERS:
        return PARTITIONERS[partitioner]
    known = ", ".join(map(repr, PARTITIONERS))
    raise PlanError(f"{partitioner!r} is no partitioner; known are {known}, or give a function")


def _resolve_schedules(schedule: str | Schedule | OrderFunction) -> tuple[Schedule, ...]:
    if schedule == "auto":
        return tuple(SCHEDULES.values())
    row = resolve_schedule(schedule, allow=None)
    # A plan names its schedule, so that what is saved can be run.
    try:
        named = resolve_schedule(row.name)
    except PlanError as error:
        raise PlanError(
            f"schedule {row.name!r} cannot be found again by its name ({error}); define it at the head of a module"
        ) from error
    if named.order is not row.order:
        raise PlanError(f"schedule {row.name!r} is not what its name finds; define it at the head of a module")
    return (row,)


def _candidates(batch_size: int) -> list[int]:
    """Numbers of micro-batches worth a try, ascending."""
    most = min(batch_size, _MOST_MICROBATCHES)
    return [m for m in range(1, most + 1) if batch_size % m == 0 or m & (m - 1) == 0]


@dataclass(frozen=True, slots=True)
class _Tried:
    """A plan, and how it ranks: seconds to nine digits, devices, micro-batches, bytes."""

    plan: Plan
    rank: Rank


@dataclass(frozen=True, slots=True)
class _Search:
    """One search: the problem as the caller left it, and what stays the same throughout."""

    problem: PartitionProblem
    graph_digest: str
    batch_size: int
    partition: Partitioner
    schedules: tuple[Schedule, ...]
    recompute: Recompute
    objective: PlanObjective

    def run(self, counts: Sequence[int]) -> Plan:
        """The best plan over all numbers of micro-batches, schedules and limits of stages."""
        found: list[_Tried] = []
        best: _Tried | None = None
        refused: list[tuple[int, str, Infeasible]] = []
        bounds: dict[tuple[int, str], float] = {}
        problems = [p for count in self._affordable(counts) for p in self._problems(count)]
        for problem, schedules in problems:
            if best is not None and self._least_seconds(problem) > best.rank[0]:
                continue
            try:
                partition = self._cut(problem)
                # The bound that is certified is that of the caller's problem, whose limits come first.
                key = problem.num_microbatches, schedules[0].name
                bound = bounds.setdefault(key, partition.certificate.lower_bound)
                tried = self._try(problem, partition, bound, schedules)
            except Infeasible as error:
                refused.append((problem.num_microbatches, schedules[0].name, error))
                continue
            found.append(tried)
            if best is None or tried.rank < best.rank:
                best = tried
        if best is None:
            if self.recompute or self.problem.offload:
                raise _joined(refused)  # the rules would be those of stages that keep everything
            smallest, _ = max(problems, key=lambda pair: pair[0].num_microbatches)
            raise explained(smallest, _joined(refused))
        return best.plan if self.objective == "bottleneck" else self._shortened(found)

    def _shortened(self, found: Sequence[_Tried]) -> Plan:
        """The best plan next to those that were found, beginning with the best few."""
        distinct = {(t.plan.stages, t.plan.schedule, t.plan.num_microbatches): t for t in reversed(found)}
        starts = sorted(distinct.values(), key=lambda tried: tried.rank)[:_MOST_STARTS]

        def problem_of(plan: Plan) -> PartitionProblem:
            in_flight = resolve_schedule(plan.schedule).in_flight
            return replace(self.problem, costs=plan.costs, num_microbatches=plan.num_microbatches, in_flight=in_flight)

        def price(plan: Plan) -> Rank | None:
            rank, over = self._rank(plan)
            return None if over else rank

        shorter = [shorten(t.plan, t.rank, problem_of(t.plan), price) for t in starts]
        return min(shorter, key=lambda pair: pair[1])[0]

    def _affordable(self, counts: Sequence[int]) -> list[int]:
        """As many of the counts as a large problem leaves time for, spread evenly, the largest included."""
        problem = self.problem
        size = len(problem.costs.layers) * problem.cluster.num_devices * len(self._groups())
        limit = max(2, _WORK // size)
        if len(counts) <= limit:
            return list(counts)
        return [counts[-1 - i * len(counts) // limit] for i in reversed(range(limit))]

    def _groups(self) -> list[tuple[Schedule, ...]]:
        """Schedules that give the same partitions: they differ only in memory."""
        if all(device.memory_bytes is None for device in self.problem.cluster.devices):
            return [self.schedules]
        return [(row,) for row in self.schedules]

    def _problems(self, count: int) -> Iterator[tuple[PartitionProblem, tuple[Schedule, ...]]]:
        costs = self.problem.costs.at(-(-self.batch_size // count))
        size = len(costs.layers) * self.problem.cluster.num_devices
        limits: list[int | None] = [None]
        if self.problem.stage_count is None and size * 100 <= _WORK:
            # The best bottleneck may be that of a deep pipeline with a large bubble: try shallower ones.
            limits += [n for n in (1, 2, 4, 8) if n < self.problem.cluster.num_devices]
        for schedules in self._groups():
            for limit in limits:
                problem = replace(self.problem, costs=costs, num_microbatches=count, max_stages=limit)
                yield replace(problem, in_flight=schedules[0].in_flight), schedules

    def _least_seconds(self, problem: PartitionProblem) -> float:
        """No plan's iteration takes less: all work, spread evenly over devices as fast as the fastest."""
        devices = problem.cluster.devices
        fastest = max(max(d.speed, *d.speed_by_kind.values()) if d.speed_by_kind else d.speed for d in devices)
        work = total_seconds(problem.costs.layers) * problem.num_microbatches
        return work / fastest / problem.device_limit * (1 - 1e-9)

    def _try(
        self, problem: PartitionProblem, partition: Partition, bound: float, schedules: tuple[Schedule, ...]
    ) -> _Tried:
        """The best of the schedules on the partition, which is cut again while it does not fit.

        The partitioner's memory is an estimate by the schedule's depth; the program's own also has
        gradients on their way and messages that arrive early. What is over is taken off all devices.
        """
        best: _Tried | None = None
        excess = 0
        for _ in range(4):
            excess = 0
            for row in schedules:
                tried, over = self._simulate(problem, partition, bound, row)
                excess = max(excess, over)
                if not over and (best is None or tried.rank < best.rank):
                    best = tried
            if best is not None:
                return best
            problem = replace(problem, cluster=_with_less_memory(problem.cluster, excess))
            partition = self._cut(problem)
        raise Infeasible(
            [f"the {schedules[0].name} program of the partition needs {excess} bytes more than a device has"]
        )

    def _cut(self, problem: PartitionProblem) -> Partition:
        return cut_with_offload(lambda p: cut_with_recompute(self._partitioned, p, self.recompute), problem)

    def _partitioned(self, problem: PartitionProblem) -> Partition:
        partition = self.partition(problem)
        if not isinstance(partition, Partition):
            raise PlanError(
                f"the partitioner {getattr(self.partition, '__qualname__', self.partition)!r} gave a "
                f"{type(partition).__name__}; it must return a Partition, or raise Infeasible where there is none"
            )
        return partition

    def _simulate(
        self, problem: PartitionProblem, partition: Partition, bound: float, row: Schedule
    ) -> tuple[_Tried, int]:
        """The plan as it ranks, and how many bytes some device lacks."""
        candidate = Plan(
            costs=problem.costs,
            graph_digest=self.graph_digest,
            cluster=self.problem.cluster,
            stages=partition.stages,
            certificate=partition.certificate.model_copy(update={"lower_bound": bound}),
            schedule=row.name,
            num_microbatches=problem.num_microbatches,
            batch_size=self.batch_size,
            optimizer_ratio=problem.optimizer_ratio,
            pins=problem.pins,
            offload=tuple(layer.name for layer in problem.costs.layers if layer.name in problem.offload),
        )
        rank, over = self._rank(candidate)
        return _Tried(candidate, rank), over

    def _rank(self, candidate: Plan) -> tuple[Rank, int]:
        """How a plan compares, and how many bytes some device lacks."""
        timeline = simulate(candidate)
        over = max(
            peak - device.memory_bytes if device.memory_bytes is not None else 0
            for peak, device in zip(timeline.peak_bytes_by_rank, self.problem.cluster.devices, strict=False)
        )
        seconds = float(f"{timeline.makespan:.9g}")
        num_devices = len({device for stage in candidate.stages for device in stage.devices})
        return (seconds, num_devices, candidate.num_microbatches, max(timeline.peak_bytes_by_rank)), max(0, over)


def _with_less_memory(cluster: Cluster, amount: int) -> Cluster:
    devices = tuple(
        d if d.memory_bytes is None else d.model_copy(update={"memory_bytes": max(0, d.memory_bytes - amount)})
        for d in cluster.devices
    )
    return Cluster(devices=devices, levels=cluster.levels, links=cluster.links)


def _joined(refused: Sequence[tuple[int, str, Infeasible]]) -> Infeasible:
    """One set of reasons: those that all attempts share, else those of the smallest micro-batches."""
    shared = [r for r in refused[0][2].reasons if all(r in error.reasons for _, _, error in refused)]
    if shared:
        return Infeasible(shared)
    most = max(count for count, _, _ in refused)
    return Infeasible(
        list(
            dict.fromkeys(
                f"with {count} micro-batches and {name}: {reason}"
                for count, name, error in refused
                if count == most
                for reason in error.reasons
            )
        )
    )
