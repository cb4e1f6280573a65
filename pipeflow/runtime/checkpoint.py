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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from pipeflow.errors import CheckpointError
from pipeflow.graphs.layer_graph import LayerGraph
from pipeflow.runtime.manifest import Manifest, file_digests, read_manifest, write_manifest
from pipeflow.runtime.meeting import Meeting, by_text, together
from pipeflow.runtime.optimizer_state import (
    check_training,
    optimizer_key,
    optimizer_state,
    restore_training,
    scheduler_state,
)
from pipeflow.runtime.replica import StageReplica
from pipeflow.runtime.state import copy_into
from pipeflow.runtime.transport import Aborted


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


def save(
    path: str | os.PathLike[str],
    graph: LayerGraph,
    replicas: Sequence[StageReplica],
    progress: Progress,
    meeting: Meeting | None = None,
) -> None:
    """Writes a checkpoint. Collective where there is a meeting.

    Args:
        path: a folder, new or empty, that all ranks reach.
        replicas: the stages that this process saves; over all processes, each stage once.
        progress: how far the training is.
        meeting: of all ranks; None where there is one process.

    Raises:
        CheckpointError: the folder holds something already or cannot be written, or an optimizer's state is
            nothing that can be saved; here or on another rank.
    """
    folder = Path(path)
    first = meeting is None or meeting.rank == 0

    def collect() -> _Part:
        if first:
            _check_new(folder)
        return _collect(replicas)

    def write() -> None:
        with _torch_errors(f"{folder} cannot be written", is_shared=meeting is not None):
            tensors = dict(part.tensors)
            save_tensors(tensors, checkpoint_id=folder, process_group=_group(meeting), no_dist=meeting is None)

    what = f"save to {folder}"
    part = together(meeting, what, collect, CheckpointError)
    write()  # torch's writer agrees by itself; the group is at an end where it could not
    entries = json.dumps(part.entries)
    parts = [json.loads(text) for text in ([entries] if meeting is None else meeting.hear(entries))]

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

    together(meeting, what, conclude, CheckpointError)  # nobody returns before the manifest is there


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


def load(
    path: str | os.PathLike[str],
    graph: LayerGraph,
    replicas: Iterable[StageReplica],
    meeting: Meeting | None = None,
) -> Progress:
    """Reads a checkpoint into stages, whatever plan it was written under. Collective as `save`.

    Args:
        path: the folder.
        replicas: all stages that this process holds.
        meeting: of all ranks; None where there is one process.

    Returns:
        How far the training was when it was written.

    Raises:
        CheckpointError: the folder is no checkpoint, a file is missing or altered, or the checkpoint
            is of another model, optimizer or scheduler. Nothing has changed then, on any rank.
        Exception: an optimizer or scheduler of the user's did not take its state. That is half-way.
    """
    folder, held = Path(path), list(replicas)
    what = f"load {folder}"
    manifest = together(meeting, what, lambda: _check(read_manifest(folder), folder, graph, held), CheckpointError)
    if meeting is not None:
        _check_one(meeting, folder, manifest)
    names = {name for replica in held for name in replica.tensors()}
    tensors = _read(folder, manifest, names, meeting)  # torch's reader agrees, as its writer does
    model = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}

    def take() -> None:
        for replica in held:
            copy_into(replica.tensors(), model)
            replica.written()
            for phase, training in replica.training_by_phase.items():
                restore_training(replica, phase, training, tensors, manifest)

    together(meeting, what, take)
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


def _check_one(meeting: Meeting, folder: Path, manifest: Manifest) -> None:
    """Whether all ranks are about to load the same checkpoint: each may have a folder of its own."""
    seals = dict(enumerate(meeting.hear(manifest.sha256)))
    if len(set(seals.values())) > 1:
        listing = ", ".join(f"{seal[:12]} on {ranks}" for seal, ranks in by_text(seals))
        raise CheckpointError(
            f"the ranks are given different checkpoints, {listing}, here in {folder}; give all the same, or copies"
        )


def _read(folder: Path, manifest: Manifest, names: Iterable[str], meeting: Meeting | None) -> dict[str, Tensor]:
    """The checkpoint's tensors for the parameters and buffers of these names, by key."""
    with _torch_errors(f"{folder} cannot be read", is_shared=meeting is not None):
        wanted = {
            key: torch.empty(saved.shape, dtype=getattr(torch, saved.dtype))
            for key, saved in manifest.tensors.items()
            if _parameter_of(key, names) is not None
        }
        load_tensors(wanted, checkpoint_id=folder, process_group=_group(meeting), no_dist=meeting is None)
    return wanted


def _parameter_of(key: str, names: Iterable[str]) -> str | None:
    """The parameter or buffer that a checkpoint key belongs to, if it is one of `names`."""
    kind, _, rest = key.partition(".")
    if kind == "model":
        return rest if rest in names else None
    name = rest.rpartition(".")[0]
    return name if name in names else None


def _group(meeting: Meeting | None) -> Any:
    """The group over which torch's reader and writer agree."""
    return None if meeting is None else meeting.group


@contextmanager
def _torch_errors(what: str, *, is_shared: bool) -> Iterator[None]:
    """What torch's reader and writer raise, as CheckpointError; between ranks, only what all of them raise.

    Else a rank has left torch's messages half-way, and cannot say so over the same group.

    Without torch's remark that there is no process group, where there is none on purpose.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
            yield
    except CheckpointException as error:  # raised on every rank alike
        problems = {rank: f"{type(e).__name__}: {e}" for rank, (e, _) in error.failures.items()}
        on = "{text}" if len(problems) == 1 and not is_shared else "{text} (on {ranks})"
        listing = "; ".join(on.format(text=text, ranks=ranks) for text, ranks in by_text(problems))
        raise CheckpointError(f"{what}: {listing}") from error
    except Exception as error:
        if is_shared and isinstance(error, RuntimeError):
            raise Aborted(str(error)) from error
        if is_shared:
            raise
        raise CheckpointError(f"{what}: {type(error).__name__}: {error}") from error
