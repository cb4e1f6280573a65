"""What a tensor of a graph looks like: shape, dtype, whether gradients flow to it.

Knows nothing of torch: a spec is names and numbers, so planners can hold one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from pipeflow.errors import GraphError

Dim = int | str
"""A size: a number, "B" for the batch, or a multiple of it such as "4*B"."""

ITEMSIZE_BY_DTYPE = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "uint16": 2,
    "int16": 2,
    "float16": 2,
    "bfloat16": 2,
    "uint32": 4,
    "int32": 4,
    "float32": 4,
    "uint64": 8,
    "int64": 8,
    "float64": 8,
    "complex64": 8,
    "complex128": 16,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
}
"""Bytes of one element, for every dtype that a graph may carry."""

_MULTIPLE = re.compile(r"(\d+)\s*\*?\s*B")


def normalise_dtype(dtype: object) -> str:
    """The name of a dtype given as text or as a torch dtype.

    >>> normalise_dtype("torch.float32")
    'float32'

    Raises:
        GraphError: no graph can carry that dtype.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in ITEMSIZE_BY_DTYPE:
        known = ", ".join(ITEMSIZE_BY_DTYPE)
        raise GraphError(f"{dtype!r} is not a dtype that a graph can carry; give one of {known}")
    return name


def _normalise_dim(dim: object) -> Dim:
    if isinstance(dim, int) and not isinstance(dim, bool) and dim >= 0:
        return dim
    if dim == "B":
        return "B"
    if isinstance(dim, str) and (match := _MULTIPLE.fullmatch(dim.strip())) and int(match[1]) > 0:
        return "B" if int(match[1]) == 1 else f"{int(match[1])}*B"
    raise GraphError(f'{dim!r} is not a size; give a number of at least 0, "B" for the batch, or for example "4*B"')


def _size(dim: Dim, samples: int) -> int:
    if isinstance(dim, int):
        return dim
    return samples * int(dim.removesuffix("*B")) if dim != "B" else samples


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape, dtype and differentiability of one tensor.

    Attributes:
        shape: sizes; "B" or for example "4*B" where a size grows with the batch.
        dtype: as torch names it, without "torch.".
        requires_grad: whether autograd records it when training.

    Raises:
        GraphError: a size or a dtype that there is not.
    """

    shape: tuple[Dim, ...]
    dtype: str = "float32"
    requires_grad: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(_normalise_dim(d) for d in self.shape))
        object.__setattr__(self, "dtype", normalise_dtype(self.dtype))

    @property
    def scales(self) -> bool:
        """Whether any size grows with the batch."""
        return any(isinstance(d, str) for d in self.shape)

    def shape_at(self, samples: int) -> tuple[int, ...]:
        """The sizes for a batch of `samples`."""
        return tuple(_size(d, samples) for d in self.shape)

    def numel_at(self, samples: int) -> int:
        """The number of elements for a batch of `samples`."""
        return math.prod(self.shape_at(samples))

    def bytes_at(self, samples: int) -> int:
        """The bytes for a batch of `samples`."""
        return self.numel_at(samples) * ITEMSIZE_BY_DTYPE[self.dtype]

    @property
    def numel(self) -> int:
        """The number of elements of a tensor without a batch dimension.

        Raises:
            GraphError: the shape depends on the batch; ask `numel_at`.
        """
        if self.scales:
            raise GraphError(f"{self} has no fixed number of elements; ask numel_at(samples)")
        return self.numel_at(0)

    def __str__(self) -> str:
        comma = "," if len(self.shape) == 1 else ""
        return f"{self.dtype} ({', '.join(str(d) for d in self.shape)}{comma})"


def list_specs(specs: Sequence[TensorSpec]) -> str:
    """Specs as prose: "float32 (B, 8) and int64 (B,)"."""
    return " and ".join(str(spec) for spec in specs) or "nothing"
