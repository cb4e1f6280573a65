"""What an optimizer and its scheduler know of a stage's parameters, by the model's own names, and back.

Groups of parameters are a stage's own and another plan has others, so options are kept for each
parameter. They come back to the same classes alone: the state of one optimizer says nothing to
another.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from pipeflow.errors import CheckpointError
from pipeflow.runtime.manifest import Manifest, SavedScheduler, Trained
from pipeflow.runtime.meeting import plain_text
from pipeflow.runtime.optimizers import restore_scheduler
from pipeflow.runtime.replica import StageReplica, Training

_WEIGHTS_ALONE = (
    "give the engine what it was saved with; or, for the weights alone, load it into an engine without an optimizer "
    "and give that one's state_dict() to this one's load_state_dict"
)


def optimizer_key(phase: str | None) -> str:
    """What keys of a phase's optimizer begin with."""
    return "optimizer" if phase is None else f"optimizer@{phase}"


def optimizer_state(replica: StageReplica, training: Training) -> tuple[dict[str, Tensor], dict[str, Trained]]:
    """(tensors by `<parameter>.<key>`, how it was trained by parameter) of what a replica saves.

    Raises:
        CheckpointError: an option is nothing that JSON can hold.
    """
    tensors: dict[str, Tensor] = {}
    trained: dict[str, Trained] = {}
    if training.optimizer is None:
        return tensors, trained
    for group, names in _named_groups(replica, training.optimizer):
        options = {k: v for k, v in group.items() if k != "params"}
        for parameter, name in zip(group["params"], names, strict=True):
            if name in replica.borrowed:
                continue
            trained[name] = Trained(optimizer=type(training.optimizer).__name__, options=_plain(options))
            for key, value in training.optimizer.state.get(parameter, {}).items():
                if value is not None:
                    tensors[f"{name}.{key}"] = torch.as_tensor(value).detach()
    return tensors, trained


def scheduler_state(training: Training) -> SavedScheduler | None:
    """The scheduler's class and state, if there is one. Errors as `optimizer_state`."""
    if training.scheduler is None:
        return None
    return SavedScheduler(kind=_kind(training.scheduler), state=_plain(training.scheduler.state_dict()))


def training_settings(replicas: Iterable[StageReplica]) -> dict[str, str]:
    """What factories made, by name, for comparison between ranks: classes, and what optimizers go by."""
    settings = {}
    for replica in replicas:
        for phase, training in replica.training_by_phase.items():
            of_phase = "" if phase is None else f" of phase {phase!r}"
            if training.optimizer is None:
                continue
            settings[f"optimizer{of_phase}"] = type(training.optimizer).__name__
            settings |= {
                f"the optimizer's {k}{of_phase}": plain_text(v) for k, v in training.optimizer.defaults.items()
            }
            settings[f"lr_scheduler{of_phase}"] = "None" if training.scheduler is None else _kind(training.scheduler)
    return settings


def _kind(scheduler: Any) -> str:
    parts = getattr(scheduler, "_schedulers", [])
    return type(scheduler).__name__ + (f"({', '.join(map(_kind, parts))})" if parts else "")


def _named_groups(replica: StageReplica, optimizer: torch.optim.Optimizer) -> list[tuple[dict[str, Any], list[str]]]:
    """The optimizer's groups, with the names of their parameters."""
    name_by_id = {id(p): name for name, p in replica.parameters.items()}
    return [(group, [name_by_id[id(p)] for p in group["params"]]) for group in optimizer.param_groups]


def check_training(replica: StageReplica, phase: str | None, training: Training, manifest: Manifest) -> None:
    """Refuses a checkpoint that the replica could not go on from. One without an optimizer takes any.

    Raises:
        CheckpointError: another optimizer or scheduler was saved, or parameters of one group differ in an option.
    """
    if training.optimizer is None:
        return
    key, own = optimizer_key(phase), type(training.optimizer).__name__
    for _, names in _named_groups(replica, training.optimizer):
        records = {name: manifest.trained.get(f"{key}.{name}") for name in names}
        for name, record in records.items():
            if record is None or record.optimizer != own:
                saved = "no optimizer" if record is None else record.optimizer
                raise CheckpointError(
                    f"the checkpoint has {saved} for parameter {name!r}, and this engine {own}; {_WEIGHTS_ALONE}"
                )
        _check_options({name: record.options for name, record in records.items() if record is not None})
    scheduler = manifest.schedulers.get(key)
    was, is_now = scheduler and scheduler.kind, training.scheduler and _kind(training.scheduler)
    if was != is_now:
        raise CheckpointError(
            f"the checkpoint has {was or 'no scheduler'} for {key!r}, and this engine {is_now or 'none'}; "
            f"{_WEIGHTS_ALONE}"
        )


def _check_options(options_by_name: Mapping[str, Mapping[str, Any]]) -> None:
    """Parameters that are one group now have had the same options."""
    first, *others = options_by_name
    for name in others:
        for option in sorted({*options_by_name[first], *options_by_name[name]}):
            a, b = (options_by_name[n].get(option) for n in (first, name))
            if a != b:
                raise CheckpointError(
                    f"the checkpoint has {option}={a} for parameter {first!r} and {b} for {name!r}, which are of one "
                    "group in this engine's optimizer; give the engine the parameter_groups that it was saved with"
                )


def restore_training(
    replica: StageReplica, phase: str | None, training: Training, tensors: Mapping[str, Tensor], manifest: Manifest
) -> None:
    """Gives an optimizer and its scheduler their state back, which `check_training` let pass.

    Args:
        tensors: of the checkpoint, by key.
    """
    if training.optimizer is None:
        return
    key = optimizer_key(phase)
    state_by_name: dict[str, dict[str, Tensor]] = {}
    for full, value in tensors.items():
        if full.startswith(f"{key}."):
            name, _, entry = full.removeprefix(f"{key}.").rpartition(".")
            state_by_name.setdefault(name, {})[entry] = value
    packed = training.optimizer.state_dict()
    packed["state"] = {}
    for (_, names), record in zip(_named_groups(replica, training.optimizer), packed["param_groups"], strict=True):
        for name, index in zip(names, record["params"], strict=True):
            if name in state_by_name:
                # Copies: replicas of a stage are given the same tensors, and each changes its own.
                packed["state"][index] = {entry: value.clone() for entry, value in state_by_name[name].items()}
        saved = manifest.trained[f"{key}.{names[0]}"].options
        record |= {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()}
    training.optimizer.load_state_dict(packed)
    if training.scheduler is not None:
        restore_scheduler(training.scheduler, manifest.schedulers[key].state, training.optimizer)


def _plain(value: Any) -> Any:
    """The value as JSON can hold it."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise CheckpointError(
        f"optimizer or scheduler state holds a {type(value).__name__}, which JSON cannot hold; use one whose "
        "settings are numbers, text or tensors"
    )
