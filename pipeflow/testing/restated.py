"""A partition problem said otherwise: other names, all seconds twice as long, one more device.

What must come of that is the law of `check_partitioner`; here is only that nothing is forgotten which
names a layer or counts seconds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from pipeflow.graphs.costs import GraphCosts
from pipeflow.partitioners.cluster import Cluster
from pipeflow.partitioners.pins import Pins
from pipeflow.partitioners.problem import PartitionProblem
from pipeflow.values import Value


def copied(problem: PartitionProblem) -> PartitionProblem:
    """An equal problem that shares with this one neither costs nor what was derived from them."""
    return scaled(problem, 1)


def picture(problem: PartitionProblem) -> object:
    """All that a problem says and what is derived from it: equal before and after, if nobody changed anything."""
    costs, atoms = problem.costs, problem.atoms
    fields = (getattr(problem, field.name) for field in dataclasses.fields(problem))
    return (
        [value.canonical_json() if isinstance(value, Value) else repr(value) for value in fields],
        [list(getattr(costs, name)) for name in ("layer_by_name", "tensor_by_name")],
        [dict(getattr(costs, name)) for name in ("position_by_layer", "producer_by_tensor", "consumers_by_tensor")],
        list(costs.graph.nodes),
        [(a, b, dict(data)) for a, b, data in costs.graph.edges(data=True)],
        (atoms.members, atoms.edges, atoms.bound, atoms.nets, atoms.layers),
        [amounts.tolist() for amounts in (atoms.parameter_bytes, atoms.saved_bytes, atoms.replicable)],
    )


def renamed(problem: PartitionProblem) -> PartitionProblem:
    """The same problem with every name changed, and the alphabetical order of layers and devices turned round."""
    layers = problem.costs.layers
    names = {layer.name: f"n{len(layers) - i:03}" for i, layer in enumerate(layers)}
    cluster = problem.cluster
    devices = [d.model_copy(update={"name": f"d{cluster.num_devices - i:03}"}) for i, d in enumerate(cluster.devices)]
    return replace(
        problem,
        costs=_renamed_costs(problem.costs, names),
        cluster=Cluster(devices=tuple(devices), levels=cluster.levels, links=cluster.links),
        unordered=frozenset(names[name] for name in problem.unordered),
        together=tuple(tuple(names[name] for name in group) for group in problem.together),
        offload=frozenset(names[name] for name in problem.offload),
        pins=_renamed_pins(problem.pins, names),
    )


def _renamed_costs(costs: GraphCosts, names: Mapping[str, str]) -> GraphCosts:
    tensors = {tensor.name: f"in{len(costs.inputs) - i:03}" for i, tensor in enumerate(costs.inputs)}
    for layer in costs.layers:
        for k, tensor in enumerate(layer.outputs):
            tensors[tensor.name] = names[layer.name] + (f":{k}" if len(layer.outputs) > 1 else "")
    shared = {tensor.name: f"{names[tensor.layers[0]]}.shared{i}" for i, tensor in enumerate(costs.shared)}

    def each(known: Iterable[str], by: Mapping[str, str]) -> list[str]:
        return [by[name] for name in known]

    data: dict[str, Any] = costs.model_dump()
    for tensor in data["inputs"]:
        _rename_tensor(tensor, tensors)
    for layer in data["layers"]:
        layer["name"] = names[layer["name"]]
        layer["inputs"] = each(layer["inputs"], tensors)
        layer["kept_tensors"] = each(layer["kept_tensors"], tensors)
        for tensor in layer["outputs"]:
            _rename_tensor(tensor, tensors)
        for way in layer["variants"]:
            way["border_bytes"] = [(tensors[tensor], amount) for tensor, amount in way["border_bytes"]]
    data["colocated"] = [each(group, names) for group in data["colocated"]]
    for phase in data["phases"]:
        phase["layers"], phase["backward"] = each(phase["layers"], names), each(phase["backward"], names)
        phase["gradients"], phase["shared"] = (
            each(phase["gradients"], tensors),
            [shared.get(name, name) for name in phase["shared"]],
        )
        phase["parameter_bytes"] = {names[name]: amount for name, amount in phase["parameter_bytes"].items()}
    for tensor in data["shared"]:
        tensor["name"], tensor["layers"] = shared[tensor["name"]], each(tensor["layers"], names)
    return GraphCosts.model_validate(data)


def _rename_tensor(tensor: dict[str, Any], tensors: Mapping[str, str]) -> None:
    tensor["name"] = tensors[tensor["name"]]
    tensor["shared_with"] = tensors.get(tensor["shared_with"], "")


def _renamed_pins(pins: Pins, names: Mapping[str, str]) -> Pins:
    data = pins.model_dump()
    for pin in data["on"]:
        pin["layer"] = names[pin["layer"]]
    for kind in ("together", "apart", "no_cut"):
        data[kind] = [[names[n] for n in group] for group in data[kind]]
    return Pins.model_validate(data)


def scaled(problem: PartitionProblem, factor: int) -> PartitionProblem:
    """All seconds times `factor`: of layers and their variants, of links and hosts by bandwidth and latency."""
    costs, cluster = problem.costs.model_dump(), problem.cluster.model_dump()
    for layer in costs["layers"]:
        for key in ("forward_seconds", "backward_input_seconds", "backward_weight_seconds"):
            layer[key] *= factor
        for way in layer["variants"]:
            way["seconds"] *= factor
    for link in (*cluster["levels"], *cluster["links"]):
        link["latency"] *= factor
        if link["bandwidth"] is not None:
            link["bandwidth"] /= factor
    for device in cluster["devices"]:
        if device["host_bandwidth"] is not None:
            device["host_bandwidth"] /= factor
    return replace(problem, costs=GraphCosts.model_validate(costs), cluster=Cluster.model_validate(cluster))


def with_one_more_device(problem: PartitionProblem) -> PartitionProblem:
    """The same devices and links, and one more like the last; where levels are nested, one more outermost group.

    Whatever is a partition of the problem is one of this, and takes as long.
    """
    cluster = problem.cluster
    count = _outermost_group(cluster) if problem.nested else 1
    taken = {device.name for device in cluster.devices}
    fresh = (name for i in range(len(taken) + count) if (name := f"more{i}") not in taken)
    more = [cluster.devices[-1].model_copy(update={"name": next(fresh)}) for _ in range(count)]
    total, levels = cluster.num_devices + count, cluster.levels
    if levels and levels[-1].size < total:
        inner = levels[-2].size if len(levels) > 1 else 1
        levels = (*levels[:-1], levels[-1].model_copy(update={"size": math.ceil(total / inner) * inner}))
    return replace(problem, cluster=Cluster(devices=(*cluster.devices, *more), levels=levels, links=cluster.links))


def _outermost_group(cluster: Cluster) -> int:
    return cluster.levels[-2].size if len(cluster.levels) > 1 else 1
