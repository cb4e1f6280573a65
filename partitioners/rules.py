"""The rules of a problem one by one, and the smallest sets of them that leave no partition.

A problem without rules always has a partition: all layers on one device. So where there is none,
some rules contradict each other, and a set from which none can be left out tells why. What counts
as proof that a problem has no partition is the caller's to say; nothing here searches for cuts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

from pipeflow.errors import Rule
from pipeflow.partitioners.cluster import Cluster
from pipeflow.partitioners.problem import PartitionProblem
from pipeflow.units import format_bytes

_T = TypeVar("_T")


def rules_of(problem: PartitionProblem) -> tuple[Rule, ...]:
    """Everything without which the problem could only be easier."""
    return tuple(_rules(problem))


def _rules(problem: PartitionProblem) -> Iterator[Rule]:
    pins = problem.pins
    for i, pin in enumerate(pins.on):
        devices = () if pin.device is None else (pin.device,)
        yield Rule("pin", i, str(pin), layers=(pin.layer,), devices=devices)
    for i, group in enumerate(pins.together):
        yield Rule("together", i, f"layers {_names(group)} are to be together", layers=group)
    for i, group in enumerate(pins.apart):
        yield Rule("apart", i, f"layers {_names(group)} are to be apart", layers=group)
    for i, edge in enumerate(pins.no_cut):
        yield Rule("no_cut", i, f"the edge from {edge[0]!r} to {edge[1]!r} is not to be cut", layers=edge)
    if pins.max_layers is not None:
        yield Rule("max_layers", 0, f"a stage has at most {pins.max_layers} of {len(problem.costs.layers)} layers")
    for i, group in enumerate(problem.costs.colocated):
        yield Rule("colocated", i, f"layers {_names(group)} must share a stage", layers=group)
    if problem.replicas is not None:
        yield Rule("replicas", 0, f"stages are to have {problem.replicas} replicas")
    elif problem.num_stages is not None:
        yield Rule("num_stages", 0, f"there are to be {problem.num_stages} stages")
    if problem.max_stages is not None:
        yield Rule("max_stages", 0, f"there are to be at most {problem.max_stages} stages")
    if problem.max_replicas is not None:
        yield Rule("max_replicas", 0, f"a stage has at most {problem.max_replicas} replicas")
    for i, layer in enumerate(problem.costs.layers):
        if not layer.replicable:
            yield Rule("not_replicable", i, f"layer {layer.name!r} cannot be replicated", layers=(layer.name,))
    for i, device in enumerate(problem.cluster.devices):
        if device.memory_bytes is not None:
            text = f"device {i} ({device.name}) holds {format_bytes(device.memory_bytes * problem.unit_bytes)}"
            yield Rule("memory", i, text, devices=(i,))


def _names(names: Sequence[str]) -> str:
    return " and ".join(map(repr, names)) if len(names) < 3 else ", ".join(map(repr, names))


def held_to(problem: PartitionProblem, rules: Collection[Rule]) -> PartitionProblem:
    """The problem with these of its rules and no others."""
    kept = {(rule.kind, rule.index) for rule in rules}

    def some(kind: str, values: Sequence[_T]) -> tuple[_T, ...]:
        return tuple(value for i, value in enumerate(values) if (kind, i) in kept)

    pins, costs, cluster = problem.pins, problem.costs, problem.cluster
    devices = [
        d if ("memory", i) in kept else d.model_copy(update={"memory_bytes": None})
        for i, d in enumerate(cluster.devices)
    ]
    layers = [
        c if c.replicable or ("not_replicable", i) in kept else c.model_copy(update={"replicable": True})
        for i, c in enumerate(costs.layers)
    ]
    return replace(
        problem,
        costs=costs.model_copy(update={"layers": tuple(layers), "colocated": some("colocated", costs.colocated)}),
        cluster=Cluster(devices=tuple(devices), levels=cluster.levels, links=cluster.links),
        pins=pins.model_copy(
            update={
                "on": some("pin", pins.on),
                "together": some("together", pins.together),
                "apart": some("apart", pins.apart),
                "no_cut": some("no_cut", pins.no_cut),
                "max_layers": pins.max_layers if ("max_layers", 0) in kept else None,
            }
        ),
        num_stages=problem.num_stages if ("num_stages", 0) in kept else None,
        max_stages=problem.max_stages if ("max_stages", 0) in kept else None,
        replicas=problem.replicas if ("replicas", 0) in kept else None,
        max_replicas=problem.max_replicas if ("max_replicas", 0) in kept else None,
    )


def smallest_contradiction(
    problem: PartitionProblem, is_impossible: Callable[[PartitionProblem], bool]
) -> tuple[Rule, ...]:
    """Rules of the problem that leave no partition, none of which can be left out.

    Divides and conquers as QuickXplain does (Junker, AAAI 2004): about k log(n / k) proofs for k of
    n rules.

    Args:
        is_impossible: a proof that a problem has no partition; it must hold of `problem`, and where
            it holds with some rules, also with more.
    """

    def smallest(background: tuple[Rule, ...], grew: bool, candidates: tuple[Rule, ...]) -> tuple[Rule, ...]:
        if grew and is_impossible(held_to(problem, background)):
            return ()
        if len(candidates) == 1:
            return candidates
        half = len(candidates) // 2
        first, second = candidates[:half], candidates[half:]
        of_second = smallest((*background, *first), True, second)
        of_first = smallest((*background, *of_second), bool(of_second), first)
        return (*of_first, *of_second)

    rules = rules_of(problem)
    return smallest((), False, rules) if rules else ()
