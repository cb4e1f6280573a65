"""Which torch device each rank computes on."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from pipeflow.errors import EngineError
from pipeflow.execution_plan import Plan


def resolve_devices(
    plan: Plan, devices: Sequence[torch.device | str] | None, *, distributed: bool
) -> tuple[torch.device, ...]:
    """A torch device for each rank: one process per GPU under `torchrun`, else as the cluster names them.

    Args:
        devices: what the user says, one for each rank; None for the cluster's.
        distributed: whether each rank is a process of its own.

    Raises:
        EngineError: another number of devices than ranks, or a GPU that the machine has not.
    """
    if devices is not None:
        if len(devices) != plan.num_ranks:
            raise EngineError(f"{len(devices)} devices for {plan.num_ranks} ranks; give one for each")
        return tuple(torch.device(d) for d in devices)
    resolved = []
    for rank in range(plan.num_ranks):
        if plan.cluster.devices[rank].kind != "cuda":
            resolved.append(torch.device("cpu"))
            continue
        count = torch.cuda.device_count()
        if not count or (rank >= count and not distributed):
            raise EngineError(
                f"rank {rank} is on {plan.cluster.devices[rank].name!r} and this machine has {count} CUDA devices; "
                "plan for the devices there are, or pass devices="
            )
        local = int(os.environ.get("LOCAL_RANK", rank)) if distributed else rank
        resolved.append(torch.device("cuda", local % count))
    return tuple(resolved)
