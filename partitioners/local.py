"""The devices of this machine, for `Cluster.local`.

Asks the operating system, and torch only where CUDA devices may be wanted. Nothing is measured.
"""

from __future__ import annotations

import os
from typing import Literal

from pipeflow.errors import ClusterError
from pipeflow.partitioners.cluster import Cluster, Device, Level

_PROCESS_BANDWIDTH = 2e9
"""Bytes per second between threads of one process: a tensor copied once, at a cautious memory speed."""

_PROCESS_LATENCY = 2e-4
"""Seconds for a waiting thread to wake up and run again on a busy machine."""

_CUDA_BANDWIDTH = 1.2e10
"""Bytes per second between two GPUs of one machine without a direct link, or a GPU and its host: PCIe 3, 16 lanes."""

_CUDA_LATENCY = 2e-5


def local_cluster(num_devices: int | None, kind: Literal["auto", "cpu", "cuda"]) -> Cluster:
    """What this machine has.

    Args:
        num_devices: how many to use; None for all. CPU devices beyond the cores share them.
        kind: "cpu" never loads torch; "auto" asks it for CUDA devices and falls back to the CPU.

    Raises:
        ClusterError: fewer than 1 device, or more CUDA devices than there are.
    """
    if num_devices is not None and num_devices < 1:
        raise ClusterError(f"a cluster of {num_devices} devices; it needs at least 1")
    if kind not in ("auto", "cpu", "cuda"):
        raise ClusterError(f"kind={kind!r}; it must be 'auto', 'cpu' or 'cuda'")
    if kind == "cpu":
        return _cpu_cluster(num_devices)
    found = _cuda_memories()
    wanted = num_devices or len(found)
    if kind == "auto" and (not found or wanted > len(found)):
        return _cpu_cluster(num_devices)
    if wanted > len(found) or not found:
        raise ClusterError(
            f"{num_devices or 1} CUDA devices are asked for, but this machine has {len(found)}; "
            "ask for fewer, or for kind='cpu'"
        )
    return Cluster(
        devices=tuple(
            Device(name=f"cuda:{i}", kind="cuda", memory_bytes=memory, host_bandwidth=_CUDA_BANDWIDTH)
            for i, memory in enumerate(found[:wanted])
        ),
        levels=(Level(size=wanted, bandwidth=_CUDA_BANDWIDTH, latency=_CUDA_LATENCY),),
    )


def _cuda_memories() -> list[int]:
    """Bytes of each CUDA device that torch can use."""
    import torch

    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]


def _cpu_cluster(num_devices: int | None) -> Cluster:
    """One device per core that this process may use, or `num_devices` that share them."""
    cores = _num_cores()
    count = num_devices or cores
    memory = _memory_bytes()
    return Cluster(
        devices=tuple(
            Device(
                name=f"cpu:{i}",
                kind="cpu",
                memory_bytes=None if memory is None else memory // count,
                speed=min(1.0, cores / count),
                host_bandwidth=_PROCESS_BANDWIDTH,
            )
            for i in range(count)
        ),
        levels=(Level(size=count, bandwidth=_PROCESS_BANDWIDTH, latency=_PROCESS_LATENCY),),
    )


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_bytes() -> int | None:
    """Physical memory, or None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
