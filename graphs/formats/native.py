"""pipeflow's own costs, as `GraphCosts` writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeflow.errors import FormatError
from pipeflow.graphs.costs import GraphCosts, LayerCosts
from pipeflow.graphs.formats.profile import Profile, refusing
from pipeflow.values import as_value, read_json, told

_WHAT = "a file of pipeflow costs"


def read(path: Path) -> Profile:
    """Reads `GraphCosts` from JSON.

    Raises:
        FormatError: the file is not what it should be; the message names the key.
    """
    with refusing(path, _WHAT):
        document = read_json(path, what=_WHAT, error=FormatError)
        try:
            costs = as_value(GraphCosts, document, path, what=_WHAT, error=FormatError)
        except FormatError:
            if isinstance(document, dict) and isinstance(document.get("layers"), list):
                _check_layers(document["layers"])
            raise
        if not costs.layers:
            raise FormatError("layers=[]; a graph has at least one layer")
        return Profile(format="pipeflow", costs=costs)


def _check_layers(layers: list[Any]) -> None:
    """What is wrong inside a layer is told with the layer's name, which its position in the list is not."""
    for index, layer in enumerate(layers):
        name = layer.get("name", f"number {index}") if isinstance(layer, dict) else f"number {index}"
        try:
            LayerCosts.model_validate(layer)
        except ValidationError as error:
            raise FormatError(f"layer {name}: {told(error)}") from error
