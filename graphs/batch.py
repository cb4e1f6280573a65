"""Whether a batch is what the graph's inputs say, and how large it is."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from pipeflow.errors import BatchError
from pipeflow.graphs.sizes import Length
from pipeflow.graphs.tensor_spec import TensorSpec


@dataclass(frozen=True, slots=True)
class Extent:
    """How large a batch is.

    Attributes:
        samples: the batch dimension; None where no tensor given has one.
        lengths: by name, those that the tensors given have.
    """

    samples: int | None
    lengths: Mapping[str, int]


def check_batch(
    inputs: Mapping[str, TensorSpec],
    batch: Mapping[str, torch.Tensor],
    *,
    required: Collection[str] | None = None,
    lengths: Mapping[str, Length] | None = None,
) -> int:
    """The number of samples of a batch that fits.

    Args:
        inputs: of the graph.
        batch: tensors by input name.
        required: the inputs that must be there; by default all. Others may be, on the meta device too.
        lengths: limits of those that inputs name.

    Raises:
        BatchError: a key is missing or unknown, or a tensor has another dtype, shape or number of samples.
    """
    samples = measure_batch(inputs, batch, required=required, lengths=lengths).samples
    if not samples:
        raise BatchError("the batch has no samples; it needs at least 1")
    return samples


def measure_batch(
    inputs: Mapping[str, TensorSpec],
    batch: Mapping[str, torch.Tensor],
    *,
    required: Collection[str] | None = None,
    lengths: Mapping[str, Length] | None = None,
) -> Extent:
    """How large a batch is that fits; it may have no samples. Arguments and errors as `check_batch`."""
    needed = [name for name in inputs if required is None or name in required]
    if missing := [name for name in needed if name not in batch]:
        raise BatchError(f"the batch lacks {missing[0]!r}; it needs {', '.join(needed)}")
    if unknown := [name for name in batch if name not in inputs]:
        raise BatchError(f"the batch has {unknown[0]!r}, which is no input; the inputs are {', '.join(inputs)}")
    seen: dict[str, dict[str, int]] = {}
    for name, tensor in batch.items():
        _check_tensor(name, inputs[name], tensor)
        for dim, size in zip(inputs[name].shape, tensor.shape, strict=True):
            if isinstance(dim, str):
                seen.setdefault(dim, {})[name] = size
    if meta := [name for name in needed if batch[name].is_meta]:
        raise BatchError(f"{meta[0]!r} of the batch is on the meta device, but it is read here; give it with its data")
    sizes = {dim: _agree(dim, size_by_input) for dim, size_by_input in seen.items()}
    samples = sizes.pop("B", None)
    for name, size in sizes.items():
        if lengths is not None and samples != 0 and not lengths[name].allows(size):
            raise BatchError(f"the length {name!r} is {size} in the batch; the graph says {lengths[name]}")
    return Extent(samples, sizes)


def _check_tensor(name: str, spec: TensorSpec, tensor: Any) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise BatchError(f"{name!r} of the batch is a {type(tensor).__name__}; it must be a tensor, {spec}")
    shape, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
    if tensor.layout is not torch.strided or type(tensor) is not torch.Tensor:
        kind = tensor.layout if type(tensor) is torch.Tensor else type(tensor).__name__
        raise BatchError(
            f"{name!r} of the batch is a {kind} tensor; it must be a plain one: give .to_dense() of a sparse tensor, "
            ".as_subclass(torch.Tensor) of a subclass's"
        )
    if tensor.requires_grad:
        raise BatchError(
            f"{name!r} of the batch requires grad, but no gradient comes back to a batch; give .detach() of it, or "
            "make what gives it a layer"
        )
    sizes_fit = len(shape) == len(spec.shape) and not any(
        size != dim for size, dim in zip(shape, spec.shape, strict=True) if isinstance(dim, int)
    )
    if not sizes_fit or dtype != spec.dtype:
        remedy = f": convert it with .to(torch.{spec.dtype})" if sizes_fit else ""
        raise BatchError(f"{name!r} of the batch is {dtype} {shape}; it must be {spec}{remedy}")


def _agree(dim: str, size_by_input: Mapping[str, int]) -> int:
    if len(set(size_by_input.values())) > 1:
        counts = ", ".join(f"{name!r} has {n}" for name, n in size_by_input.items())
        what = "numbers of samples" if dim == "B" else f"lengths {dim!r}"
        raise BatchError(f"the batch has different {what}: {counts}; they must be equal")
    return next(iter(size_by_input.values()))
