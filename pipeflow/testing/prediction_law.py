"""The law of predictions: any valid plan gives what one device gives, in the order of the batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pipeflow.engine import Engine
from pipeflow.execution_plan import Plan
from pipeflow.graphs.layer_graph import LayerGraph
from pipeflow.runtime.microbatch import Batch
from pipeflow.runtime.reference import Reference


def check_predictions(graph: LayerGraph, plan: Plan, batches: Sequence[Batch]) -> None:
    """Raises AssertionError unless the plan predicts, to the last bit, what one device does.

    Args:
        graph: the model.
        plan: for it, with any replicas: nothing is added up over them.
        batches: of any sizes, each whole or in micro-batches.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # kernels may add in another order with more
    try:
        reference = Reference(graph, num_microbatches=plan.num_microbatches)
        with Engine(graph, plan, num_threads=1) as engine:
            for batch in batches:
                expected, seen = reference.predict(batch), engine.predict(batch)
                torch.testing.assert_close(seen, expected, rtol=0, atol=0, equal_nan=True)
    finally:
        torch.set_num_threads(threads)
