"""Checkpoints through `torch.distributed.checkpoint`, checked before anything is unpickled.

State is keyed by the model's own names, so any plan for the same graph can load it:

    model.<layer>.<name>              parameters and persistent buffers
    optimizer.<layer>.<name>.<key>    an optimizer's tensors and numbers for a parameter;
                                      optimizer@<phase>. of a phase's own

A manifest beside them lists the SHA-256 of every file, every key with its shape and dtype, and
what is no tensor: the step, each parameter's hyper-parameters (learning rate, ...), schedulers,
the scale of losses.
torch's reader unpickles its index and takes flipped bits without a word; the manifest is JSON,
and is compared with the files before the reader sees them. It protects from damage; it is not
signed, so load checkpoints only from where you trust.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from pipeflow.errors import CheckpointError
from pipeflow.graphs.layer_graph import LayerGraph
from pipeflow.runtime.distributed import gather_texts
from pipeflow.runtime.optimizers import restore_scheduler
from pipeflow.runtime.replica import StageReplica, Training
from pipeflow.runtime.state import copy_into

_MANIFEST = "pipeflow.json"
_FORMAT = "pipeflow-checkpoint-2"


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a training is.

    Attributes:
        step: optimizer steps taken.
        calls: training calls taken, which random layers are keyed by.
        loss_scale: the state of the scale of losses; None without.
    """

    step: int = 0
    calls: int = 0
    loss_scale: Mapping[str, Any] | None = None


def save(path: str | os.PathLike[str], graph: LayerGraph, replicas: Sequence[StageReplica], progress: Progress) -> None:
    """Writes a checkpoint. Collective where a process group is up.

    Args:
        path: a folder, new or empty, that all ranks reach.
        replicas: the stages that this process saves; over all processes, each stage once.
        progress: how far the training is.

    Raises:
        CheckpointError: the folder holds something already.
    """
    folder = Path(path)
    first = not dist.is_initialized() or dist.get_rank() == 0
    problem = (
        f"{folder} is not empty; save to a new folder" if first and folder.exists() and any(folder.iterdir()) else ""
    )
    if problem := next(filter(None, gather_texts(problem)), ""):
        raise CheckpointError(problem)
    tensors: dict[str, Tensor] = {}
    settings: dict[str, Any] = {}
    schedulers: dict[str, Any] = {}
    for replica in replicas:
        tensors |= {f"model.{n}": t.detach() for n, t in replica.tensors().items() if n not in replica.borrowed}
        for phase, training in replica.training_by_phase.items():
            moments, hyper = _optimizer_state(replica, training)
            tensors |= {f"{_optimizer_key(phase)}.{name}": t for name, t in moments.items()}
            settings |= {f"{_optimizer_key(phase)}.{name}": options for name, options in hyper.items()}
            if training.scheduler is not None:
                schedulers.setdefault(_optimizer_key(phase), _plain(training.scheduler.state_dict()))
    with _quiet():
        save_tensors(dict(tensors), checkpoint_id=folder, no_dist=not dist.is_initialized())
    mine = {
        "tensors": {n: [list(t.shape), str(t.dtype).removeprefix("torch.")] for n, t in tensors.items()},
        "hyper": settings,
        "schedulers": schedulers,
    }
    parts = [json.loads(text) for text in gather_texts(json.dumps(mine))]
    if first:
        manifest = {
            "format": _FORMAT,
            "graph": graph.digest,
            "step": progress.step,
            "calls": progress.calls,
            "loss_scale": progress.loss_scale,
            "tensors": {k: v for part in parts for k, v in part["tensors"].items()},
            "hyper": {k: v for part in parts for k, v in part["hyper"].items()},
            "schedulers": {k: v for part in reversed(parts) for k, v in part["schedulers"].items()},
            "files": {f.name: _digest(f) for f in sorted(folder.iterdir())},
        }
        _write_last(folder / _MANIFEST, json.dumps(manifest, indent=1, sort_keys=True))
    gather_texts("")  # nobody returns before the manifest is there


