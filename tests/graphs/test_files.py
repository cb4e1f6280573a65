"""Graphs as files: what comes back, what cannot be written, what must never be built."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipeflow.errors import FormatError, GraphError, ShapeError
from pipeflow.graphs import LayerGraph, lazy
from pipeflow.graphs.import_path import path_of, resolve
from pipeflow.graphs.zoo import MlpBlock, digits_cnn, mlp_chain


def rich() -> LayerGraph:
    """A graph with every kind of constant that a file can hold."""
    graph = LayerGraph("rich")
    graph.input("x", ("B", 8))
    graph.input("y", ("B",), "int64")
    graph.add("seq", lazy(nn.Sequential, lazy(nn.Linear, 8, 10, dtype=torch.float32), lazy(nn.GELU)), "x")
    graph.add("pad", nn.functional.pad, "seq", pad=(1, 1), value=0.5)
    graph.add("clip", torch.clamp, "pad", max=math.inf)
    graph.add("enc", lazy(nn.TransformerEncoderLayer, 12, 2, dropout=0.0, activation=nn.functional.gelu), "clip")
    graph.add("halves", torch.chunk, "enc", chunks=2, dim=1)
    graph.add("sum", torch.add, "halves:0", "halves:1", alpha=-2)
    graph.loss("loss", nn.functional.cross_entropy, "sum", "y", weight=0.25, reduction="sum", label_smoothing=0.1)
    return graph


def test_a_graph_comes_back_as_it_was(tmp_path: Path) -> None:
    graph = rich()
    graph.save(tmp_path / "g.json")
    again = LayerGraph.load(tmp_path / "g.json")
    assert again.digest == graph.digest
    assert again.layers["pad"].kwargs == {"pad": (1, 1), "value": 0.5}
    assert again.layers["loss"].weight == 0.25
    a: Any = graph.build(seed=4)["seq"]
    b: Any = again.build(seed=4)["seq"]
    assert torch.equal(a[0].weight, b[0].weight)
    again.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == (tmp_path / "g.json").read_text()


def test_the_zoo_can_be_saved(tmp_path: Path) -> None:
    digits_cnn().save(tmp_path / "d.json")
    assert LayerGraph.load(tmp_path / "d.json").digest == digits_cnn().digest
    mlp_chain(2, 8).save(tmp_path / "m.json")
    with pytest.raises(FormatError, match=r"pipeflow\.graphs\.zoo\.MlpBlock.*may not be used"):
        LayerGraph.load(tmp_path / "m.json")
    for prefix in ("pipeflow", "pipeflow.graphs.zoo", "pipeflow.graphs.zoo.MlpBlock"):
        assert LayerGraph.load(tmp_path / "m.json", allow=(prefix,)).digest == mlp_chain(2, 8).digest
    with pytest.raises(FormatError, match="may not be used"):
        LayerGraph.load(tmp_path / "m.json", allow=("pipe", "pipeflow.graphs.zo"))


@pytest.mark.parametrize(
    ("layer", "kwargs", "words"),
    [
        (nn.Linear(8, 8), {}, ["'e'", "pf.lazy(Linear, ...)"]),
        (lambda x: x + 1, {}, ["'e'", "top level of a module"]),
        (lazy(nn.Sequential, nn.Linear(8, 8)), {}, ["'e', argument 0", "pf.lazy(Linear, ...)"]),
        (torch.sum, {"dim": {1}}, ["'e', dim", "is a set"]),
    ],
)
def test_what_a_file_cannot_hold_is_refused_by_name(
    layer: object, kwargs: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    graph = LayerGraph("g")
    graph.input("x", ("B", 8))
    if layer is torch.sum:
        kwargs, layer = {"flag": {1}}, flagged
        words = ["'e', flag", "is a set"]
    graph.add("e", layer, "x", **kwargs)
    with pytest.raises(GraphError) as caught:
        graph.save(tmp_path / "g.json")
    for word in words:
        assert word in str(caught.value)
    assert not (tmp_path / "g.json").exists()


def flagged(x: torch.Tensor, flag: object = None) -> torch.Tensor:
    return x


def written(tmp_path: Path, change: dict[str, Any] | None = None, **layer: Any) -> Path:
    """A small graph's file with one layer changed, or with a key of the whole changed."""
    graph = LayerGraph("g")
    graph.input("x", ("B", 8))
    graph.add("e", lazy(nn.Linear, 8, 8), "x")
    path = tmp_path / "g.json"
    graph.save(path)
    data = json.loads(path.read_text())
    data["layers"][0].update(layer)
    data.update(change or {})
    path.write_text(json.dumps(data))
    return path


