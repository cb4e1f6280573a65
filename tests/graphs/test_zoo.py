from __future__ import annotations

import pytest
import torch

from pipeflow.errors import GraphError
from pipeflow.graphs.layer_graph import LayerGraph
from pipeflow.graphs.zoo import MlpBlock, digits_cnn, mlp_chain, two_long_skips


@pytest.mark.parametrize("graph", [digits_cnn(), mlp_chain(3, 8), two_long_skips(5, 8, dtype="float64")])
def test_models_of_the_zoo_do_not_depend_on_how_a_batch_is_cut(graph: LayerGraph) -> None:
    graph.check()
    assert not any(layer.is_random or layer.mutated_buffers for layer in graph.layers.values())


def test_the_cnn_predicts_ten_classes_and_has_a_skip() -> None:
    graph = digits_cnn()
    assert graph.outputs == ("logits",)
    assert graph.specs["logits"].shape == ("B", 10)
    assert graph.nx.has_edge("widen", "add")


def test_long_skips_pass_several_blocks() -> None:
    graph = two_long_skips(8, 8)
    assert graph.nx.has_edge("block0", "join0")
    assert graph.nx.has_edge("block1", "join1")
    assert list(graph.layers)[-4:] == ["join1", "block7", "join0", "loss"]


def test_a_block_is_residual() -> None:
    block = MlpBlock(8)
    torch.nn.init.zeros_(block.narrow.weight)
    torch.nn.init.zeros_(block.narrow.bias)
    x = torch.ones(2, 8)
    assert torch.equal(block(x), x)


def test_sizes_that_make_no_model_are_refused() -> None:
    with pytest.raises(GraphError):
        digits_cnn(12)
    with pytest.raises(GraphError):
        mlp_chain(0)
    with pytest.raises(GraphError):
        two_long_skips(3)
