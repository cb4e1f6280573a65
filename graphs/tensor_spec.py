"""What a tensor of a graph looks like: shape, dtype, whether gradients flow to it.

Knows nothing of torch: a spec is names and numbers, so planners can hold one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from pipeflow.errors import GraphError
from pipeflow.graphs.sizes import Dim, size_of

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

_NO_LENGTHS: Mapping[str, int] = MappingProxyType({})


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


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape, dtype and differentiability of one tensor.

    Attributes:
        shape: sizes; "B" or for example "4*B" where a size grows with the batch, and names where it
            depends on a length that differs between batches (see `pipeflow.graphs.sizes`).
        dtype: as torch names it, without "torch.".
        requires_grad: whether autograd records it when training.

    Raises:
        GraphError: a size or a dtype that there is not.
    """

    shape: tuple[Dim, ...]
    dtype: str = "float32"
    requires_grad: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(size_of(d).dim for d in self.shape))
        object.__setattr__(self, "dtype", normalise_dtype(self.dtype))

    @property
    def scales(self) -> bool:
        """Whether any size grows with the batch."""
        return any(size_of(d).batch for d in self.shape)

    @property
    def lengths(self) -> frozenset[str]:
        """Names of the lengths that any size depends on."""
        return frozenset(name for d in self.shape for name, _ in size_of(d).terms)

    def shape_at(self, samples: int, lengths: Mapping[str, int] = _NO_LENGTHS) -> tuple[int, ...]:
        """The sizes for a batch of `samples`.

        Args:
            lengths: a number for each of `self.lengths`.

        Raises:
            GraphError: a length is missing.
        """
        return tuple(size_of(d).at(samples, lengths) for d in self.shape)

    def numel_at(self, samples: int, lengths: Mapping[str, int] = _NO_LENGTHS) -> int:
        """The number of elements for a batch of `samples`."""
        return math.prod(self.shape_at(samples, lengths))

    def bytes_at(self, samples: int, lengths: Mapping[str, int] = _NO_LENGTHS) -> int:
        """The bytes for a batch of `samples`."""
        return self.numel_at(samples, lengths) * ITEMSIZE_BY_DTYPE[self.dtype]

    def with_gradient(self, requires_grad: bool) -> TensorSpec:
        """The same tensor, recorded by autograd or not."""
        return replace(self, requires_grad=requires_grad)

    @property
    def numel(self) -> int:
        """The number of elements of a tensor without a batch dimension.

        Raises:
            GraphError: the shape depends on the batch; ask `numel_at`.
        """
        if self.scales or self.lengths:
            raise GraphError(f"{self} has no fixed number of elements; ask numel_at(samples)")
        return self.numel_at(0)

    def __str__(self) -> str:
        comma = "," if len(self.shape) == 1 else ""
        return f"{self.dtype} ({', '.join(str(d) for d in self.shape)}{comma})"


def list_specs(specs: Sequence[TensorSpec]) -> str:
    """Specs as prose: "float32 (B, 8) and int64 (B,)"."""
    return " and ".join(str(spec) for spec in specs) or "nothing"
