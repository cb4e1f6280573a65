"""Property tests for users' own models, partitioners and schedules.

Hypothesis strategies draw layer graphs, costs, clusters and plans; checks raise AssertionError
with a story where a promise is broken. Names load on first use: what needs torch or hypothesis
asks for it only then.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeflow.testing.drawn_batches import sequence_graphs, training_batches
    from pipeflow.testing.drawn_options import training_options
    from pipeflow.testing.drawn_plans import check_program, plans
    from pipeflow.testing.drawn_problems import clusters, costs, problems
    from pipeflow.testing.enumeration import every_partition
    from pipeflow.testing.graphs import batches, layer_graphs
    from pipeflow.testing.layout import check_layout_invariance
    from pipeflow.testing.made_up_costs import unit_costs
    from pipeflow.testing.oracle import optimum
    from pipeflow.testing.partitioners import check_partitioner
    from pipeflow.testing.partitions import check_partition
    from pipeflow.testing.prediction_law import check_predictions
    from pipeflow.testing.processes import RankResult, run_ranks

_HOME = {
    "RankResult": "processes",
    "batches": "graphs",
    "check_layout_invariance": "layout",
    "check_predictions": "prediction_law",
    "check_partition": "partitions",
    "check_partitioner": "partitioners",
    "check_program": "drawn_plans",
    "clusters": "drawn_problems",
    "costs": "drawn_problems",
    "every_partition": "enumeration",
    "layer_graphs": "graphs",
    "optimum": "oracle",
    "plans": "drawn_plans",
    "problems": "drawn_problems",
    "run_ranks": "processes",
    "sequence_graphs": "drawn_batches",
    "training_batches": "drawn_batches",
    "training_options": "drawn_options",
    "unit_costs": "made_up_costs",
}

__all__ = [
    "RankResult",
    "batches",
    "check_layout_invariance",
    "check_partition",
    "check_partitioner",
    "check_predictions",
    "check_program",
    "clusters",
    "costs",
    "every_partition",
    "layer_graphs",
    "optimum",
    "plans",
    "problems",
    "run_ranks",
    "sequence_graphs",
    "training_batches",
    "training_options",
    "unit_costs",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'pipeflow.testing' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"pipeflow.testing.{_HOME[name]}"), name)
    globals()[name] = value
    return value
