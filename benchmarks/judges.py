"""What published planners' own costs say of a partition, recomputed from their files: no code of pipeflow.

They are written from the papers' formulas to be read, and raise ValueError where a partition breaks
a rule. `pipedream_best` is PipeDream's recurrence over all ideals of a small graph.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import combinations, groupby, product
from typing import Any, NamedTuple

_FIELDS = ("forward_compute_time", "backward_compute_time", "activation_size", "parameter_size")


class PipeDream(NamedTuple):
    """A profile: seconds, activation bytes and parameter bytes of its nodes but inputs; its edges."""

    seconds: dict[str, float]
    activation: dict[str, float]
    parameters: dict[str, float]
    edges: list[tuple[str, str]]

    @classmethod
    def parse(cls, text: str) -> PipeDream:
        profile = cls({}, {}, {}, [])
        inputs = set(re.findall(r"^(\S+) -- Input", text, flags=re.MULTILINE))
        for name, rest in re.findall(r"^(\S+) -- (.*)$", text, flags=re.MULTILINE):
            if name in inputs:
                continue
            value = {k: v.strip("[]").split(";") for k, v in re.findall(r"(\w+)=(\[.*?\]|[^,\s]+)", rest)}
            total = {k: sum(map(float, value[k])) for k in _FIELDS}
            profile.seconds[name] = (total["forward_compute_time"] + total["backward_compute_time"]) / 1000
            profile.activation[name], profile.parameters[name] = total["activation_size"], total["parameter_size"]
        pairs = re.findall(r"^\s+(\S+) -- (\S+)\s*$", text, flags=re.MULTILINE)
        profile.edges.extend((a, b) for a, b in pairs if a not in inputs)
        return profile

    def passing(self, before: frozenset[str]) -> float:
        """Activation bytes that leave a set of nodes, each node's once."""
        return sum(self.activation[a] for a in {a for a, b in self.edges if a in before and b not in before})


