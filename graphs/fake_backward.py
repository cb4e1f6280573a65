"""One backward of a layer on tensors without data, and what is seen on the way.

A backward may do more than give gradients: torch's checkpoint runs forward again in it, and a
function of one's own may do anything. What would not train alike in every layout is refused here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pipeflow.errors import GraphError
from pipeflow.graphs.kernels import Watch


@dataclass(frozen=True, slots=True)
class Backward:
    """What one backward did.

    Attributes:
        strided_gradients: positions of inputs whose gradients are not contiguous though those of the
            outputs are. All that could have one, where backward does not run without data.
        withholds: whether it gave no gradient for an input that needs one; or may, where it does not run
            without data.
        draws: whether it drew random numbers, other than again those of forward.
        mutated: names of buffers that it changed.
    """

    strided_gradients: frozenset[int] = frozenset()
    withholds: bool = False
    draws: bool = False
    mutated: tuple[str, ...] = ()


def is_straight(tensor: Tensor) -> bool:
    """Whether the memory of a tensor holds its numbers in order, and not their conjugates or negatives."""
    return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def run_backward(
    module: nn.Module, mode: FakeTensorMode, inputs: Sequence[Tensor], outputs: Sequence[Tensor], *, by_hooks: bool
) -> Backward:
    """Goes back from the outputs of a layer.

    That is as far as its inputs, where nothing but gradients can come of it; else to its parameters too.

    Args:
        module: of the layer, for its parameters and buffers.
        mode: of its tensors.
        inputs, outputs: of its forward.
        by_hooks: whether forward saved anything through hooks, as in torch's checkpoint.
    """
    learned = [i for i, t in enumerate(inputs) if t.requires_grad]
    roots = [t for t in outputs if t.requires_grad]
    thorough = by_hooks or _calls_back(roots)
    if not roots or not (learned or thorough):
        return Backward()
    given: set[int] = set()
    strided: set[int] = set()
    for i in learned:
        inputs[i].register_hook(_noting(i, given, strided))  # type: ignore[no-untyped-call]
    before = {name: buffer._version for name, buffer in module.named_buffers()}
    # What forward drew, checkpoints draw again, from generators as they were seeded before.
    seed = torch.default_generator.initial_seed() + 1
    torch.default_generator.manual_seed(seed)
    with mode, Watch() as watch:
        try:
            ones = [torch.ones(t.shape, dtype=t.dtype, device=t.device) for t in roots]
            if thorough:
                torch.autograd.backward(roots, ones)
            else:
                torch.autograd.grad(roots, [inputs[i] for i in learned], ones, allow_unused=True)
        except Exception:  # whatever a backward may need that is not here
            strided.update(learned)
    module.zero_grad()
    updated = {id(t) for t in watch.updated}
    mutated = (n for n, b in module.named_buffers() if b._version != before.get(n) or id(b) in updated)
    return Backward(frozenset(strided), given != set(learned), seed in watch.seeds, tuple(mutated))


def _noting(position: int, given: set[int], strided: set[int]) -> Callable[[Tensor | None], None]:
    def note(gradient: Tensor | None) -> None:
        if gradient is None:
            return
        given.add(position)
        if not is_straight(gradient):
            strided.add(position)

    return note


def _calls_back(roots: Sequence[Tensor]) -> bool:
    """Whether a function in Python is on the way back from tensors, which may do anything."""
    seen: set[Any] = set()
    pending: list[Any] = [t.grad_fn for t in roots]
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            if isinstance(node, torch.autograd.function.BackwardCFunction):
                return True
            seen.add(node)
            pending += [following for following, _ in node.next_functions]
    return False


def check_backward(who: str, backward: Backward) -> None:
    """Refuses a layer whose backward does more than give gradients.

    Args:
        who: the layer, for errors.
        backward: what was seen of it.

    Raises:
        GraphError: names what it does and the remedy.
    """
    if backward.mutated:
        raise GraphError(
            f"{who} changes its buffer {backward.mutated[0]!r} in backward too, as a norm within torch's checkpoint, "
            "which sees everything twice: leave the checkpoint out, and let the plan recompute the layer (recompute=)"
        )
    if backward.draws:
        raise GraphError(
            f"{who} draws random numbers in backward, where they would differ from layout to layout: draw in forward "
            "and save what was drawn; torch's checkpoint draws as forward did unless preserve_rng_state=False"
        )
