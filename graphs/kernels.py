"""What is seen of a layer kernel by kernel, while it runs on tensors without data.

Fake kernels check less than real ones; what is known to slip through (mixed dtypes, running
statistics) is watched here, and whether random numbers are drawn, and from where.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipeflow.graphs.label_means import LABEL_OPS, SeenMean, seen_mean

# Fake kernels of these let dtypes pass that the real ones refuse.
_SAME_DTYPE_OPS = frozenset({"mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "convolution"})
_NORM_OPS = frozenset({"native_layer_norm", "native_batch_norm", "native_group_norm"})
# Batch-norm kernels update running statistics without saying so in their signature.
_BATCH_NORM_OPS = frozenset({"native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm"})


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's base is not annotated
    """Sees every kernel: random ones, running statistics, and dtypes that real kernels refuse.

    Attributes:
        is_random: whether random numbers were drawn.
        seeds: what torch's own generator was seeded by when they were.
        generators: others that they were drawn from.
        updated: running statistics that changed.
        label_means: what torch's means over labels were taken of.
        saves_by_hooks: whether something may be saved for backward through hooks, as in torch's checkpoint.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_random = False
        self.seeds: set[int] = set()
        self.generators: list[torch.Generator] = []
        self.updated: list[torch.Tensor] = []
        self.label_means: list[SeenMean] = []
        self.saves_by_hooks = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        op, kwargs = func._schema.name.removeprefix("aten::"), kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags and _draws(op, func._schema, args, kwargs):
            self._note_draw(args, kwargs)
        self.saves_by_hooks |= torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        if op.startswith("quantize_per_"):
            raise RuntimeError(
                f"{op} makes a quantized tensor, which autograd and transfers do not know; fake-quantize"
            )
        if op in _SAME_DTYPE_OPS or op in _NORM_OPS or op == "_prelu_kernel":
            _check_same_dtype(op, args)
        if op in LABEL_OPS:
            _check_target(args[1])
        if op in _BATCH_NORM_OPS and args[5]:
            self.updated += [t for t in args[3:5] if t is not None]
        result = func(*args, **kwargs)
        if op in LABEL_OPS and (mean := seen_mean(args, result)) is not None:
            self.label_means.append(mean)
        return result

    def _note_draw(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self.is_random = True
        self.seeds.add(torch.default_generator.initial_seed())
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Generator)]
        self.generators += [generator for generator in given if generator is not torch.default_generator]


def _draws(op: str, schema: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a kernel that may draw random numbers does: attention draws for its dropout alone, and in forward."""
    if op.endswith("attention_backward"):
        return False
    for position, argument in enumerate(schema.arguments):
        if argument.name == "dropout_p":
            given = args[position] if position < len(args) else kwargs.get(argument.name, argument.default_value)
            return bool(given)
    return True


def _check_same_dtype(op: str, args: tuple[Any, ...]) -> None:
    dtypes = list(dict.fromkeys(a.dtype for a in args if isinstance(a, torch.Tensor)))
    if op in _NORM_OPS and dtypes[0] in (torch.bfloat16, torch.float16) and dtypes[1:] == [torch.float32]:
        return  # half inputs with float32 statistics are ordinary
    if len(dtypes) > 1:
        raise RuntimeError(f"{op} takes tensors of one dtype, not {' and '.join(map(dtype_name, dtypes))}")


def _check_target(target: torch.Tensor) -> None:
    if target.dtype not in (torch.int64, torch.uint8):
        raise RuntimeError(f"class indices must be int64, not {dtype_name(target.dtype)}")


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
