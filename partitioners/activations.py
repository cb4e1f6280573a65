"""What a stage keeps of a micro-batch between its forward and its backward.

Every layer keeps what its backward needs (`LayerCosts.saved_bytes`), except those that the stage
recomputes. Recomputed layers that follow each other in the stage form a run, as long as can be:

    layers       a   b   c   d   e   f           recomputed: b, c and e
    runs             -----       -
    kept         a               d       f       and what enters a run, so that it can be run again
    transient        b + c  or   e               while the stage's backward is at that run

What enters a run is counted where it comes from: among what a kept layer saves, as received from
another stage, or, if a recomputed layer of the same stage gives it, here. Inputs of the graph cost
nothing. Runs go backward one after the other, so one replica holds, whatever is in flight,

    in flight * (kept + received) + the largest transient of a run.

What offloaded layers save is on the device for few micro-batches at a time (`pipeflow.partitioners.offload`).
"""

from __future__ import annotations

from typing import NamedTuple

from pipeflow.graphs.costs import GraphCosts
from pipeflow.partitioners.partition import Stage

MOST_ON_DEVICE = 3
"""Micro-batches whose offloaded share is on the device at once, at most."""


class Activations(NamedTuple):
    """Bytes of one stage.

    Attributes:
        kept: of each micro-batch from its forward to its backward, besides what is received.
        transient: of one micro-batch, while its backward runs.
    """

    kept: int
    transient: int


def stage_activations(costs: GraphCosts, stage: Stage) -> Activations:
    """What a stage keeps, by the model at the head of this module."""
    layers = costs.layer_by_name
    if not stage.recompute:
        return Activations(sum(layers[name].saved_bytes for name in stage.layers), 0)
    runs = recomputed_runs(stage)
    run_of = {name: index for index, run in enumerate(runs) for name in run}
    here = set(stage.layers)
    kept = sum(layers[name].saved_bytes for name in stage.layers if name not in run_of)
    for name, run in run_of.items():
        for tensor in layers[name].outputs:
            readers = costs.consumers_by_tensor[tensor.name]
            if any(reader in here and run_of.get(reader) != run for reader in readers):
                kept += tensor.bytes
    return Activations(kept, max(sum(layers[name].saved_bytes for name in run) for run in runs))


def recomputed_runs(stage: Stage) -> tuple[tuple[str, ...], ...]:
    """The recomputed layers of a stage, those that follow each other together."""
    chosen = set(stage.recompute)
    runs: list[list[str]] = []
    follows = False
    for name in stage.layers:
        if name in chosen:
            if not follows:
                runs.append([])
            runs[-1].append(name)
        follows = name in chosen
    return tuple(map(tuple, runs))
