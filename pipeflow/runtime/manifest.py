"""The manifest of a checkpoint: what is in its folder, as JSON that is checked before anything is unpickled.

torch's reader unpickles its index and takes flipped bits without a word. The manifest is JSON, has
a digest of itself and one of every file, and is compared with the files before that reader sees
them: a file that it does not list is not read. It protects from damage; it is not signed, so load
checkpoints only from where you trust.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal, Self

import torch
from pydantic import model_validator

from pipeflow.errors import CheckpointError
from pipeflow.values import Index, Value, as_value, read_json

NAME = "pipeflow.json"
FORMAT: Final = "pipeflow-checkpoint-3"
_INDEX = ".metadata"
_SCALE = frozenset({"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"})
"""What `torch.amp.GradScaler` saves."""


class SavedTensor(Value):
    """The shape and the dtype of a tensor, by torch's name of it."""

    shape: tuple[Index, ...]
    dtype: str

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise CheckpointError(f"{self.dtype!r} is no dtype of torch")
        return self


class Trained(Value):
    """How a parameter was trained: the class of the optimizer, and what its group says."""

    optimizer: str
    options: dict[str, Any]


class SavedScheduler(Value):
    """A scheduler by its class, those that it is made of in brackets, and its state."""

    kind: str
    state: dict[str, Any]


class Manifest(Value):
    """What a checkpoint holds.

    Attributes:
        graph: digest of the layer graph.
        step, calls, loss_scale: as `pipeflow.runtime.checkpoint.Progress`.
        tensors: by key.
        trained: parameters that have an optimizer, by `optimizer.<layer>.<name>`.
        schedulers: by `optimizer` or `optimizer@<phase>`.
        files: SHA-256 of every file besides this one.
        sha256: of all of the above.
    """

    format: Literal["pipeflow-checkpoint-3"] = FORMAT
    graph: str
    step: Index
    calls: Index
    loss_scale: dict[str, int | float] | None
    tensors: dict[str, SavedTensor]
    trained: dict[str, Trained]
    schedulers: dict[str, SavedScheduler]
    files: dict[str, str]
    sha256: str = ""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.loss_scale is not None and self.loss_scale.keys() != _SCALE:
            raise CheckpointError(f"loss_scale has {sorted(self.loss_scale)}; it needs {sorted(_SCALE)}")
        return self

    @property
    def seal(self) -> str:
        """What `sha256` must be."""
        return self.model_copy(update={"sha256": ""}).digest


def file_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in the folder, by name."""
    return {file.name: _sha256(file) for file in sorted(folder.iterdir())}


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Seals the manifest, and writes it so that it is there whole or not at all."""
    sealed = manifest.model_copy(update={"sha256": manifest.seal})
    part = (folder / NAME).with_suffix(".part")
    part.write_text(sealed.model_dump_json(indent=1) + "\n")
    part.replace(folder / NAME)


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """The manifest of a folder whose files are what it says.

    Raises:
        CheckpointError: the folder is no checkpoint or not a whole one, or something in it was altered.
    """
    folder, file = Path(path), Path(path) / NAME
    if not folder.is_dir():
        what = "a file" if folder.exists() else "not there"
        raise CheckpointError(f"{folder} is {what}; give the folder that `Engine.save` wrote")
    if not file.is_file():
        raise CheckpointError(f"{folder} has no {NAME}; it is no checkpoint, or was not finished")
    what = "the manifest of a checkpoint"
    document = read_json(file, what=what, error=CheckpointError)
    form = document.get("format") if isinstance(document, dict) else None
    if form != FORMAT:
        raise CheckpointError(
            f"{file} is of format {form!r}, not of format {FORMAT!r}; load it with the version of pipeflow that wrote "
            "it, and save the weights with torch"
        )
    manifest = as_value(Manifest, document, file, what=what, error=CheckpointError)
    if manifest.sha256 != manifest.seal:
        raise CheckpointError(f"{file} was altered since the checkpoint was written; restore it from a copy")
    _check_files(folder, manifest.files)
    return manifest


def _check_files(folder: Path, digest_by_name: Mapping[str, str]) -> None:
    """Every file that torch's reader may open is listed, and every listed one is as it was."""
    if _INDEX not in digest_by_name:
        raise CheckpointError(f"the manifest of {folder} does not list {_INDEX}; the checkpoint is not whole")
    for file in sorted(folder.iterdir()):
        if file.name not in digest_by_name and (file.name == _INDEX or file.suffix == ".distcp"):
            raise CheckpointError(f"{file} is not in the manifest, so nobody knows whose it is; take it away")
    for name, digest in digest_by_name.items():
        file = folder / name
        if Path(name).name != name:
            raise CheckpointError(f"the manifest of {folder} lists {name!r}, which is not a file of the folder")
        if not file.is_file():
            raise CheckpointError(f"{file} is missing; the checkpoint is not whole")
        if _sha256(file) != digest:
            raise CheckpointError(f"{file} was altered since the checkpoint was written; restore it from a copy")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
