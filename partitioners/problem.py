"""What a partitioner is asked: costs, devices, and the rules of the cut.

A problem is a value. It says what counts, not how to search; `pipeflow.partitioners.objective`
turns it into seconds and bytes for a given cut.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

from pipeflow.errors import PlanError
from pipeflow.graphs.costs import GraphCosts
from pipeflow.partitioners.cluster import Cluster
from pipeflow.partitioners.pins import Pins

if TYPE_CHECKING:
    from pipeflow.partitioners.atoms import Atoms
    from pipeflow.partitioners.pinned_atoms import PinnedAtoms


class Position(NamedTuple):
    """Where a stage stands in the pipeline, as far as a schedule's memory depends on it.

    Attributes:
        num_replicas: of the stage.
        num_replicas_from_here: of this and all later stages, summed.
        num_microbatches: of a batch.
    """

    num_replicas: int
    num_replicas_from_here: int
    num_microbatches: int


Transfers = Literal["added", "overlapped", "relayed", "free"]
"""How transfers count beside compute; see `PartitionProblem`."""

Reduction = Literal["ring", "server"]
"""How replicas reduce their gradients."""

InFlight = Callable[[Position], int]
"""How many micro-batches' activations one replica of a stage holds at once."""


def holds_nothing(position: Position) -> int:
    """Activations take no memory: for costs whose sizes already hold all there is."""
    return 0


def one_version(position: Position) -> int:
    """The default: a replica holds its parameters once."""
    return 1


def stashed(position: Position) -> int:
    """PipeDream's stash: what is in flight beyond a stage, ceil(replicas after it / R).

    Its optimizer counts so many micro-batches' activations, and as many versions of the weights.
    """
    return math.ceil((position.num_replicas_from_here - position.num_replicas) / position.num_replicas)


def one_forward_one_backward(position: Position) -> int:
    """The default: a stage runs ahead by as many micro-batches as there are replicas from it on.

    Of these, and of all M, each of its R replicas holds its share:
    min(ceil(M / R), ceil(replicas from here / R)).
    """
    share = math.ceil(position.num_microbatches / position.num_replicas)
    return min(share, math.ceil(position.num_replicas_from_here / position.num_replicas))


def of_an_endless_batch(position: Position) -> int:
    """What `one_forward_one_backward` holds where micro-batches never run out: ceil(replicas from here / R)."""
    return math.ceil(position.num_replicas_from_here / position.num_replicas)