def pipedream_seconds(
    text: str,
    stages: Sequence[Sequence[str]],
    devices: Sequence[Sequence[int]],
    *,
    machines: Sequence[int],
    bandwidths: Sequence[float],
    transfers: bool = False,
    memory: float | None = None,
) -> float:
    """The bottleneck of a partition under PipeDream's cost.

    Args:
        stages: nodes of each stage; inputs are on none.
        devices: of each stage, numbered so that a machine's are consecutive.
        machines, bandwidths: of each level, innermost first.
        transfers: whether they count.
        memory: of a device, for one level.
    """
    profile = PipeDream.parse(text)
    place = {node: index for index, stage in enumerate(stages) for node in stage}
    if place.keys() != profile.seconds.keys() or sum(map(len, stages)) != len(place):
        raise ValueError("not every node is on exactly one stage")
    if any(place[a] > place[b] for a, b in profile.edges):
        raise ValueError("an edge leads to an earlier stage")
    if len({d for group in devices for d in group}) != sum(map(len, devices)):
        raise ValueError("a device is on two stages")
    cuts = [profile.passing(frozenset(n for n, s in place.items() if s < cut)) for cut in range(len(stages) + 1)]
    if memory is not None:
        for index, stage in enumerate(stages):
            later = sum(len(group) for group in devices[index + 1 :])
            held = sum(profile.activation[n] + profile.parameters[n] for n in stage)
            if -(-later // len(devices[index])) * held > memory:
                raise ValueError(f"stage {index} stashes more than fits")

    def chain(level: int, among: Sequence[int], first: int) -> float:
        """The longest of the stages of a level within the group of devices that begins with `first`."""
        if level < 0:
            return sum(profile.seconds[n] for n in stages[among[0]])
        inner = 1
        for count in machines[:level]:
            inner *= count
        mine = range(first, first + inner * machines[level])
        result, seen = 0.0, set[int]()
        for number, (on, group) in enumerate(
            groupby(among, key=lambda i: tuple(sorted({d // inner for d in devices[i] if d in mine})))
        ):
            members, r = list(group), len(on)
            if seen & set(on) or (level == 0 and len(members) > 1):
                raise ValueError(f"stages {members} are not nested")
            seen |= set(on)
            parameters = sum(profile.parameters[n] for i in members for n in stages[i])
            reduction = 4 * (r - 1) * parameters / (bandwidths[level] * r)
            if number == 0 and level:
                reduction /= machines[level - 1]
            inside = max(chain(level - 1, members, g * inner) for g in on)
            seconds = (inside + reduction) / r
            if transfers and number:
                passing = max(cuts[members[0]], cuts[members[-1] + 1])
                seconds = max(seconds, 2 * passing / (bandwidths[level] * r))
            result = max(result, seconds)
        return result

    return chain(len(machines) - 1, range(len(stages)), 0)


def pipedream_best(
    text: str, *, machines: Sequence[int], bandwidths: Sequence[float], transfers: bool = False, replicas: bool = True
) -> float:
    """The least bottleneck of any partition on at most all machines, by PipeDream's recurrence over all ideals."""
    profile = PipeDream.parse(text)
    needs = {n: {a for a, b in profile.edges if b == n} for n in profile.seconds}

    def larger(ideal: frozenset[str], end: frozenset[str]) -> Iterator[frozenset[str]]:
        found, fresh = {ideal}, [ideal]
        while fresh:
            now = fresh.pop()
            for node in end - now:
                if needs[node] <= now and (grown := now | {node}) not in found:
                    found.add(grown)
                    fresh.append(grown)
        yield from sorted(found - {ideal}, key=sorted)

    @cache
    def best(level: int, start: frozenset[str], end: frozenset[str], count: int) -> float:
        if level < 0:
            return sum(profile.seconds[n] for n in end - start)
        options = [stage(level, start, end, r, first=True) for r in range(1, count + 1)]
        for middle in larger(start, end):
            for r in range(1, count) if middle != end else ():
                options.append(max(best(level, start, middle, count - r), stage(level, middle, end, r, first=False)))
        return min(options)

    @cache
    def stage(level: int, start: frozenset[str], end: frozenset[str], r: int, *, first: bool) -> float:
        if r > 1 and not replicas:
            return float("inf")
        reduction = 4 * (r - 1) * sum(profile.parameters[n] for n in end - start) / (bandwidths[level] * r)
        if first and level:
            reduction /= machines[level - 1]
        inside = best(level - 1, start, end, machines[level - 1] if level else 1)
        seconds = (inside + reduction) / r
        if transfers and not first:
            seconds = max(seconds, *(2 * profile.passing(cut) / (bandwidths[level] * r) for cut in (start, end)))
        return seconds

    return best(len(machines) - 1, frozenset(), frozenset(profile.seconds), machines[-1])


def piper_seconds(
    workload: dict[str, Any],
    stages: Sequence[Sequence[int]],
    replicas: Sequence[int],
    degrees: Sequence[int],
    ways: Sequence[Sequence[str]],
    *,
    devices: int,
    memory: float,
    bandwidth: float,
) -> float:
    """Seconds per sample of a partition under Piper's cost (its paper, section 3).

    Args:
        workload: the file.
        stages: ids of the nodes of each stage.
        replicas, degrees: data and tensor parallelism of each stage.
        ways: the id of the alternative of each node of each stage.
        devices, memory, bandwidth: what there is.
    """
    nodes = {n["id"]: n for n in workload["nodes"]}
    place = {node: index for index, stage in enumerate(stages) for node in stage}
    if place.keys() != nodes.keys() or sum(map(len, stages)) != len(nodes):
        raise ValueError("not every node is on exactly one stage")
    if any(place[e["sourceId"]] > place[e["destId"]] for e in workload["edges"]):
        raise ValueError("an edge leads to an earlier stage")
    if sum(d * t for d, t in zip(replicas, degrees, strict=True)) > devices:
        raise ValueError("more devices are used than there are")
    if uneven := [d for d in replicas if workload["mbsInBatch"] % d]:
        raise ValueError(f"{uneven[0]} replicas do not share the batch evenly")
    worst = 0.0
    for index, stage in enumerate(stages):
        d, in_flight = replicas[index], -(-sum(replicas[index:]) // replicas[index])
        seconds = held = 0.0
        for node, way in zip(stage, ways[index], strict=True):
            own = next(a for a in nodes[node]["TMPCs"][str(degrees[index])] if a["id"] == way)
            moved = 0.0
            for edge in workload["edges"]:
                source, target, cost = edge["sourceId"], edge["destId"], edge["communicationCost"]
                if target == node and place[source] != index:
                    moved += 2 * (cost + own["syncTimeFw"].get(str(source), 0))
                if source == node and place[target] != index:
                    moved += 2 * (cost + own["syncTimeBw"].get(str(target), 0))
            moved += 4 * (d - 1) * own["parameterSize"] / workload["mbsInBatch"]
            seconds += (own["timePerSample"] + moved / bandwidth) / d
            held += own["memoryUsageA"] * in_flight + own["memoryUsageB"]
        if held > memory:
            raise ValueError(f"stage {index} holds {held} bytes of {memory}")
        worst = max(worst, seconds)
    return worst


def piper_best(workload: dict[str, Any], *, devices: int, memory: float, bandwidth: float) -> float:
    """The least seconds per sample of any partition of a small workload: every cut, every way; inf if none fits."""
    nodes = [n["id"] for n in workload["nodes"]]
    table = {n["id"]: n["TMPCs"] for n in workload["nodes"]}
    needs = {n: {e["sourceId"] for e in workload["edges"] if e["destId"] == n} for n in nodes}
    best = float("inf")

    def extend(done: frozenset[int], stages: list[list[int]], left: int) -> None:
        if len(done) == len(nodes):
            price(stages)
            return
        rest = [n for n in nodes if n not in done]
        for size in range(1, len(rest) + 1) if left else ():
            for group in combinations(rest, size):
                if all(needs[n] <= done | set(group) for n in group):
                    extend(done | set(group), [*stages, list(group)], left - 1)

    def price(stages: list[list[int]]) -> None:
        nonlocal best
        rules: dict[str, Any] = {"devices": devices, "memory": memory, "bandwidth": bandwidth}
        for shape in product(*(options(stage) for stage in stages)):
            replicas, degrees = [d for d, _, _ in shape], [t for _, t, _ in shape]
            if sum(d * t for d, t, _ in shape) <= devices:
                try:
                    ways = [w for _, _, w in shape]
                    best = min(best, piper_seconds(workload, stages, replicas, degrees, ways, **rules))
                except ValueError:
                    continue

    def options(stage: list[int]) -> list[tuple[int, int, tuple[str, ...]]]:
        result = []
        for t in {int(key) for n in stage for key in table[n]}:
            if all(str(t) in table[n] for n in stage):
                for way in product(*([a["id"] for a in table[n][str(t)]] for n in stage)):
                    result += [(d, t, way) for d in range(1, devices // t + 1) if workload["mbsInBatch"] % d == 0]
        return result

    extend(frozenset(), [], devices)
    return best
