"""pipeflow's own costs, as `GraphCosts` writes them."""

from __future__ import annotations

from pathlib import Path

from pipeflow.graphs.costs import GraphCosts
from pipeflow.graphs.formats.profile import Profile, refusing


def read(path: Path) -> Profile:
    """Reads `GraphCosts` from JSON.

    Raises:
        FormatError: the file is not what it should be; the message names the key.
    """
    with refusing(path, "a file of pipeflow costs"):
        return Profile(format="pipeflow", costs=GraphCosts.model_validate_json(path.read_bytes()))
