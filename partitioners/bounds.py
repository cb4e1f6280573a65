"""Lower bounds: what no partition of a problem can beat, without searching.

Each bound holds for every valid partition, whatever its order, replicas and devices.
"""

from __future__ import annotations

import math
from typing import Any

import networkx as nx
from networkx.algorithms.flow import build_residual_network, preflow_push

from pipeflow.partitioners.objective import compute_seconds, reduction_volume
from pipeflow.partitioners.problem import PartitionProblem

_SLACK = 1 - 1e-12
"""Sums are rounded; a bound must stay below what exact arithmetic would give."""


_FLOW_UNITS = 2**40
"""Seconds of all layers in the whole units of a flow network."""

_FLOW_WORK = 12_000
"""Atoms times flows that are worth their time."""


def lower_bound(problem: PartitionProblem) -> float:
    """The best of the bounds of this module, in seconds per micro-batch."""
    return max(work_bound(problem), atom_bound(problem))


def work_bound(problem: PartitionProblem) -> float:
    """All layers' seconds over the fastest devices that a partition can use.

    A replica of R runs at least 1/R of its stage's work, so devices can at best share all of it.
    Where speeds differ by kind of layer, each layer counts at its fastest and all devices alike.
    """
    devices, count = problem.cluster.devices, problem.device_limit
    layers = problem.costs.layers
    if not any(d.speed_by_kind for d in devices):
        speeds = sorted((d.speed for d in devices), reverse=True)[:count]
        return math.fsum(layer.seconds for layer in layers) / math.fsum(speeds) * _SLACK
    kinds = {layer.kind for layer in layers}
    fastest = {kind: max(d.speed_by_kind.get(kind, d.speed) for d in devices) for kind in kinds}
    return math.fsum(layer.seconds / fastest[layer.kind] for layer in layers) / count * _SLACK


def atom_bound(problem: PartitionProblem) -> float:
    """The costliest atom alone, at the number of replicas that suits it best.

    Its replicas also have to reduce its gradients, over links no faster than the fastest.
    """
    atoms = problem.atoms
    links, fastest = _links(problem), _fastest_seconds(problem)
    bandwidth = max((b for b, _ in links), default=math.inf)
    latency = min((s for _, s in links), default=0.0)
    counts = sorted(set(problem.replicas)) if problem.replicas else range(1, problem.replica_limit + 1)
    best = 0.0
    for atom in range(atoms.count):
        compute = fastest[atom]
        if compute <= best:
            continue
        amount = int(atoms.parameter_bytes[atom])
        options = []
        for r in counts:
            if r > 1 and not atoms.replicable[atom]:
                continue
            volume, latencies = reduction_volume(r, problem.reduction)
            reduction = volume * amount / bandwidth + latencies * latency if r > 1 and amount else 0.0
            options.append(problem.share(r) * compute + reduction * problem.reductions(r))
        if options:
            best = max(best, min(options))
    return best * _SLACK


def cut_bound(problem: PartitionProblem) -> float:
    """The least that a stage with one chosen atom costs, whatever else is on it: a minimum cut.

    A stage S around an atom costs the compute of S and every net that S cuts; the least of that
    over all sets S, valid or not, is a minimum cut between the atom and the rest: each other atom
    in S pays its seconds. Atoms that cost most by themselves are tried first, until none that is
    left can raise the bound. 0 where stages may be replicated or transfers are not added.
    """
    atoms, cluster = problem.atoms, problem.cluster
    if problem.replica_limit > 1 or problem.transfers != "added":
        return 0.0
    compute = _fastest_seconds(problem)
    links = _links(problem)
    bandwidth = max((b for b, _ in links), default=math.inf)
    latency = min((s for _, s in links), default=0.0)
    if cluster.num_devices == 1:
        return 0.0
    scale = _FLOW_UNITS / (math.fsum(compute) or 1.0)
    network, alone = _network(problem, compute, bandwidth, latency, scale)
    residual = build_residual_network(network, "capacity")
    best = 0
    for atom in sorted(range(atoms.count), key=lambda a: (-alone[a], a))[: max(1, min(48, _FLOW_WORK // atoms.count))]:
        if alone[atom] <= best:
            break
        flow = preflow_push(network, atom, "sink", residual=residual, value_only=True)
        best = max(best, int(flow.graph["flow_value"]))
    return best / scale * _SLACK


def _network(
    problem: PartitionProblem, compute: list[float], bandwidth: float, latency: float, scale: float
) -> tuple[nx.DiGraph[Any], list[int]]:
    """The flow network of `cut_bound` in whole units, and what each atom costs as a stage alone.

    A net of several readers is Lawler's pair of nodes: whoever is on one side of it is joined to
    the pair for free, and the pair costs the net once.
    """
    atoms = problem.atoms
    network: nx.DiGraph[Any] = nx.DiGraph()
    alone = [math.floor(seconds * scale) for seconds in compute]
    for atom, units in enumerate(alone):
        network.add_edge(atom, "sink", capacity=units)
    for index, net in enumerate(atoms.nets):
        units = math.floor((latency + net.bytes / bandwidth) * scale)
        if not units:
            continue
        for end in net.ends:
            alone[end] += units
        if len(net.ends) == 2:
            for a, b in (net.ends, net.ends[::-1]):
                before = network.get_edge_data(a, b, {"capacity": 0})["capacity"]
                network.add_edge(a, b, capacity=before + units)
            continue
        network.add_edge(("in", index), ("out", index), capacity=units)
        for end in net.ends:
            network.add_edge(end, ("in", index))
            network.add_edge(("out", index), end)
    return network, alone


def _fastest_seconds(problem: PartitionProblem) -> list[float]:
    """Seconds of every atom on the device that is fastest for it."""
    devices = list({(d.speed, tuple(sorted(d.speed_by_kind.items()))): d for d in problem.cluster.devices}.values())
    return [min(compute_seconds(group, device) for device in devices) for group in problem.atoms.layers]


def _links(problem: PartitionProblem) -> list[tuple[float, float]]:
    """(bandwidth, latency) of all pairs of devices, or of one pair where all are alike."""
    cluster = problem.cluster
    pairs = [(a, b) for a in range(cluster.num_devices) for b in range(a)]
    return [cluster.link(a, b) for a, b in (pairs[:1] if cluster.has_equal_links else pairs)]
