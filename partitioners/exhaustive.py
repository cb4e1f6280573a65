"""Every cut of a small graph: the oracle that the other partitioners are tested against.

Simple on purpose. It enumerates chains of ideals from the last stage to the first, every number
of replicas and, where devices differ, every choice of devices; it skips what a plain lower bound
already rules out, and prices each remaining cut with the one objective.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations

from pipeflow.errors import PlanError
from pipeflow.partitioners.atoms import Cut
from pipeflow.partitioners.bounds import lower_bound
from pipeflow.partitioners.certify import certified, stages_of
from pipeflow.partitioners.feasibility import memory_limits, no_cut_fits, require_feasible
from pipeflow.partitioners.objective import compute_seconds, objective
from pipeflow.partitioners.partition import Partition, Stage, num_turns
from pipeflow.partitioners.problem import PartitionProblem, Position

MOST_ATOMS = 16

_BETTER = 1 - 1e-12
"""A cut replaces another only if it is better by more than rounding; ties keep fewer devices."""


def exhaustive(problem: PartitionProblem) -> Partition:
    """The best partition with one stage on a device; with `chunks` 1, its objective is its lower bound.

    Every chain of ideals with one stage per device, on all choices of devices. Time grows
    exponentially: about a dozen layers (groups of colocated layers count as one).

    Raises:
        PlanError: more than 16 groups of layers; layers that can run in several ways, or nested levels.
        Infeasible: no partition of the problem fits.
    """
    if problem.atoms.count > MOST_ATOMS:
        raise PlanError(
            f"{problem.atoms.count} layers that can be apart; the exhaustive search takes at most {MOST_ATOMS}, "
            "use another partitioner"
        )
    require_feasible(problem)
    search = _Search(problem)
    for used in range(1, problem.device_limit + 1):
        search.run(used)
    if search.best_stages is None:
        raise no_cut_fits(problem, _closest(problem), "cut")
    bound = search.best if problem.chunks == 1 else lower_bound(problem)
    return certified(problem, search.best_stages, partitioner="exhaustive", lower_bound=bound)


def is_feasible(problem: PartitionProblem) -> bool:
    """Whether any partition fits, by looking for one until it is found or cannot be.

    Takes as long as `exhaustive` where there is none.

    Raises:
        PlanError: layers can run in several ways, or levels are nested: it would tell of another problem.
    """
    if problem.costs.has_variants or problem.nested:
        what = "layers can run in several ways" if problem.costs.has_variants else "levels are nested"
        raise PlanError(f"{what}, which a search for any one cut does not look at; use another partitioner")
    search = _Search(problem, any_will_do=True)
    for used in range(1, problem.device_limit + 1):
        search.run(used)
    return search.best_stages is not None


@dataclass(frozen=True, slots=True)
class _Block:
    """What a set of atoms costs as a stage, at least: exact but for links and fan-out."""

    seconds: tuple[float, ...]
    least_transfers: float
    fixed_bytes: int
    version_bytes: int
    each_bytes: int
    is_stuck: bool


@dataclass
class _Search:
    """State of one search. Sets of atoms are bit masks."""

    problem: PartitionProblem
    memory_factor: float = 1.0
    any_will_do: bool = False
    best: float = math.inf
    best_stages: tuple[Stage, ...] | None = None
    blocks: dict[int, _Block] = field(default_factory=dict)

    @cached_property
    def limits(self) -> list[float]:
        return [limit * self.memory_factor for limit in memory_limits(self.problem)]

    @cached_property
    def least_link(self) -> tuple[float, float]:
        """The fastest (bandwidth, latency) that there is."""
        cluster = self.problem.cluster
        pairs = [cluster.link(a, b) for a, b in combinations(range(cluster.num_devices), 2)]
        return max((b for b, _ in pairs), default=math.inf), min((s for _, s in pairs), default=0.0)

    def run(self, used: int) -> None:
        """Improves the best with the cuts on exactly `used` devices."""
        uniform = self.problem.cluster.is_uniform
        devices = tuple(range(used if uniform else self.problem.cluster.num_devices))
        self._extend((1 << self.problem.atoms.count) - 1, devices, used, [])

    def _extend(self, rest: int, free: tuple[int, ...], left: int, later: list[tuple[int, tuple[int, ...]]]) -> None:
        """Puts another stage before `later`; `left` devices are still to be used for the atoms `rest`."""
        count = self.problem.stage_count
        if self.any_will_do and self.best_stages is not None:
            return
        if not rest:
            if not left and count in (None, len(later)) and self._is_placed(later):
                self._price(later)
            return
        most = count or self.problem.max_stages
        if not left or (most is not None and len(later) >= most):
            return
        if min(self.block(rest).seconds) / left >= self.best:
            return
        replicas = range(1, min(left, self.problem.replica_limit) + 1)
        if self.problem.replicas is not None:
            replicas = range((r := self.problem.replicas[-1 - len(later)]), r + 1)
        for r in filter(self.problem.allows, replicas):
            from_here = r + sum(len(d) for _, d in later)
            for block in self._last_blocks(rest):
                for devices in self._choices(free, r):
                    if self._fits(block, devices, from_here):
                        others = tuple(d for d in free if d not in devices)
                        self._extend(rest & ~block, others, left - r, [*later, (block, devices)])

    def _choices(self, free: tuple[int, ...], count: int) -> Iterator[tuple[int, ...]]:
        if count > len(free):
            return iter(())
        return iter([free[-count:]]) if self.problem.cluster.is_uniform else combinations(free, count)

    def _fits(self, block: int, devices: tuple[int, ...], from_here: int) -> bool:
        """Whether the stage keeps to memory and may still beat the best."""
        problem, costs, r = self.problem, self.block(block), len(devices)
        if r > 1 and costs.is_stuck:
            return False
        pinned = problem.pinned
        if not pinned.is_free and not pinned.allows(
            self._members(block), None if problem.cluster.is_uniform else devices, num_replicas=r
        ):
            return False
        position = Position(r, from_here, problem.num_microbatches)
        held = problem.in_flight(position) * costs.each_bytes + problem.weight_versions(position) * costs.version_bytes
        if costs.fixed_bytes + held > min(self.limits[d] for d in devices):
            return False
        compute = max(costs.seconds[d] for d in devices)
        both = compute + costs.least_transfers if problem.transfers == "added" else compute
        return problem.share(r) * both < self.best * _BETTER

    def _is_placed(self, later: list[tuple[int, tuple[int, ...]]]) -> bool:
        if self.problem.chunks > 1 and num_turns([devices for _, devices in reversed(later)]) > self.problem.chunks:
            return False
        pinned = self.problem.pinned
        return not pinned.stages or pinned.places([self._members(block) for block, _ in reversed(later)])

    def _price(self, later: list[tuple[int, tuple[int, ...]]]) -> None:
        problem = self.problem
        cut: Cut = [(self._members(block), devices) for block, devices in reversed(later)]
        if problem.cluster.is_uniform:
            cut = problem.pinned.on_pinned_devices(cut, problem.cluster.num_devices)
        stages = stages_of(self.problem, cut)
        seconds = objective(self.problem, stages)
        if seconds < self.best * _BETTER:
            self.best, self.best_stages = seconds, stages

    def _members(self, block: int) -> tuple[int, ...]:
        return tuple(atom for atom in range(self.problem.atoms.count) if block >> atom & 1)

    def block(self, block: int) -> _Block:
        if block not in self.blocks:
            self.blocks[block] = self._cost(block)
        return self.blocks[block]

    def _cost(self, block: int) -> _Block:
        problem, atoms, members = self.problem, self.problem.atoms, self._members(block)
        layers = [layer for atom in members for layer in atoms.layers[atom]]
        bandwidth, latency = self.least_link
        transfers, received = 0.0, 0
        for net in atoms.nets:
            inside = [bool(block >> end & 1) for end in net.ends]
            if any(inside) and not all(inside):
                transfers += latency + net.bytes / bandwidth
                received += net.bytes * (problem.holds_received and net.is_activation and not inside[0])
        parameters = sum(layer.parameter_bytes for layer in layers)
        state = math.ceil(problem.gradient_ratio * parameters) + math.ceil(problem.optimizer_ratio * parameters)
        return _Block(
            seconds=tuple(compute_seconds(layers, device) for device in problem.cluster.devices),
            least_transfers=transfers,
            fixed_bytes=state,
            version_bytes=parameters,
            each_bytes=sum(layer.saved_bytes for layer in layers) + received,
            is_stuck=not all(layer.replicable for layer in layers),
        )

    def _last_blocks(self, rest: int) -> list[int]:
        """The sets of atoms of `rest` that no other atom of `rest` reads from."""
        successors = self.problem.atoms.successors
        blocks = [0]
        for atom in reversed(self._members(rest)):
            needed = sum(1 << b for b in successors[atom] if rest >> b & 1)
            blocks += [block | 1 << atom for block in blocks if block & needed == needed]
        return sorted(blocks[1:], reverse=True)


def _closest(problem: PartitionProblem) -> tuple[Stage, ...] | None:
    """A cut that would fit if every device had a little more memory."""
    for percent in (2, 10, 50, 300, 10**4, 10**9):
        search = _Search(problem, memory_factor=1 + percent / 100)
        for used in range(1, problem.device_limit + 1):
            search.run(used)
            if search.best_stages is not None:
                return search.best_stages
    return None
