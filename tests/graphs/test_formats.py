"""Readers of published formats: on hand-written files, and on the published data where it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeflow.errors import FormatError
from pipeflow.graphs.costs import GraphCosts, LayerCosts
from pipeflow.graphs.formats import FORMATS
from pipeflow.graphs.formats.dnn_partitioning import BANDWIDTH

DATA = Path(__file__).parents[2] / "../shared/data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the published workloads are no part of pipeflow")


def workload(**changes: Any) -> dict[str, Any]:
    def node(index: int, colour: int | None, backward: bool) -> dict[str, Any]:
        result = {
            "id": index,
            "supportedOnFpga": index != 3,
            "cpuLatency": 9.0,
            "fpgaLatency": 1.5,
            "isBackwardNode": backward,
            "size": 1000.0,
        }
        return result if colour is None else {**result, "colorClass": colour}

    data = {
        "maxSizePerFPGA": 1e9,
        "maxFPGAs": 3,
        "maxCPUs": 1,
        "nodes": [node(4, None, False), node(0, 7, False), node(1, 8, False), node(2, 8, True), node(3, 7, True)],
        "edges": [
            {"sourceId": 0, "destId": 1, "cost": 0.25},
            {"sourceId": 1, "destId": 2, "cost": 0.5},
            {"sourceId": 2, "destId": 3, "cost": 0.25},
            {"sourceId": 0, "destId": 3, "cost": 0.25},
        ],
    }
    return {**data, **changes}


def written(tmp_path: Path, data: object) -> Path:
    path = tmp_path / "small.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def test_dnn_partitioning(tmp_path: Path) -> None:
    profile = FORMATS["dnn-partitioning"](written(tmp_path, workload()))
    costs = profile.costs
    assert [c.name for c in costs.layers] == ["4", "0", "1", "2", "3"]
    assert costs.layer_by_name["3"].inputs == ("0", "2")
    assert costs.layer_by_name["1"].forward_seconds == pytest.approx(1.5e-3)
    assert costs.tensor_by_name["1"].bytes / BANDWIDTH == pytest.approx(0.5e-3, abs=1e-15)
    assert set(costs.colocated) == {("0", "3"), ("1", "2")}
    assert profile.unordered == ("2", "3")
    assert profile.unsupported == ("3",)
    assert (profile.num_devices, profile.memory_bytes) == (3, 10**9)


@pytest.mark.parametrize(
    ("data", "story"),
    [
        ("not json", "not a dnn-partitioning workload"),
        ({"nodes": []}, "no key"),
        (workload(edges=[{"sourceId": 0, "destId": 99, "cost": 1}]), "0 -> 99"),
        (
            workload(edges=[{"sourceId": 0, "destId": 1, "cost": 1}, {"sourceId": 1, "destId": 0, "cost": 1}]),
            "in a cycle",
        ),
    ],
)
def test_dnn_partitioning_refuses(tmp_path: Path, data: object, story: str) -> None:
    with pytest.raises(FormatError, match=story):
        FORMATS["dnn-partitioning"](written(tmp_path, data))


def pipedream_node(name: str, what: str, forward: float, backward: float, moved: str, parameters: float) -> str:
    times = f"forward_compute_time={forward}, backward_compute_time={backward}"
    return f"{name} -- {what} -- {times}, activation_size={moved}, parameter_size={parameters}\n"


PIPEDREAM = (
    pipedream_node("node1", "Input", 9.0, 0.0, "64.0", 0.0)
    + pipedream_node("node3", "LSTM(4, 4)", 2.0, 3.0, "[8.0; 2.0]", 7.0)
    + pipedream_node("node2", "Conv2d(3, 64, kernel_size=(3, 3))", 1.0, 1.0, "4.0", 5.0)
    + "\tnode1 -- node2\n\tnode2 -- node3\n"
)


def test_pipedream(tmp_path: Path) -> None:
    profile = FORMATS["pipedream"](written(tmp_path, PIPEDREAM))
    costs = profile.costs
    assert [t.name for t in costs.inputs] == ["node1"]
    assert [(c.name, c.kind, c.inputs) for c in costs.layers] == [
        ("node2", "Conv2d", ("node1",)),
        ("node3", "LSTM", ("node2",)),
    ]
    assert costs.layer_by_name["node3"].seconds == pytest.approx(5e-3)
    assert costs.tensor_by_name["node3"].bytes == 10
    assert costs.layer_by_name["node2"].parameter_bytes == 5


@pytest.mark.parametrize(
    ("text", "story"),
    [
        ("", "no nodes"),
        ("nonsense\n", r"small.json:1: 'nonsense' is neither"),
        (PIPEDREAM + "\tnode2 -- node8\n", "node8"),
        (PIPEDREAM.replace("parameter_size=7.0", ""), ":2:"),
        (PIPEDREAM + "\tnode3 -- node2\n", "in a cycle"),
    ],
)
def test_pipedream_refuses(tmp_path: Path, text: str, story: str) -> None:
    with pytest.raises(FormatError, match=story):
        FORMATS["pipedream"](written(tmp_path, text))


def piper(**changes: Any) -> dict[str, Any]:
    values = {"timePerSample": 0.5, "parameterSize": 100.0, "memoryUsageA": 30.0, "memoryUsageB": 400.0}
    again = {**values, "timePerSample": 0.7, "memoryUsageA": 3.0}
    data = {
        "maxDevices": 4,
        "maxMemoryPerDevice": 1e9,
        "bandwidth": 1e6,
        "mbsInBatch": 16,
        "nodes": [
            {"id": 0, "name": "Block", "TMPCs": {"1": [{"id": "vanilla", **values}, {"id": "again", **again}]}},
            {"id": 1, "TMPCs": {"2": [{"id": "vanilla", **values, "syncTimeFw": {"0": 8.0}}]}},
        ],
        "edges": [{"sourceId": 0, "destId": 1, "communicationCost": 64.0}],
    }
    return {**data, **changes}


def test_piper(tmp_path: Path) -> None:
    profile = FORMATS["piper"](written(tmp_path, piper()))
    first, second = profile.costs.layers
    assert second.inputs == ("0:1",)
    assert profile.costs.tensor_by_name["0:1"].bytes == 64
    assert [(v.name, v.degree, v.seconds, v.saved_bytes) for v in first.variants] == [
        ("vanilla", 1, 0.5, 30),
        ("again", 1, 0.7, 3),
    ]
    assert (second.variants[0].degree, second.variants[0].resident_bytes) == (2, 400)
    assert second.variants[0].border_bytes == (("0:1", 16),)
    assert (profile.num_devices, profile.num_microbatches, profile.even_replicas) == (4, 16, True)


@pytest.mark.parametrize(
    ("data", "story"),
    [
        ({}, "no key 'nodes'"),
        (piper(nodes=[{"id": 0, "TMPCs": {}}], edges=[]), "node 0 has no alternative"),
        (piper(edges=piper()["edges"] * 2), "0 -> 1 of 'small' stands twice"),
        (piper(nodes=piper()["nodes"] * 2), "the same id"),
        (piper(edges=[{"sourceId": 0, "destId": 7, "communicationCost": 1}]), "does not exist"),
    ],
)
def test_piper_refuses(tmp_path: Path, data: object, story: str) -> None:
    with pytest.raises(FormatError, match=story):
        FORMATS["piper"](written(tmp_path, data))


def test_own_format(tmp_path: Path) -> None:
    costs = GraphCosts(layers=(LayerCosts(name="a"),))
    assert FORMATS["pipeflow"](written(tmp_path, costs.model_dump_json())).costs == costs
    with pytest.raises(FormatError, match="layers"):
        FORMATS["pipeflow"](written(tmp_path, "{}"))


BROKEN = [b"\xff\xfe\x00\x80", b"\x00" * 10, b"[" * 100_000, b"null", b"[]", b'{"nodes": 1}']


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("content", BROKEN, ids=range(len(BROKEN)))
def test_what_is_no_such_file_at_all(tmp_path: Path, format: str, content: bytes) -> None:
    path = tmp_path / "broken"
    path.write_bytes(content)
    with pytest.raises(FormatError, match="broken"):
        FORMATS[format](path)


@pytest.mark.parametrize(
    ("format", "text"),
    [
        ("pipedream", PIPEDREAM.replace("time=2.0", "time=-2.0")),
        ("pipedream", PIPEDREAM.replace("=4.0", "=inf")),
        ("piper", json.dumps({**piper(), "maxMemoryPerDevice": float("inf")})),
        ("piper", json.dumps({**piper(), "bandwidth": 0})),
        ("dnn-partitioning", json.dumps(workload(maxSizePerFPGA=float("nan")))),
    ],
)
def test_amounts_that_nothing_can_cost(tmp_path: Path, format: str, text: str) -> None:
    with pytest.raises(FormatError, match="small.json"):
        FORMATS[format](written(tmp_path, text))


def test_files_of_other_editors_are_read_alike(tmp_path: Path) -> None:
    plain = FORMATS["pipedream"](written(tmp_path, PIPEDREAM))
    for text in (
        "\ufeff" + PIPEDREAM,
        PIPEDREAM.replace("\n", "\r\n"),
        PIPEDREAM.replace("\t", "    "),
        PIPEDREAM + "\n\n",
    ):
        (tmp_path / "small.json").write_bytes(text.encode())
        assert FORMATS["pipedream"](tmp_path / "small.json") == plain


@needs_data
@pytest.mark.parametrize(
    ("format", "pattern"),
    [("dnn-partitioning", "dnn-partitioning/*/*.json"), ("pipedream", "pipedream/*.txt"), ("piper", "piper/*.json")],
)
def test_published_files_can_be_read(format: str, pattern: str) -> None:
    paths = [p for p in sorted(DATA.glob(pattern)) if p.name != "LICENSE.txt"]
    assert paths
    for path in paths:
        assert FORMATS[format](path).costs.layers
