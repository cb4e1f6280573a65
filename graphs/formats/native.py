"""pipeflow's own costs, as `GraphCosts` writes them."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from pipeflow.errors import FormatError
from pipeflow.graphs.costs import GraphCosts
from pipeflow.graphs.formats.profile import Profile


def read(path: Path) -> Profile:
    """Reads `GraphCosts` from JSON.

    Raises:
        FormatError: the file is not what it should be; the message names the key.
    """
    try:
        costs = GraphCosts.model_validate_json(path.read_text())
    except ValidationError as error:
        raise FormatError(f"{path} is not a file of pipeflow costs: {error}") from error
    return Profile(format="pipeflow", costs=costs)