ATTACKS = [
    "os.system",
    "builtins.eval",
    "subprocess.Popen",
    "torch.os.system",
    "torch.nn.functional.torch.os.system",
    "torch.nn.modules.torch.hub.load",
    "torch.hub.load",
    "torch.load",
    "torch.save",
    "torch.serialization.load",
    "torch.from_file",
    "torch.frombuffer",
    "torch.compile",
    "torch.ops.load_library",
    "torch.utils.cpp_extension.load",
    "torch.jit.load",
    "torch.fx.GraphModule",
    "torch.jit.RecursiveScriptModule",
    "torch.set_default_device",
    "torch.Tensor.apply_",
    "torch._C._jit_init",
    "torch.nn.functional.importlib.import_module",
    "torch.nn.functional.boolean_dispatch",
    "torch.nn.functional.handle_torch_function",
    "torch.nn.functional._verify_batch_size",
    "torch.nn.functional.warnings.warn",
    "torch.nn.modules.module.Module.__init__.__globals__",
    "torch.nn.modules.lazy.sys.exit",
    "torch.nn.init.normal_",
    "torch.nn.Parameter",
    "torch.nn.utils.clip_grad_norm_",
    "torchvision.models.resnet18",
    "torch.linalg.sys.exit",
    "torch.functional.torch.load",
]


@pytest.mark.parametrize("path", ATTACKS)
@pytest.mark.parametrize("allow", [(), ("torch",), ("torch.nn", "mymodels")])
def test_a_file_may_only_name_layers_and_tensor_functions(path: str, allow: tuple[str, ...]) -> None:
    for role in ("function", "class", "factory"):
        with pytest.raises(FormatError):
            resolve(path, allow, role=role)


@pytest.mark.parametrize(
    "source",
    [
        {"function": "torch.load"},
        {"lazy": "os.system", "args": ["touch pwned"], "kwargs": {}},
        {"lazy": "torch.nn.Sequential", "args": [{"lazy": "torch.hub.load", "args": [], "kwargs": {}}], "kwargs": {}},
        {"lazy": "torch.nn.Linear", "args": [8, {"function": "builtins.eval"}], "kwargs": {}},
        {"lazy": "torch.relu", "args": [], "kwargs": {}},
        {"function": "torch.nn.Linear"},
        {"class": "torch.nn.ReLU"},
        {"call": "os.system"},
        {"lazy": "torch.nn.Linear", "args": [8, 8]},
        {"function": "__import__('os').system"},
        {"tuple": [1]},
    ],
)
def test_sources_that_are_not_allowed_are_refused(source: dict[str, Any], tmp_path: Path) -> None:
    path = written(tmp_path, source=source)
    with pytest.raises(FormatError if "class" not in source else GraphError):
        LayerGraph.load(path)
    assert not Path("pwned").exists()


def write_package(tmp_path: Path) -> None:
    (tmp_path / "trusted_models").mkdir()
    (tmp_path / "trusted_models" / "__init__.py").write_text(
        "import os\nfrom os import system\nfrom torch import load\nfrom torch import nn\nimport functools\n"
        "class Block(nn.Module):\n"
        "    def __init__(self, norm=nn.LayerNorm):\n        super().__init__()\n        self.norm = norm(8)\n"
        "    def forward(self, x):\n        return self.norm(x)\n"
        "class Plain:\n    pass\n"
        "def twice(x):\n    return x * 2\n"
        "def block():\n    return Block()\n"
        "partial = functools.partial(system, 'true')\n"
    )
    (tmp_path / "trusted_models_evil.py").write_text("raise SystemExit('imported')\n")


