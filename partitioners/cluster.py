"""The devices there are and the links between them, as planners see them.

Nothing here measures or talks to a device except `Cluster.local`, which asks the machine
what it has, and only then.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from pipeflow.errors import ClusterError
from pipeflow.units import parse_bytes
from pipeflow.values import Bytes, Count, Index, Seconds, Value, read_value, told, write_text


def _amount(value: object) -> object:
    """An amount of bytes that is written as text, as a number; everything else as it is."""
    return parse_bytes(value) if isinstance(value, str) else value


Memory = Annotated[Bytes | None, BeforeValidator(_amount)]
"""Bytes, in a file also as text such as "16GiB"; None for no limit."""

Bandwidth = Annotated[Annotated[float, Field(gt=0, allow_inf_nan=False)] | None, BeforeValidator(_amount)]
"""Bytes per second, in a file also as text such as "10GB"; None for no limit."""


class Device(Value):
    """One device.

    Attributes:
        name: for people, for example "cuda:0".
        kind: "cpu", "cuda" or any other word.
        memory_bytes: what a stage may fill; None for no limit.
        speed: how many times faster than the device the costs were measured on.
        speed_by_kind: the same for layers of one kind, where it differs.
        host_bandwidth: bytes per second between the device and its host's memory, each way; None for no
            limit. Offloaded activations pass there.
    """

    name: str
    kind: str = "cpu"
    memory_bytes: Memory = None
    speed: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    speed_by_kind: Mapping[str, float] = Field(default_factory=dict)
    host_bandwidth: Bandwidth = None


class Level(Value):
    """A level of the network: groups of `size` consecutive devices joined by like links.

    Attributes:
        size: devices in one group; the outermost level holds all of them.
        bandwidth: bytes per second of one device's link, each way; None for no limit.
        latency: seconds before the first byte.
    """

    size: Count
    bandwidth: Bandwidth = None
    latency: Seconds = 0.0


class Link(Value):
    """One pair of devices joined otherwise than by its level, both ways."""

    a: Index
    b: Index
    bandwidth: Bandwidth = None
    latency: Seconds = 0.0


class Cluster(Value):
    """Devices, numbered from 0 as ranks are, and what joins them.

    Attributes:
        devices: in rank order.
        levels: innermost first (a node, a rack, the whole), sizes growing, each dividing the next.
        links: pairs that differ from their level.

    Raises:
        ClusterError: no device or two of one name, levels that do not nest or do not span all, a link to
            nowhere, or two unlike links of one pair.
    """

    format: Literal["pipeflow-cluster-1"] = "pipeflow-cluster-1"
    devices: tuple[Device, ...]
    levels: tuple[Level, ...] = ()
    links: tuple[Link, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.devices:
            raise ClusterError("a cluster of 0 devices; it needs at least 1")
        names = [device.name for device in self.devices]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ClusterError(f"{names.count(twice)} devices are named {twice!r}; give each a name of its own")
        for inner, outer in zip(self.levels, self.levels[1:], strict=False):
            if outer.size <= inner.size or outer.size % inner.size:
                raise ClusterError(
                    f"levels of {inner.size} and {outer.size} devices do not nest; each size must be a larger "
                    "multiple of the one before"
                )
        if self.levels and self.levels[-1].size < len(self.devices):
            raise ClusterError(
                f"the outermost level spans {self.levels[-1].size} of {len(self.devices)} devices; it must span all"
            )
        for link in self.links:
            if max(link.a, link.b) >= len(self.devices) or link.a == link.b:
                raise ClusterError(f"link {link.a}-{link.b} does not join two of {len(self.devices)} devices")
            other = self._links[link.a, link.b]
            if (other.bandwidth, other.latency) != (link.bandwidth, link.latency):
                raise ClusterError(
                    f"devices {link.a} and {link.b} are linked twice, with bandwidths {other.bandwidth} and "
                    f"{link.bandwidth} and latencies {other.latency} and {link.latency}; a link is both ways: leave "
                    "one of them out"
                )
        return self

    @classmethod
    def uniform(
        cls,
        num_devices: int,
        device: Device | None = None,
        *,
        memory_bytes: int | None = None,
        bandwidth: float | None = None,
        latency: float = 0.0,
    ) -> Cluster:
        """`num_devices` equal devices, all joined by equal links.

        Args:
            device: the device to repeat; by default one of speed 1.
            memory_bytes: overrides the device's.
            bandwidth: bytes per second; None for free transfers.
            latency: seconds.

        Raises:
            ClusterError: an amount that is none, or no device.
        """
        if num_devices < 1:
            raise ClusterError(f"a cluster of {num_devices} devices; it needs at least 1")
        model = device or Device(name="device")
        try:
            if memory_bytes is not None:
                model = Device(**{**dict(model), "memory_bytes": memory_bytes})
            level = Level(size=num_devices, bandwidth=bandwidth, latency=latency)
        except ValidationError as error:
            raise ClusterError(f"a uniform cluster with {told(error)}") from error
        return cls(
            devices=tuple(model.model_copy(update={"name": f"{model.name}:{i}"}) for i in range(num_devices)),
            levels=(level,),
        )

    @classmethod
    def local(cls, num_devices: int | None = None, *, kind: Literal["auto", "cpu", "cuda"] = "auto") -> Cluster:
        """What this machine has: its CUDA devices, else its CPU cores as one device each.

        Args:
            num_devices: how many to use; CPU devices beyond the cores share them and are slower.
            kind: "auto" prefers CUDA.

        Raises:
            ClusterError: more CUDA devices are asked for than there are.
        """
        from pipeflow.partitioners.local import local_cluster

        return local_cluster(num_devices, kind)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Cluster:
        """Reads a cluster that `save` wrote, or that was written by hand: amounts as 16GiB, if one likes.

        Raises:
            ClusterError: the file is not a cluster; the message names the key.
        """
        return read_value(cls, path, what="a cluster", error=ClusterError)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the cluster as JSON.

        Raises:
            ClusterError: the file cannot be written.
        """
        write_text(path, self.model_dump_json(indent=1) + "\n", error=ClusterError)

    @property
    def num_devices(self) -> int:
        return len(self.devices)

    @cached_property
    def _links(self) -> Mapping[tuple[int, int], Link]:
        return {pair: link for link in self.links for pair in ((link.a, link.b), (link.b, link.a))}

    def link(self, a: int, b: int) -> tuple[float, float]:
        """(bandwidth in bytes per second, latency in seconds) from device `a` to `b`.

        A device reaches itself for nothing: (inf, 0).
        """
        if a == b:
            return math.inf, 0.0
        if special := self._links.get((a, b)):
            return special.bandwidth or math.inf, special.latency
        for level in self.levels:
            if a // level.size == b // level.size:
                return level.bandwidth or math.inf, level.latency
        return math.inf, 0.0

    def transfer_seconds(self, amount: float, a: int, b: int) -> float:
        """Seconds to move `amount` bytes from device `a` to `b`."""
        bandwidth, latency = self.link(a, b)
        return latency + amount / bandwidth if a != b else 0.0

    @cached_property
    def has_equal_links(self) -> bool:
        """Whether all pairs of devices are joined by like links."""
        return len(self.levels) <= 1 and not self.links

    @cached_property
    def is_uniform(self) -> bool:
        """Whether all devices and all links are alike (names apart)."""
        first = self.devices[0]
        return self.has_equal_links and all(d.model_copy(update={"name": first.name}) == first for d in self.devices)