def load(path: str | os.PathLike[str], graph: LayerGraph, replicas: Iterable[StageReplica]) -> Progress:
    """Reads a checkpoint into stages, whatever plan it was written under.

    Args:
        path: the folder.
        replicas: all stages that this process holds.

    Returns:
        How far the training was when it was written.

    Raises:
        CheckpointError: the folder is no checkpoint, a file is missing or altered, or the
            checkpoint is of another model.
    """
    folder = Path(path)
    manifest = _read_manifest(folder)
    if manifest["graph"] != graph.digest:
        raise CheckpointError(
            f"{folder} is a checkpoint of graph {manifest['graph'][:12]}, this graph is {graph.digest[:12]}; "
            "build the graph it was saved from"
        )
    held = list(replicas)
    names = {name for replica in held for name in replica.tensors()}
    wanted = {
        key: torch.empty(shape, dtype=getattr(torch, dtype))
        for key, (shape, dtype) in manifest["tensors"].items()
        if _parameter_of(key, names) is not None
    }
    with _quiet():
        load_tensors(wanted, checkpoint_id=folder, no_dist=not dist.is_initialized())
    model = {k.removeprefix("model."): v for k, v in wanted.items() if k.startswith("model.")}
    for replica in held:
        own = replica.tensors()
        copy_into(own, {name: model[name] for name in own if name in model}, own.keys())
        replica.written()
        for phase, training in replica.training_by_phase.items():
            start = f"{_optimizer_key(phase)}."
            moments = {k.removeprefix(start): v for k, v in wanted.items() if k.startswith(start)}
            hyper = {k.removeprefix(start): v for k, v in manifest["hyper"].items() if k.startswith(start)}
            _restore_optimizer(replica, training, moments, hyper)
            saved = manifest["schedulers"].get(_optimizer_key(phase))
            if saved is not None and training.scheduler is not None and training.optimizer is not None:
                restore_scheduler(training.scheduler, saved, training.optimizer)
    return Progress(int(manifest["step"]), int(manifest["calls"]), manifest.get("loss_scale"))


def _optimizer_key(phase: str | None) -> str:
    return "optimizer" if phase is None else f"optimizer@{phase}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's remark that there is no process group, where there is none on purpose."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


def _parameter_of(key: str, names: Iterable[str]) -> str | None:
    """The parameter or buffer that a checkpoint key belongs to, if it is one of `names`."""
    kind, _, rest = key.partition(".")
    if kind == "model":
        return rest if rest in names else None
    name = rest.rpartition(".")[0]
    return name if name in names else None


def _optimizer_state(replica: StageReplica, training: Training) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors by `<parameter>.<key>`, hyper-parameters by parameter) of a replica's optimizer."""
    if training.optimizer is None:
        return {}, {}
    name_by_id = {id(p): name for name, p in replica.parameters.items()}
    tensors: dict[str, Tensor] = {}
    hyper: dict[str, Any] = {}
    for group in training.optimizer.param_groups:
        options = {k: v for k, v in group.items() if k != "params"}
        for parameter in group["params"]:
            name = name_by_id[id(parameter)]
            if name in replica.borrowed:
                continue
            hyper[name] = _plain(options)
            for key, value in training.optimizer.state.get(parameter, {}).items():
                if value is not None:
                    tensors[f"{name}.{key}"] = torch.as_tensor(value).detach()
    return tensors, hyper


def _restore_optimizer(
    replica: StageReplica, training: Training, moments: Mapping[str, Tensor], hyper: Mapping[str, Any]
) -> None:
    """Gives an optimizer its state back, through its own `load_state_dict`."""
    if training.optimizer is None:
        return
    name_by_id = {id(p): name for name, p in replica.parameters.items()}
    packed = training.optimizer.state_dict()
    keys_by_name: dict[str, dict[str, Tensor]] = {}
    for full, value in moments.items():
        name, _, key = full.rpartition(".")
        keys_by_name.setdefault(name, {})[key] = value
    packed["state"] = {}
    for group, record in zip(training.optimizer.param_groups, packed["param_groups"], strict=True):
        names = [name_by_id[id(p)] for p in group["params"]]
        for name, index in zip(names, record["params"], strict=True):
            if name in keys_by_name:
                # Copies: replicas of a stage are given the same tensors, and each changes its own.
                packed["state"][index] = {key: value.clone() for key, value in keys_by_name[name].items()}
        if saved := hyper.get(names[0]):
            record |= {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()}
    training.optimizer.load_state_dict(packed)


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


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write_last(file: Path, text: str) -> None:
    """Writes the file so that it is there whole or not at all."""
    part = file.with_suffix(".part")
    part.write_text(text)
    part.replace(file)


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {_MANIFEST}; it is no checkpoint, or was not finished") from None
    except ValueError as error:
        raise CheckpointError(f"{folder / _MANIFEST} is not JSON ({error}); it is damaged") from None
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise CheckpointError(f"{folder / _MANIFEST} is not of format {_FORMAT!r}")
    for name, digest in manifest["files"].items():
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing; the checkpoint is not whole")
        if _digest(file) != digest:
            raise CheckpointError(f"{file} was altered since the checkpoint was written; restore it from a copy")
    return manifest