def test_prefixes_are_whole_components_and_hold_for_what_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_package(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    allow = ("trusted_models",)
    assert resolve("trusted_models.twice", allow, role="function").__name__ == "twice"
    assert resolve("trusted_models.Block", allow, role="factory").__name__ == "Block"
    for path in (
        "trusted_models_evil.anything",
        "trusted_models.os.system",
        "trusted_models.system",
        "trusted_models.load",
        "trusted_models.partial",
        "trusted_models.nn.Linear",
        "trusted_models.Plain",
        "trusted_models.missing",
        "trusted_models.block.__globals__",
        "trusted_models",
    ):
        with pytest.raises(FormatError):
            resolve(path, allow, role="function")
    assert "trusted_models_evil" not in sys.modules
    with pytest.raises(FormatError):
        resolve("trusted_models.twice", ("trusted_models.Block",), role="function")


def test_an_untrusted_package_is_not_even_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "never_imported.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    path = written(tmp_path, source={"function": "never_imported.f"})
    with pytest.raises(FormatError, match="never_imported"):
        LayerGraph.load(path)
    with pytest.raises(FormatError, match="never_imported"):
        LayerGraph.load(path, allow=("other",))
    assert "never_imported" not in sys.modules


def test_modules_by_class_and_by_function_can_be_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_package(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    by_class = {"lazy": "trusted_models.Block", "args": [{"class": "torch.nn.LayerNorm"}], "kwargs": {}}
    by_function = {"lazy": "trusted_models.block", "args": [], "kwargs": {}}
    for source in (by_class, by_function):
        graph = LayerGraph.load(written(tmp_path, source=source), allow=("trusted_models",))
        assert graph.layers["e"].kind.lower() == "block"


@pytest.mark.parametrize("allow", [("",), ("a..b",), ("a.",), ("os system",)])
def test_prefixes_must_be_prefixes(allow: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(GraphError, match="no import prefix"):
        LayerGraph.load(written(tmp_path), allow=allow)


def test_one_prefix_is_not_a_sequence_of_letters(tmp_path: Path) -> None:
    from pipeflow.graphs.files import load

    with pytest.raises(GraphError, match="give a tuple"):
        load(written(tmp_path), "torch")


def test_cycles_duplicates_and_dangling_inputs_are_refused(tmp_path: Path) -> None:
    def layer(name: str, *inputs: str) -> dict[str, Any]:
        spec = {"shape": ["B", 8], "dtype": "float32"}
        return {
            "name": name,
            "source": {"function": "torch.relu" if len(inputs) < 2 else "torch.add"},
            "inputs": list(inputs),
            "outputs": {name: spec},
        }

    def refuse(words: str, *layers: dict[str, Any]) -> None:
        with pytest.raises(GraphError, match=words):
            LayerGraph.load(written(tmp_path, {"layers": list(layers)}))

    refuse("b -> c -> b form a cycle", layer("a", "x"), layer("b", "a", "c"), layer("c", "b"))
    refuse("a -> a form a cycle", layer("a", "a"))
    refuse("'a' names two", layer("a", "x"), layer("a", "x"))
    refuse("'x' names two", layer("x", "x"))
    refuse("'gone', which no input", layer("a", "gone"))
    refuse("stands before 'b'", layer("a", "b"), layer("b", "x"))


def test_a_file_that_says_another_shape_is_refused(tmp_path: Path) -> None:
    outputs = {"e": {"shape": ["B", 9], "dtype": "float32"}}
    with pytest.raises(ShapeError, match=r"'e' gives float32 \(B, 8\), but the file says float32 \(B, 9\)"):
        LayerGraph.load(written(tmp_path, outputs=outputs))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "other"}', '{"a": 1, "a": 2}', "[" * 100000, "\x00"])
def test_what_is_no_graph_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "g.json"
    path.write_text(text)
    with pytest.raises(FormatError, match="is not a graph"):
        LayerGraph.load(path)


def test_bytes_that_are_no_text_and_unknown_keys_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "g.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FormatError, match="is not a graph"):
        LayerGraph.load(path)
    with pytest.raises(FormatError, match="surprise"):
        LayerGraph.load(written(tmp_path, {"surprise": 1}))


@pytest.mark.parametrize(
    "thing",
    [
        torch.relu,
        torch.cat,
        torch.split,
        torch.einsum,
        torch.chunk,
        nn.functional.gelu,
        nn.functional.relu,
        nn.functional.max_pool2d,
        nn.functional.cross_entropy,
        nn.functional.scaled_dot_product_attention,
        torch.linalg.norm,
        torch.fft.fft,
        torch.special.erf,
        nn.Linear,
        nn.MultiheadAttention,
    ],
)
def test_what_torch_offers_is_found_again(thing: Any) -> None:
    path = path_of(thing)
    assert path is not None
    assert resolve(path, (), role="factory" if isinstance(thing, type) else "function") == thing


def test_paths_lead_back_to_the_thing_itself() -> None:
    assert path_of(MlpBlock) == "pipeflow.graphs.zoo.MlpBlock"
    assert path_of(lambda x: x) is None
    assert path_of(nn.Linear(1, 1).forward) is None
