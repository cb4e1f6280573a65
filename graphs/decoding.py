"""Whether a layer can be run a few steps of a sequence at a time, and gives what the whole would.

A layer that looks at one step alone can as it is. One that looks at the steps before must keep
what it needs of them: it has a method `decode(state, *inputs)` that gives (result, new state),
beside the `forward` for whole sequences. Nobody can tell from outside whether a layer looks
around; those of torch's that are known to, and modules whose parts have a `decode` that nobody
would call, are found here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from pipeflow.graphs.layer import Decoding

_LOOK_AROUND = (
    nn.MultiheadAttention,
    nn.Transformer,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
    nn.RNNBase,
)


def decoding_of(function: Callable[..., Any]) -> Decoding:
    """What can be told from a layer's callable."""
    if function is nn.functional.scaled_dot_product_attention:
        return Decoding(obstacle="it attends to other steps")
    if not isinstance(function, nn.Module):
        return Decoding()
    if callable(getattr(function, "decode", None)):
        return Decoding(keeps_state=True)
    for path, module in function.named_modules():
        where = f"its part {path!r} ({type(module).__name__})" if path else f"{type(module).__name__}"
        if callable(getattr(module, "decode", None)):
            return Decoding(obstacle=f"{where} has a method decode, which the layer as a whole would not call")
        wide = isinstance(module, _ConvNd) and any(size != 1 for size in module.kernel_size)
        if wide or isinstance(module, _LOOK_AROUND):
            return Decoding(obstacle=f"{where} looks at other steps")
    return Decoding()
