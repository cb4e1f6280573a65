"""Whether a batch is what the graph's inputs say."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from pipeflow.errors import BatchError
from pipeflow.graphs.tensor_spec import TensorSpec


def check_batch(
    inputs: Mapping[str, TensorSpec], batch: Mapping[str, torch.Tensor], *, required: Collection[str] | None = None
) -> int:
    """The number of samples of a batch that fits.

    Args:
        inputs: of the graph.
        batch: tensors by input name.
        required: the inputs that must be there; by default all. Others may be.

    Raises:
        BatchError: a key is missing or unknown, or a tensor has another dtype, shape or number of samples.
    """
    needed = [name for name in inputs if required is None or name in required]
    if missing := [name for name in needed if name not in batch]:
        raise BatchError(f"the batch lacks {missing[0]!r}; it needs {', '.join(needed)}")
    if unknown := [name for name in batch if name not in inputs]:
        raise BatchError(f"the batch has {unknown[0]!r}, which is no input; the inputs are {', '.join(inputs)}")
    samples: dict[str, int] = {}
    for name, tensor in batch.items():
        spec = inputs[name]
        if not isinstance(tensor, torch.Tensor):
            raise BatchError(f"{name!r} of the batch is a {type(tensor).__name__}; it must be a tensor, {spec}")
        seen = f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
        if tensor.dim() != len(spec.shape) or tuple(tensor.shape[1:]) != spec.shape[1:]:
            raise BatchError(f"{name!r} of the batch is {seen}; it must be {spec}")
        if str(tensor.dtype).removeprefix("torch.") != spec.dtype:
            raise BatchError(
                f"{name!r} of the batch is {seen}; it must be {spec}: convert it with .to(torch.{spec.dtype})"
            )
        samples[name] = tensor.shape[0]
    if len(set(samples.values())) > 1:
        counts = ", ".join(f"{name!r} has {n}" for name, n in samples.items())
        raise BatchError(f"the batch has different numbers of samples: {counts}; they must be equal")
    count = next(iter(samples.values()), 0)
    if count < 1:
        raise BatchError("the batch has no samples; it needs at least 1")
    return count
