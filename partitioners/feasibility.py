"""Why a problem has no partition: which pins contradict each other, which device lacks what.

The quick reasons are found without a search; where only a search can tell, the partitioner
hands over the cut that comes closest and gets the shortfall in words.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from pipeflow.errors import Infeasible, PlanError
from pipeflow.partitioners.contradiction import pins_contradict
from pipeflow.partitioners.objective import StageTerms, device_bytes, stage_terms
from pipeflow.partitioners.partition import Stage
from pipeflow.partitioners.problem import PartitionProblem, Position
from pipeflow.partitioners.rules import smallest_contradiction
from pipeflow.units import format_bytes, one_line

_NO_LIMIT = 2**62
"""Bytes; the layers of a graph have fewer (`pipeflow.graphs.costs.MOST_BYTES`)."""


def require_feasible(problem: PartitionProblem, *, nests: bool = False, varies: bool = False) -> None:
    """Raises `Infeasible` for what can be told without a search: pins, counts, layers and totals too large.

    Args:
        nests: whether the partitioner plans levels one inside the other.
        varies: whether it chooses in which way a layer runs.

    Raises:
        PlanError: it does not, and the problem asks for it.
    """
    if problem.costs.has_variants:
        if not varies:
            raise PlanError(
                "layers can run in several ways; only the partitioners 'variants' and 'auto' choose, use one"
            )
        return
    if problem.nested and not nests:
        raise PlanError("only the partitioners 'nested' and 'auto' plan levels one inside the other; use one of them")
    if reason := quick_reason(problem):
        raise Infeasible([reason])
    if pins_contradict(problem):
        rules = smallest_contradiction(problem, lambda p: pins_contradict(p) or quick_reason(p) is not None)
        raise Infeasible([rule.text for rule in rules], rules)


def quick_reason(problem: PartitionProblem) -> str | None:
    """What is too large, as far as it shows without a search."""
    for check in (_count_reason, _replica_reason, _atom_reason, _total_reason):
        if reason := check(problem):
            return reason
    return None


def memory_limits(problem: PartitionProblem) -> list[float]:
    """The limit of each device in bytes, inf where there is none, or one that 64 bits do not hold."""
    limits = (d.memory_bytes for d in problem.cluster.devices)
    return [math.inf if limit is None or limit >= _NO_LIMIT else limit for limit in limits]


def atom_bytes(problem: PartitionProblem) -> list[float]:
    """Bytes that every atom takes on a device, about: as on the only stage, with what it receives left out."""
    in_flight = problem.in_flight(Position(1, 1, problem.num_microbatches))
    ratio = 1 + problem.gradient_ratio + problem.optimizer_ratio
    held = zip(problem.atoms.parameter_bytes.tolist(), problem.atoms.saved_bytes.tolist(), strict=True)
    return [ratio * parameters + in_flight * saved for parameters, saved in held]


def _count_reason(problem: PartitionProblem) -> str | None:
    count, devices, atoms = problem.stage_count, problem.cluster.num_devices, problem.atoms
    if count is None:
        return None
    if count > atoms.count:
        apart = f"{atoms.count} groups of layers that can be apart"
        if atoms.count == len(problem.costs.layers):
            apart = f"{atoms.count} layers"
        return f"{count} stages are asked for, but the graph has only {apart}; ask for fewer stages"
    needed, places = sum(problem.replicas) if problem.replicas else count, devices * problem.chunks
    if needed > places or max(problem.replicas or (1,)) > devices:
        what = f"replicas {problem.replicas} need {needed} devices" if problem.replicas else f"{count} stages"
        if problem.chunks > 1:
            return f"{what}, but the cluster has {devices} devices for {problem.chunks} chunks each; ask for fewer"
        return f"{what}, but the cluster has {devices} devices; each replica of a stage needs a device of its own"
    return None


def _replica_reason(problem: PartitionProblem) -> str | None:
    if problem.replicas is None or 1 in problem.replicas:
        return None
    stuck = [atom for atom in range(problem.atoms.count) if not problem.atoms.replicable[atom]]
    if not stuck:
        return None
    name = next(c.name for c in problem.atoms.layers[stuck[0]] if not c.replicable)
    return (
        f"layer {name!r} cannot be replicated, but replicas={problem.replicas} leave no stage with one replica; "
        "give its stage one"
    )


def _replica_counts(problem: PartitionProblem) -> list[int]:
    return sorted(set(problem.replicas)) if problem.replicas else list(range(1, problem.replica_limit + 1))


def _atom_reason(problem: PartitionProblem) -> str | None:
    """The atom that lacks most on the largest device, or the one it is pinned to, if any does."""
    limits = memory_limits(problem)
    largest = max(range(len(limits)), key=limits.__getitem__)
    if limits[largest] == math.inf and not problem.pinned.devices:
        return None
    atoms, microbatches = problem.atoms, problem.num_microbatches
    worst, story = 0.0, None
    fewest = {r: problem.in_flight(Position(r, r, microbatches)) for r in _replica_counts(problem)}
    for atom in range(atoms.count):
        allowed = fewest if atoms.replicable[atom] else {r: n for r, n in fewest.items() if r == 1}
        if not allowed:
            continue
        in_flight = min(allowed.values())
        versions = min(problem.weight_versions(Position(r, r, microbatches)) for r in allowed)
        activations = in_flight * int(atoms.saved_bytes[atom])
        parts = _parts(problem, int(atoms.parameter_bytes[atom]), activations, in_flight, versions)
        place = min(problem.pinned.devices.get(atom, (largest,)), key=limits.__getitem__)
        lacking = sum(n for n, _ in parts) - limits[place]
        if lacking > worst:
            names = ", ".join(repr(n) for n in atoms.members[atom][:4]) + (
                ", ..." if len(atoms.members[atom]) > 4 else ""
            )
            one = len(atoms.members[atom]) == 1
            subject = f"layer {names} needs" if one else f"layers {names} share a stage and need"
            worst = lacking
            device = _device(problem, place)
            which = "to which it is pinned" if atom in problem.pinned.devices else "the largest"
            story = f"{subject} {_sum(problem, parts)}; {device}, {which}, lacks {_told(problem, lacking)}"
    return story


def _total_reason(problem: PartitionProblem) -> str | None:
    """Parameters with their gradients and state are on some device at least once."""
    limits = sorted(memory_limits(problem), reverse=True)[: problem.device_limit]
    if math.inf in limits:
        return None
    counts = _replica_counts(problem)
    versions = min(problem.weight_versions(Position(r, r, problem.num_microbatches)) for r in counts)
    parts = _parts(problem, int(problem.atoms.parameter_bytes.sum()), 0, 0, versions)
    total = sum(n for n, _ in parts)
    if total <= sum(limits):
        return None
    return (
        f"the graph needs {_sum(problem, parts)}; the {len(limits)} device{'s' * (len(limits) > 1)} that may be used "
        f"have {_told(problem, sum(limits))} together and lack {_told(problem, total - sum(limits))}"
    )


def shortfall(problem: PartitionProblem, stages: Sequence[Stage]) -> tuple[str, ...]:
    """Why stages are not allowed: the pins that they break, then what each device lacks, the worst first.

    Args:
        stages: a partition, complete and in order; nothing is wrong with it if the result is empty.
    """
    terms = stage_terms(problem, stages)
    limits = memory_limits(problem)
    lacking = {d: n - limits[d] for d, n in device_bytes(stages, terms).items() if n > limits[d]}
    result = list(problem.pins.broken(stages))
    for device in sorted(lacking, key=lambda d: (-lacking[d], d)):
        held = [(s, t) for s, t in zip(stages, terms, strict=True) if device in s.devices]
        parts = _stage_parts([t for _, t in held])
        names = [name for s, _ in held for name in s.layers]
        span = one_line(names[0] if len(names) == 1 else f"{names[0]} .. {names[-1]}")
        result.append(
            f"{_device(problem, device)} lacks {_told(problem, lacking[device])}: layers {span} need "
            f"{_sum(problem, parts)}"
        )
    return tuple(result)


def no_cut_fits(problem: PartitionProblem, closest: Sequence[Stage] | None, what: str) -> Infeasible:
    """The error of a search that found nothing within memory.

    Args:
        closest: the cut that it came closest with, if there is one.
        what: which cuts it searched, for example "cut of the graph's order".
    """
    if closest is None:
        kept = "all pins, and " if problem.pins else ""
        return Infeasible([f"no {what} keeps {kept}layers that cannot be replicated on stages of one replica"])
    reasons = shortfall(problem, closest)
    if not reasons:
        return Infeasible([f"no {what} satisfies the problem"])
    return Infeasible([f"no {what} fits into memory; even in the closest, {reasons[0]}", *reasons[1:]])


def _parts(
    problem: PartitionProblem, parameters: int, activations: int, in_flight: int, versions: int
) -> list[tuple[int, str]]:
    return [
        (versions * parameters, "of parameters"),
        (math.ceil(problem.gradient_ratio * parameters), "of gradients"),
        (math.ceil(problem.optimizer_ratio * parameters), "of optimizer state"),
        (activations, f"of activations of {in_flight} micro-batch{'es' * (in_flight != 1)}"),
    ]


def _stage_parts(terms: Sequence[StageTerms]) -> list[tuple[int, str]]:
    in_flight = max(t.in_flight for t in terms)
    return [
        (sum(t.parameter_bytes for t in terms), "of parameters"),
        (sum(t.gradient_bytes for t in terms), "of gradients"),
        (sum(t.optimizer_bytes for t in terms), "of optimizer state"),
        (sum(t.activation_bytes for t in terms), f"of activations of {in_flight} micro-batch{'es' * (in_flight != 1)}"),
    ]


def _sum(problem: PartitionProblem, parts: Sequence[tuple[int, str]]) -> str:
    shown = [f"{_told(problem, n)} {what}" for n, what in parts if n]
    total = _told(problem, sum(n for n, _ in parts))
    return f"{total} ({' + '.join(shown)})" if shown else total


def _device(problem: PartitionProblem, index: int) -> str:
    device = problem.cluster.devices[index]
    return f"device {device.name!r} of {_told(problem, device.memory_bytes or 0)}"


def _told(problem: PartitionProblem, amount: float) -> str:
    """Bytes of the costs as people count them."""
    return format_bytes(amount * problem.unit_bytes)
