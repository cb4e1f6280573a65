"""What published planners' own costs say of a partition, recomputed from their files: no code of pipeflow.

They are written from the papers' formulas to be read, and raise ValueError where a partition breaks
a rule. `pipedream_best` is PipeDream's recurrence over all ideals of a small graph.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import groupby
from typing import NamedTuple

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