@dataclass(frozen=True, kw_only=True)
class PartitionProblem:
    """Cut `costs` into stages over `cluster` so that the slowest device is as fast as can be.

    Attributes:
        costs: the graph, in seconds and bytes for one micro-batch.
        cluster: the devices.
        num_microbatches: M of a batch; replicas share them, and gradients are reduced once for all.
        in_flight: the schedule's memory, a pure function of the position of a stage.
        num_stages: exactly so many; None leaves it open.
        max_stages: at most so many.
        replicas: exactly so many replicas of each stage in turn; None leaves it open.
        max_replicas: at most so many of any stage; 1 forbids replication, None leaves it open.
        even_replicas: whether only numbers of replicas are allowed that divide the micro-batches.
        optimizer_ratio: bytes of optimizer state for each byte of parameters (Adam: 2).
        gradient_ratio: bytes of gradients for each byte of parameters.
        transfers: how they count beside compute: "added" to it; "overlapped" with it, so that the
            longer of the two counts; "relayed", as PipeDream's optimizer counts them: what a later
            stage reads passes through all stages before it, and what enters a stage, what leaves it
            and its compute go on at once; or "free", not at all.
        reduction: how replicas reduce: in a "ring", or over a sharded parameter "server", which moves
            twice as much over a link.
        reduce_every: when replicas reduce their gradients: once an "iteration", or after each
            "microbatch" of theirs, as asynchronous pipelines do.
        fan_out: what a stage pays to send a tensor that several other stages read: "stage", once
            for each of them; "tensor", once, and a device receives it once for all its stages.
        unordered: layers that the order of the stages does not bind (the backward half of a
            training graph); an edge counts for the order only if neither end is among them.
        weight_versions: how many copies of its parameters a replica holds: asynchronous schedules
            stash one for each micro-batch in flight.
        holds_received: whether a stage holds what it receives beside what its layers save.
        nested: whether the cluster's levels are planned one inside the other: a stage of the outermost
            level is on some of its groups, and inside each of them it is a pipeline of the next
            (`pipeflow.partitioners.nesting`). Otherwise a stage may be on any devices.
        chunks: how many times the stages go round the devices: with more than 1, they are placed as
            interleaved schedules place them, on device 0, 1, ... K - 1, 0, 1, ..., where some turns
            may be left out.
        together: groups of layers that must share a stage, beside the costs' colocated ones.
        pins: what a person fixed: layers on stages and devices, together and apart.
        unit_bytes: the bytes that one of the costs' and devices' bytes stands for, in what people are told:
            less than 1 where a file has fractions of bytes.
        offload: layers that keep what backward needs on the host (`pipeflow.partitioners.offload`). Only
            what a given cut needs knows of it; partitioners are given problems without.

    Raises:
        PlanError: no layers, a count below 1, replicas that contradict the number of stages, pins that name
            what is not there, layers on stages or devices where there are several chunks, or
            transfers that are relayed where stages are not a chain.
    """

    costs: GraphCosts
    cluster: Cluster
    num_microbatches: int = 1
    in_flight: InFlight = one_forward_one_backward
    num_stages: int | None = None
    max_stages: int | None = None
    replicas: tuple[int, ...] | None = None
    max_replicas: int | None = None
    even_replicas: bool = False
    optimizer_ratio: float = 2.0
    gradient_ratio: float = 1.0
    transfers: Transfers = "added"
    reduction: Reduction = "ring"
    reduce_every: Literal["iteration", "microbatch"] = "iteration"
    fan_out: Literal["stage", "tensor"] = "stage"
    unordered: frozenset[str] = field(default_factory=frozenset)
    together: tuple[tuple[str, ...], ...] = ()
    weight_versions: InFlight = one_version
    holds_received: bool = True
    nested: bool = False
    chunks: int = 1
    pins: Pins = field(default_factory=Pins)
    unit_bytes: float = 1.0
    offload: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if not self.costs.layers:
            raise PlanError(f"the graph {self.costs.name!r} has no layers; there must be at least one to be cut")
        for name in ("num_microbatches", "num_stages", "max_stages", "max_replicas", "chunks"):
            value = getattr(self, name)
            optional = name not in ("num_microbatches", "chunks")
            if not (value is None and optional) and not (isinstance(value, int) and value >= 1):
                raise PlanError(f"{name}={value}; it must be at least 1, and a whole number")
        if self.transfers not in get_args(Transfers):
            raise PlanError(f"transfers={self.transfers!r}; known are {', '.join(get_args(Transfers))}")
        for name in ("optimizer_ratio", "gradient_ratio"):
            ratio = getattr(self, name)
            if not (math.isfinite(ratio) and ratio >= 0):
                raise PlanError(f"{name}={ratio}; it is bytes for each byte of parameters, a number of at least 0")
        if self.replicas is not None:
            if not self.replicas or min(self.replicas) < 1:
                raise PlanError(f"replicas={self.replicas}; give one count of at least 1 for each stage")
            if self.num_stages not in (None, len(self.replicas)):
                raise PlanError(
                    f"num_stages={self.num_stages}, but replicas={self.replicas} are for {len(self.replicas)} stages"
                )
            if uneven := [r for r in self.replicas if not self.allows(r)]:
                raise PlanError(
                    f"replicas={self.replicas}, but {uneven[0]} does not divide {self.num_microbatches} micro-batches; "
                    "give counts that do, or even_replicas=False"
                )
            if self.max_replicas is not None and max(self.replicas) > self.max_replicas:
                raise PlanError(f"replicas={self.replicas}, but max_replicas={self.max_replicas}; raise the limit")
        if self.transfers == "relayed" and (self.unordered or self.chunks > 1):
            what = f"chunks={self.chunks}" if self.chunks > 1 else "layers that the order of stages does not bind"
            raise PlanError(
                f"transfers='relayed' with {what}; stages that relay are a chain, count transfers as 'added'"
            )
        if self.nested:
            self._check_nested()
        count = self.stage_count
        if count is not None and self.max_stages is not None and count > self.max_stages:
            raise PlanError(f"{count} stages are asked for, but max_stages={self.max_stages}; raise the limit")
        self.pins.check(self.costs, self.cluster.num_devices)
        if self.chunks > 1 and self.pins.on:
            raise PlanError(
                f"{self.pins.on[0]}, but with chunks={self.chunks} a device holds several stages; set chunks=1"
            )

    def _check_nested(self) -> None:
        from pipeflow.partitioners.nesting import nested_levels

        nested_levels(self.cluster)
        if self.reduce_every != "microbatch" or self.transfers not in ("relayed", "free"):
            raise PlanError(
                f"levels are nested with reduce_every={self.reduce_every!r} and transfers={self.transfers!r}; give "
                "'microbatch', and 'relayed' or 'free'"
            )
        if self.costs.sharing == "copies" and self.costs.colocated:
            raise PlanError("levels are nested, where copies of shared parameters are not counted; keep them together")
        if self.even_replicas:
            raise PlanError(
                "levels are nested, whose replicas multiply and may share unevenly; set even_replicas=False"
            )
        if self.stage_count or self.max_stages or self.max_replicas not in (None, 1) or self.chunks > 1 or self.pins:
            raise PlanError(
                "levels are nested, where only max_replicas=1 can be asked for; leave numbers of stages and replicas, "
                "chunks and pins open, or give one level of links"
            )

    @property
    def stage_count(self) -> int | None:
        """The number of stages asked for, or None."""
        return len(self.replicas) if self.replicas is not None else self.num_stages

    @property
    def stage_limit(self) -> int:
        """No partition with one stage on a device can have more stages: limits, devices and atoms considered."""
        return self._most_stages(chunks=1)

    @property
    def chunked_limit(self) -> int:
        """The same where devices hold as many stages as there are chunks: no partition has more."""
        return self._most_stages(chunks=self.chunks)

    def _most_stages(self, chunks: int) -> int:
        limit = min(chunks * self.cluster.num_devices, self.atoms.count)
        return min(limit, *(n for n in (self.stage_count, self.max_stages) if n is not None), limit)

    @property
    def replica_limit(self) -> int:
        """No stage can have more replicas."""
        if self.replicas is not None:
            return max(self.replicas)
        limit = self.cluster.num_devices
        return limit if self.max_replicas is None else min(limit, self.max_replicas)

    @property
    def device_limit(self) -> int:
        """No partition can use more devices."""
        num_replicas = sum(self.replicas) if self.replicas is not None else self.stage_limit * self.replica_limit
        return min(self.cluster.num_devices, num_replicas * self.costs.largest_degree)

    @cached_property
    def atoms(self) -> Atoms:
        """The layers grouped into what every valid partition keeps together, as arrays."""
        from pipeflow.partitioners.atoms import find_atoms

        return find_atoms(self.costs, self.unordered, (*self.together, *self.pins.groups()))

    @cached_property
    def pinned(self) -> PinnedAtoms:
        """The pins, of atoms: what is left of them once what is together is one atom."""
        from pipeflow.partitioners.pinned_atoms import pinned_atoms

        return pinned_atoms(self.pins, self.atoms, one_replica=self.replica_limit == 1)

    @property
    def transfer_link(self) -> tuple[float, float]:
        """(bandwidth, latency) that transfers pay where links are alike; (inf, 0) where they pay nothing."""
        if self.transfers == "free" or self.cluster.num_devices == 1:
            return math.inf, 0.0
        return self.cluster.link(0, 1)

    def reductions(self, num_replicas: int) -> float:
        """How often a replica reduces its gradients, per micro-batch of the batch."""
        return 1 / self.num_microbatches if self.reduce_every == "iteration" else self.share(num_replicas)

    def allows(self, num_replicas: int) -> bool:
        """Whether a stage may have so many replicas, as far as their shares go."""
        return not self.even_replicas or self.num_microbatches % num_replicas == 0

    def share(self, num_replicas: int) -> float:
        """The part of all micro-batches that the busiest replica runs: ceil(M / R) / M."""
        return math.ceil(self.num_microbatches / num_replicas) / self.num_microbatches
