"""What one layer allocates forward and backward, and what it keeps in between.

A layer is run once by itself, as a stage runs it: its outputs are packed where they are views,
and its gradients are added to those that are there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from pipeflow.graphs.layer import Layer
from pipeflow.graphs.live_bytes import Meter, meter, tensor_bytes


@dataclass(frozen=True, slots=True)
class LayerMemory:
    """Bytes of one layer on one micro-batch.

    Attributes:
        internal_bytes: kept for backward, neither inputs nor outputs of the layer nor its state.
        fixed_in_place_bytes: of these, what is not among autograd's saved tensors.
        kept_tensors: names of its inputs and outputs that backward needs.
        shared_with: of each output that has no memory of its own, the input whose it has.
        forward_bytes: needed meanwhile, over what is there when forward is done.
        bare_bytes: the same of a forward that keeps nothing for backward.
        backward_bytes: needed meanwhile, over what is there when backward starts: what forward
            kept, and the gradients of the outputs.
    """

    internal_bytes: int
    fixed_in_place_bytes: int
    kept_tensors: tuple[str, ...]
    shared_with: Mapping[str, str]
    forward_bytes: int
    bare_bytes: int
    backward_bytes: int


def observe(
    layer: Layer,
    forward: Callable[[], Sequence[Tensor]],
    inputs: Sequence[Tensor],
    state: Sequence[Tensor],
    device: torch.device,
) -> LayerMemory:
    """Runs the layer forward and, if it has one, backward.

    Args:
        forward: gives the layer's outputs for `inputs`.
        inputs: leaves; those that need a gradient get one, which is taken away again.
        state: parameters and buffers.
    """
    counter = meter(device)
    counter.count(*inputs, *state)
    own = {_key(t) for t in state}
    name_by_key = {_key(t): name for name, t in zip(layer.inputs, inputs, strict=True)}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[_key(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with counter, torch.no_grad():
        before = counter.held
        counter.reset_peak()
        bare = tensor_bytes(forward())
        bare_peak = counter.peak - before
    with counter:
        before = counter.held
        counter.reset_peak()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            outputs = [
                t.clone(memory_format=torch.contiguous_format) if i in layer.strided_outputs else t
                for i, t in enumerate(forward())
            ]
        forward_peak = counter.peak - before
    shared: dict[str, str] = {}
    given_outputs = kept_outputs = 0
    for name, output in zip(layer.outputs, outputs, strict=True):
        key = _key(output)
        if key in name_by_key:
            shared[name] = name_by_key[key]
        else:
            name_by_key[key] = name
            given_outputs += output.numel() * output.element_size()
            kept_outputs += output.untyped_storage().nbytes() if key in saved else 0
    with counter:
        edges = [GradientEdge(t.grad_fn, t.output_nr) for t in outputs if t.grad_fn is not None]
        gradients = [torch.empty_like(t) for t in outputs if t.grad_fn is not None] if layer.has_backward else []
        given = tensor_bytes(gradients)
        del output  # the loop's last
        outputs.clear()
        # What is left is held by autograd alone.
        internal = max(0, counter.held - before - given - kept_outputs)
        backward_bytes = _backward_bytes(edges, gradients, state, counter) if gradients else 0
    for t in inputs:
        t.grad = None
    kept = tuple(name for key, name in name_by_key.items() if key in saved and key not in own)
    movable = sum(nbytes for key, nbytes in saved.items() if key not in own and key not in name_by_key)
    forward_bytes = max(0, forward_peak - given_outputs - internal)
    bare_bytes = max(0, bare_peak - min(bare, given_outputs))
    return LayerMemory(
        internal_bytes=internal,
        fixed_in_place_bytes=max(0, internal - movable),
        kept_tensors=kept,
        shared_with=shared,
        forward_bytes=forward_bytes,
        bare_bytes=bare_bytes,
        backward_bytes=backward_bytes,
    )


def _backward_bytes(edges: list[GradientEdge], gradients: list[Tensor], state: Sequence[Tensor], counter: Meter) -> int:
    """What backward needs over what is there when it starts, where earlier micro-batches left gradients."""
    learned = [p for p in state if isinstance(p, nn.Parameter) and p.requires_grad]
    before = [p.grad for p in learned]
    for p in learned:
        p.grad = torch.zeros_like(p)
    for gradient in gradients:
        gradient.fill_(1)
    start = counter.held
    counter.reset_peak()
    torch.autograd.backward(edges, gradients)
    result = max(0, counter.peak - start)
    for p, earlier in zip(learned, before, strict=True):
        p.grad = earlier
    return result


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
