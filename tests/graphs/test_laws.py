"""What holds for every graph that can be drawn."""

from __future__ import annotations

import tempfile
from pathlib import Path

import networkx as nx
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeflow.graphs import LayerGraph
from pipeflow.graphs.calling import flat_call
from pipeflow.testing.graphs import batches, layer_graphs, sample_batch

GRAPHS = layer_graphs(allow_random=True, allow_shared=True, allow_buffers=True)
SAVEABLE = layer_graphs(allow_random=True, allow_buffers=True, allow_instances=False)


def run(graph: LayerGraph, samples: int) -> dict[str, torch.Tensor]:
    """Every tensor of a training forward on one device."""
    functions = graph.build(seed=0)
    values = dict(sample_batch(graph, samples))
    for name, layer in graph.layers.items():
        result = flat_call(layer, functions[name])(*(values[t] for t in layer.inputs))
        outputs = result if isinstance(result, tuple) else (result,)
        # Views, since what a layer gives may be needed within it: their gradients come from readers alone.
        values.update(zip(layer.outputs, (t.view_as(t) for t in outputs), strict=True))
    return values


@settings(max_examples=60)
@given(GRAPHS, st.integers(1, 6))
def test_inferred_specs_are_what_a_real_run_gives(graph: LayerGraph, samples: int) -> None:
    with torch.random.fork_rng():
        for name, tensor in run(graph, samples).items():
            spec = graph.specs[name]
            assert tuple(tensor.shape) == spec.shape_at(samples)
            assert str(tensor.dtype) == f"torch.{spec.dtype}"
            assert tensor.requires_grad == spec.requires_grad


@settings(max_examples=40)
@given(layer_graphs(allow_shared=True, dtype="float64"))
def test_gradients_reach_what_is_said_to_carry_them(graph: LayerGraph) -> None:
    values = run(graph, 3)
    for tensor in values.values():
        if tensor.requires_grad:
            tensor.retain_grad()
    torch.autograd.backward(torch.stack([values[name] for name in graph.losses]).sum())
    reached = {name for name, tensor in values.items() if tensor.requires_grad and tensor.grad is not None}
    assert reached == graph.differentiable


@settings(max_examples=40)
@given(GRAPHS)
def test_random_layers_and_changed_buffers_are_those_that_are(graph: LayerGraph) -> None:
    functions = graph.build()
    values = dict(sample_batch(graph, 3))
    for name, layer in graph.layers.items():
        function = functions[name]
        buffers = dict(function.named_buffers()) if isinstance(function, torch.nn.Module) else {}
        before = {n: b.clone() for n, b in buffers.items()}
        state = torch.get_rng_state()
        with torch.random.fork_rng():
            result = flat_call(layer, function)(*(values[t] for t in layer.inputs))
            assert (not torch.equal(state, torch.get_rng_state())) == layer.is_random
        changed = {n for n, b in buffers.items() if not torch.equal(b, before[n])}
        assert changed <= set(layer.mutated_buffers)
        values.update(zip(layer.outputs, result if isinstance(result, tuple) else (result,), strict=True))


@settings(max_examples=40)
@given(SAVEABLE)
def test_files_give_back_the_graph(graph: LayerGraph) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "g.json"
        graph.save(path)
        again = LayerGraph.load(path, allow=("pipeflow.testing.graphs", "pipeflow.testing.drawn_structures"))
    assert again.digest == graph.digest
    assert dict(again.specs) == dict(graph.specs)
    for values in zip(run(graph, 2).values(), run(again, 2).values(), strict=True):
        assert values[0].shape == values[1].shape


@settings(max_examples=40)
@given(GRAPHS)
def test_the_order_is_topological_and_names_are_unique(graph: LayerGraph) -> None:
    assert nx.is_directed_acyclic_graph(graph.nx)
    position = {name: i for i, name in enumerate([*graph.inputs, *graph.layers])}
    assert all(position[a] < position[b] for a, b in graph.nx.edges)
    assert len(graph.specs) == len(graph.inputs) + sum(len(layer.outputs) for layer in graph.layers.values())
    assert {name for group in graph.colocated for name in group} <= set(graph.layers)


@settings(max_examples=20)
@given(GRAPHS)
def test_parameters_are_those_of_the_built_modules(graph: LayerGraph) -> None:
    functions = graph.build()
    seen: dict[int, str] = {}
    for name, function in functions.items():
        if isinstance(function, torch.nn.Module):
            for local, parameter in function.named_parameters(remove_duplicate=False):
                seen.setdefault(id(parameter), f"{name}.{local}")
    assert list(seen.values()) == list(graph.parameters)


@settings(max_examples=20)
@given(GRAPHS, st.data())
def test_drawn_batches_fit(graph: LayerGraph, data: st.DataObject) -> None:
    batch = data.draw(batches(graph, st.integers(1, 5)))
    assert 1 <= graph.check_batch(batch) <= 5
    labels = [t for t in batch.values() if not t.is_floating_point()]
    assert all(int(t.max()) < 8 for t in labels)
