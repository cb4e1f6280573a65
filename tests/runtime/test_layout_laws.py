"""The law of laws: any drawn graph under any drawn plan trains as one device does."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeflow.testing import (
    check_layout_invariance,
    check_predictions,
    layer_graphs,
    plans,
    sequence_graphs,
    training_batches,
    training_options,
    unit_costs,
)
from pipeflow.testing.graphs import sample_batch


@given(data=st.data())
@settings(max_examples=120)
def test_single_replicas_are_bitwise_the_reference(data: st.DataObject) -> None:
    graph = data.draw(layer_graphs(allow_random=True, allow_shared=True, allow_buffers=True))
    plan = data.draw(plans(unit_costs(graph), max_ranks=4, max_replicas=1, copies=False, graph_digest=graph.digest))
    batches = data.draw(training_batches(graph, plan.num_microbatches))
    options, num_accumulated = data.draw(training_options(graph)), data.draw(st.sampled_from([0, 0, 1]))
    check_layout_invariance(graph, plan, batches, options=options, num_accumulated=num_accumulated)


@given(data=st.data())
@settings(max_examples=120)
def test_replicas_agree_in_float64(data: st.DataObject) -> None:
    graph = data.draw(layer_graphs(dtype="float64", allow_random=True, allow_shared=True, allow_buffers=True))
    plan = data.draw(plans(unit_costs(graph), max_ranks=6, max_replicas=3, graph_digest=graph.digest))
    batches = data.draw(training_batches(graph, plan.num_microbatches))
    options, num_accumulated = data.draw(training_options(graph)), data.draw(st.sampled_from([0, 0, 1]))
    check_layout_invariance(graph, plan, batches, options=options, num_accumulated=num_accumulated)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@given(data=st.data())
@settings(max_examples=40)
def test_every_schedule(schedule: str, data: st.DataObject) -> None:
    graph = data.draw(layer_graphs(max_layers=7))
    drawn = plans(unit_costs(graph), max_ranks=4, max_replicas=1, schedules=[schedule], graph_digest=graph.digest)
    check_layout_invariance(graph, data.draw(drawn), [sample_batch(graph, data.draw(st.integers(1, 12)))])


@given(data=st.data())
@settings(max_examples=60)
def test_sequences_of_any_length(data: st.DataObject) -> None:
    max_replicas = data.draw(st.sampled_from([1, 3]))
    graph = data.draw(sequence_graphs(dtype="float32" if max_replicas == 1 else "float64"))
    plan = data.draw(plans(unit_costs(graph), max_ranks=5, max_replicas=max_replicas, graph_digest=graph.digest))
    options = data.draw(training_options(graph))
    check_layout_invariance(graph, plan, data.draw(training_batches(graph, plan.num_microbatches)), options=options)


@given(data=st.data())
@settings(max_examples=60)
def test_predictions_are_those_of_one_device_in_the_order_of_the_batch(data: st.DataObject) -> None:
    graph = data.draw(st.one_of(layer_graphs(allow_shared=True, allow_buffers=True), sequence_graphs()))
    plan = data.draw(plans(unit_costs(graph), max_ranks=5, max_replicas=3, graph_digest=graph.digest))
    batches = data.draw(training_batches(graph, plan.num_microbatches))
    check_predictions(graph, plan, batches)
