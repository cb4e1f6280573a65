"""Checkpoints through `torch.distributed.checkpoint`, checked before anything is unpickled.

State is keyed by the model's own names, so any plan for the same graph can load it:

    model.<layer>.<name>              parameters and persistent buffers
    optimizer.<layer>.<name>.<key>    an optimizer's tensors and numbers for a parameter;
                                      optimizer@<phase>. of a phase's own

A manifest beside them (`pipeflow.runtime.manifest`) lists the SHA-256 of every file, every key
with its shape and dtype, and what is no tensor: the step, each parameter's optimizer and its
options (learning rate, ...), schedulers, the scale of losses. A checkpoint is loaded whole or not
at all: all ranks find that it fits what they hold before one of them changes anything.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from pipeflow.errors import CheckpointError
from pipeflow.graphs.layer_graph import LayerGraph
from pipeflow.runtime.distributed import gather_texts
from pipeflow.runtime.manifest import Manifest, file_digests, read_manifest, write_manifest
from pipeflow.runtime.optimizer_state import (
    check_training,
    optimizer_key,
    optimizer_state,
    restore_training,
    scheduler_state,
)
from pipeflow.runtime.replica import StageReplica
from pipeflow.runtime.state import copy_into

_T = TypeVar("_T")


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


@dataclass(frozen=True, slots=True)
class _Part:
    """What one process saves: tensors by key, and the manifest's entries for them."""

    tensors: dict[str, Tensor]
    entries: dict[str, dict[str, Any]]


def save(path: str | os.PathLike[str], graph: LayerGraph, replicas: Sequence[StageReplica], progress: Progress) -> None:
    """Writes a checkpoint. Collective where a process group is up.

    Args:
        path: a folder, new or empty, that all ranks reach.
        replicas: the stages that this process saves; over all processes, each stage once.
        progress: how far the training is.

    Raises:
        CheckpointError: the folder holds something already or cannot be written, or an optimizer's state is
            nothing that can be saved.
    """
    folder = Path(path)
    first = not dist.is_initialized() or dist.get_rank() == 0

    def collect() -> _Part:
        if first:
            _check_new(folder)
        return _collect(replicas)

    def write() -> None:
        with _torch_errors(f"{folder} cannot be written"):
            save_tensors(dict(part.tensors), checkpoint_id=folder, no_dist=not dist.is_initialized())

    part = _together(collect)
    _together(write)
    parts = [json.loads(text) for text in gather_texts(json.dumps(part.entries))]

    def conclude() -> None:
        if first:
            # The first rank's word counts where several have an entry.
            merged = {kind: {k: v for p in reversed(parts) for k, v in p[kind].items()} for kind in part.entries}
            entries = {
                "graph": graph.digest,
                "step": progress.step,
                "calls": progress.calls,
                "loss_scale": progress.loss_scale,
                "files": file_digests(folder),
            }
            write_manifest(folder, Manifest.model_validate(entries | merged))

    _together(conclude)  # nobody returns before the manifest is there


def _check_new(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; save to a new folder")
    if folder.exists() and any(folder.iterdir()):
        raise CheckpointError(f"{folder} is not empty; save to a new folder")


def _collect(replicas: Iterable[StageReplica]) -> _Part:
    tensors: dict[str, Tensor] = {}
    trained: dict[str, Any] = {}
    schedulers: dict[str, Any] = {}
    for replica in replicas:
        tensors |= {f"model.{n}": t.detach() for n, t in replica.tensors().items() if n not in replica.borrowed}
        for phase, training in replica.training_by_phase.items():
            key = optimizer_key(phase)
            moments, records = optimizer_state(replica, training)
            tensors |= {f"{key}.{name}": t for name, t in moments.items()}
            trained |= {f"{key}.{name}": record.model_dump() for name, record in records.items()}
            if scheduler := scheduler_state(training):
                schedulers.setdefault(key, scheduler.model_dump())
    saved = {n: {"shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch.")} for n, t in tensors.items()}
    return _Part(tensors, {"tensors": saved, "trained": trained, "schedulers": schedulers})


