"""Which torch device each rank computes on."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist

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
        EngineError: another number of devices than ranks, what is no device, or a GPU that the machine has not.
    """
    if devices is not None:
        if isinstance(devices, str | torch.device):
            raise EngineError(f"devices={devices!r}; give a list, one device for each of {plan.num_ranks} ranks")
        if len(devices) != plan.num_ranks:
            raise EngineError(f"{len(devices)} devices for {plan.num_ranks} ranks; give one for each")
        return tuple(_device(d) for d in devices)
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


def _device(given: torch.device | str) -> torch.device:
    try:
        return torch.device(given)
    except (RuntimeError, TypeError) as error:
        raise EngineError(f"{given!r} among devices= is no device of torch: {error}") from None


def check_present(devices: Sequence[torch.device], *, distributed: bool) -> None:
    """Whether this machine has the devices, and tensors on them have data; those of other processes are theirs.

    Raises:
        EngineError: one of them is not there.
    """
    for device in dict.fromkeys([devices[dist.get_rank()]] if distributed else devices):
        try:
            torch.empty(1, device=device).tolist()
        except (RuntimeError, AssertionError, NotImplementedError) as error:  # a torch without CUDA asserts it
            why = str(error).splitlines()[0]
            raise EngineError(
                f"{str(device)!r} among devices= is not there: {why}; name devices that this machine has "
                f"({torch.cuda.device_count()} CUDA devices)"
            ) from None
