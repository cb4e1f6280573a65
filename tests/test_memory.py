"""What the memory model says of small plans, worked out by hand."""

from __future__ import annotations

from pipeflow.arrivals import known_arrivals
from pipeflow.graphs.costs import GraphCosts, LayerCosts, TensorCosts
from pipeflow.lowering import lower
from pipeflow.partitioners.partition import Stage
from pipeflow.program import Kind
from pipeflow.simulator import simulate
from pipeflow.stage_memory import StageBytes, stage_bytes
from pipeflow.testing.hand import chain_costs, hand_plan


def detailed_chain(*internal: int, working: int = 0) -> GraphCosts:
    """Layers whose output is 100 bytes, that keep their input and `internal` bytes besides."""
    layers = []
    for i, amount in enumerate(internal):
        source = f"l{i - 1}" if i else "x"
        layers.append(
            LayerCosts(
                name=f"l{i}",
                inputs=(source,),
                outputs=(TensorCosts(name=f"l{i}", bytes=100, gradient_bytes=100),),
                forward_seconds=1,
                backward_input_seconds=1,
                parameter_bytes=10,
                saved_bytes=amount + (100 if i else 0),
                internal_bytes=amount,
                kept_tensors=(source,),
                forward_working_bytes=working,
                backward_working_bytes=100 + working,
            )
        )
    return GraphCosts(name="detailed", inputs=(TensorCosts(name="x", bytes=100),), layers=tuple(layers))


def of_stage(costs: GraphCosts, *recompute: str, names: tuple[str, ...] = ("l0", "l1", "l2")) -> StageBytes:
    stage = Stage.replicated(names, [0], recompute=recompute)
    return stage_bytes(costs, stage, gradients_in=100, gradients_out=0, gradients_summed=0, train=True)


def test_a_stage_keeps_what_backward_needs_and_no_more() -> None:
    amounts = of_stage(detailed_chain(1000, 2000, 3000))
    assert amounts.forward_end == 6000 + 200  # l0 and l1 are read by the next; l2 is sent, x is the batch
    assert amounts.kept == {"l0", "l1"}
    assert amounts.forward_peak == 6000 + 300
    assert amounts.backward_end == -6200 - 100  # the gradient that came in is gone too
    assert amounts.end(Kind.BACKWARD_INPUT) + amounts.end(Kind.BACKWARD_WEIGHT) == amounts.backward_end


def test_backward_peaks_where_a_layer_needs_most_over_what_is_left() -> None:
    costs = detailed_chain(1000, 2000, 3000)
    # The last layer needs a gradient of 100 while all is there; then 3000 go.
    assert of_stage(costs).backward_peak == 100
    busy = costs.model_copy(
        update={"layers": (costs.layers[0].model_copy(update={"backward_working_bytes": 9000}), *costs.layers[1:])}
    )
    # Before l0: l1 and l2 have let go of 5000 and their inputs, and l0's gradient is there.
    assert of_stage(busy).backward_peak == 9000 - 5000 - 200 + 100
    assert of_stage(busy).first_backward_peak == of_stage(busy).backward_peak + 20


def test_a_recomputed_run_comes_back_before_its_backward() -> None:
    amounts = of_stage(detailed_chain(1000, 2000, 3000), "l0", "l1")
    assert amounts.forward_end == 3000 + 100  # l2's own, and l1 that it reads
    # When l2 is done 3000 and l1 are gone, the gradient of l1 is there; l0, l1 and 3000 come again.
    assert amounts.backward_peak == -3000 - 100 + 100 + 1000 + 2000 + 200
    everything = of_stage(detailed_chain(1000, 2000, 3000), "l0", "l1", "l2")
    assert everything.forward_end == 0
    assert everything.backward_peak == 6000 + 300


def test_messages_are_known_to_have_arrived_from_what_comes_back() -> None:
    program = lower(hand_plan(chain_costs(2), ((0,), (1,)), 4, schedule="gpipe"))
    # All activations are sent before the first gradient is received; nothing comes back for a gradient.
    assert known_arrivals(program) == ((4, 4, 4, 4), (0, 0, 0, 0))
    program = lower(hand_plan(chain_costs(2), ((0,), (1,)), 4, schedule="1f1b"))
    assert known_arrivals(program) == ((1, 2, 3, 4), (0, 0, 1, 2))


def test_what_is_sent_and_not_kept_stays_until_it_is_known_to_have_arrived() -> None:
    costs = detailed_chain(1000, 1000)
    plan = hand_plan(costs, ((0,), (1,)), 4, schedule="gpipe")
    first = simulate(plan).peak_bytes_by_rank[0]
    # 4 micro-batches of 1000 bytes and of 100 on their way, with the batch, a parameter and its state,
    # while the last of them is received.
    assert first == 4 * (1000 + 100) + 4 * 100 + 10 * 3 + 100
    giver = costs.layers[0].model_copy(update={"kept_tensors": ("l0",), "internal_bytes": 900})
    keeping = costs.model_copy(update={"layers": (giver, costs.layers[1])})
    # It keeps what it gives, 100 of the 1000; so that counts once, sent or not. Backward needs 100 more.
    again = simulate(hand_plan(keeping, ((0,), (1,)), 4, schedule="gpipe")).peak_bytes_by_rank[0]
    assert again == 4 * 1000 + 4 * 100 + 10 * 3 + 100 + 100


def test_one_tensor_on_its_way_to_two_ranks_is_there_once() -> None:
    layers = [*detailed_chain(1000, 1000).layers]
    fork = layers[1].model_copy(
        update={
            "name": "l2",
            "outputs": (TensorCosts(name="l2", bytes=100, gradient_bytes=100),),
            "inputs": ("l0",),
            "kept_tensors": ("l0",),
        }
    )
    costs = GraphCosts(name="fork", inputs=(TensorCosts(name="x", bytes=100),), layers=(*layers, fork))
    plan = hand_plan(costs, ((0,), (1,), (2,)), 2, schedule="gpipe")
    # Twice: 1000 kept, 100 on their way, 100 of the batch; a gradient from each reader, and their sum.
    assert simulate(plan).peak_bytes_by_rank[0] <= 2 * 1200 + 30 + 400