def load(path: str | os.PathLike[str], graph: LayerGraph, replicas: Iterable[StageReplica]) -> Progress:
    """Reads a checkpoint into stages, whatever plan it was written under. Collective as `save`.

    Args:
        path: the folder.
        replicas: all stages that this process holds.

    Returns:
        How far the training was when it was written.

    Raises:
        CheckpointError: the folder is no checkpoint, a file is missing or altered, or the checkpoint
            is of another model, optimizer or scheduler. Nothing has changed then, on any rank.
    """
    folder, held = Path(path), list(replicas)
    manifest = _together(lambda: _check(read_manifest(folder), folder, graph, held))
    names = {name for replica in held for name in replica.tensors()}
    tensors = _together(lambda: _read(folder, manifest, names))
    model = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    for replica in held:
        copy_into(replica.tensors(), model)
        replica.written()
        for phase, training in replica.training_by_phase.items():
            restore_training(replica, phase, training, tensors, manifest)
    return Progress(manifest.step, manifest.calls, manifest.loss_scale)


def _check(manifest: Manifest, folder: Path, graph: LayerGraph, replicas: Iterable[StageReplica]) -> Manifest:
    """The manifest itself, if what it lists is what the replicas hold."""
    if manifest.graph != graph.digest:
        raise CheckpointError(
            f"{folder} is a checkpoint of graph {manifest.graph[:12]}, this graph is {graph.digest[:12]}; "
            "build the graph it was saved from"
        )
    for replica in replicas:
        for name, tensor in replica.tensors().items():
            saved = manifest.tensors.get(f"model.{name}")
            own = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
            if saved is None or (saved.shape, saved.dtype) != own:
                there = "not there" if saved is None else f"{saved.dtype} of {saved.shape}"
                raise CheckpointError(
                    f"{name!r} is {there} in {folder}, and {own[1]} of {own[0]} in the model; build the graph and "
                    "give the precision it was saved with"
                )
        for phase, training in replica.training_by_phase.items():
            check_training(replica, phase, training, manifest)
    return manifest


def _read(folder: Path, manifest: Manifest, names: Iterable[str]) -> dict[str, Tensor]:
    """The checkpoint's tensors for the parameters and buffers of these names, by key."""
    with _torch_errors(f"{folder} cannot be read"):
        wanted = {
            key: torch.empty(saved.shape, dtype=getattr(torch, saved.dtype))
            for key, saved in manifest.tensors.items()
            if _parameter_of(key, names) is not None
        }
        load_tensors(wanted, checkpoint_id=folder, no_dist=not dist.is_initialized())
    return wanted


def _parameter_of(key: str, names: Iterable[str]) -> str | None:
    """The parameter or buffer that a checkpoint key belongs to, if it is one of `names`."""
    kind, _, rest = key.partition(".")
    if kind == "model":
        return rest if rest in names else None
    name = rest.rpartition(".")[0]
    return name if name in names else None


def _together(work: Callable[[], _T]) -> _T:
    """What the work gives, once it is done on every rank.

    Raises:
        CheckpointError: it failed on one of them; then it has on all, so that none waits for another.
    """
    cause, problem = None, ""
    try:
        result = work()
    except Exception as error:
        cause, problem = error, str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
    if problem := next(filter(None, gather_texts(problem)), ""):
        raise CheckpointError(problem) from cause
    return result


@contextmanager
def _torch_errors(what: str) -> Iterator[None]:
    """What torch's reader and writer raise, as CheckpointError.

    Without torch's remark that there is no process group, where there is none on purpose.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
            yield
    except (CheckpointException, Exception) as error:  # the first is no Exception
        raise CheckpointError(f"{what}: {type(error).__name__}: {error}") from error
