"""Autocast, scaled losses, float32 masters, sums in a chosen type: as one device, in any layout."""

from __future__ import annotations

import pytest
import torch

import pipeflow as pf
from tests.runtime.models import THREE_STAGES, Stages, forked_batch, forked_graph, make_plan, sgd

REPLICAS: Stages = [(["a", "b"], (0, 1)), (["c", "d"], (2,)), (["e", "p", "s", "loss"], (0, 1, 2))]
SHARED_RANKS: Stages = [(["a", "b"], (0,)), (["c", "d"], (1,)), (["e", "p", "s", "loss"], (0,))]
LAYOUTS = {"single": THREE_STAGES, "shared ranks": SHARED_RANKS, "replicas": REPLICAS}
SCALE = pf.LossScale(initial=2.0**10, growth_interval=2)
PRECISIONS = {
    "bf16 autocast": pf.Precision(autocast="bfloat16"),
    "fp16 autocast, scaled": pf.Precision(autocast="float16", loss_scale=SCALE),
    "bf16 parameters": pf.Precision(parameters="bfloat16"),
    "bf16 sums of micro-batches": pf.Precision(parameters="bfloat16", accumulate="parameters"),
    "fp16 parameters, scaled": pf.Precision(parameters="float16", loss_scale=SCALE),
    "all": pf.Precision(autocast="bfloat16", parameters="bfloat16", loss_scale=SCALE, reduce="bfloat16"),
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_does_as_one_device(layout: str, precision: str) -> None:
    graph, chosen = forked_graph(), PRECISIONS[precision]
    reference = pf.Reference(graph, sgd, num_microbatches=4, precision=chosen, clip_norm=1.0)
    plan = make_plan(graph, LAYOUTS[layout])
    # The forward of a first step is the same everywhere; then sums over replicas differ by roundings.
    tolerance = 0.0 if layout != "replicas" else 2e-2 if chosen.reduce else 4e-3
    with pf.Engine(graph, plan, sgd, num_threads=1, precision=chosen, clip_norm=1.0) as engine:
        for seed in range(4):
            batch = forked_batch(10, seed=seed)
            expected, seen = reference.step(batch), engine.step(batch)
            assert seen.loss == pytest.approx(expected.loss, rel=0.0 if seed == 0 else tolerance)
            assert (seen.loss_scale, seen.skipped) == (expected.loss_scale, expected.skipped)
        for name, value in reference.state_dict().items():
            assert engine.state_dict()[name].dtype == torch.float32
            torch.testing.assert_close(engine.state_dict()[name], value, rtol=tolerance, atol=tolerance)
