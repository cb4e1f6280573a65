"""pipeflow's own costs, as `GraphCosts` writes them."""

from __future__ import annotations

from pathlib import Path

from pipeflow.errors import FormatError
from pipeflow.graphs.costs import GraphCosts
from pipeflow.graphs.formats.profile import Profile
from pipeflow.values import read_value


def read(path: Path) -> Profile:
    """Reads `GraphCosts` from JSON.

    Raises:
        FormatError: the file is not what it should be; the message names the key.
    """
    costs = read_value(GraphCosts, path, what="a file of pipeflow costs", error=FormatError)
    return Profile(format="pipeflow", costs=costs)
