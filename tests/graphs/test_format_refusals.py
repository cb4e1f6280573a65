"""What is wrong in a file of a published format is refused by the node or edge, the key and the value."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeflow.errors import CostError, FormatError, Infeasible, PlanError
from pipeflow.graphs.costs import MOST_BYTES, GraphCosts, LayerCosts
from pipeflow.graphs.formats import FORMATS
from pipeflow.graphs.formats.whole_bytes import WholeBytes
from pipeflow.partitioners import PARTITIONERS
from pipeflow.partitioning import partition

DNN: dict[str, Any] = {
    "maxSizePerFPGA": 4000.0,
    "maxFPGAs": 2,
    "nodes": [
        {"id": 7, "supportedOnFpga": 1, "fpgaLatency": 1.0, "isBackwardNode": 0, "size": 1000.0},
        {"id": 8, "supportedOnFpga": 1, "fpgaLatency": 2.0, "isBackwardNode": 0, "size": 1000.0},
        {"id": 9, "supportedOnFpga": 1, "fpgaLatency": 3.0, "isBackwardNode": 0, "size": 1000.0},
    ],
    "edges": [
        {"sourceId": 7, "destId": 8, "cost": 0.25},
        {"sourceId": 7, "destId": 9, "cost": 0.25},
        {"sourceId": 8, "destId": 9, "cost": 0.5},
    ],
}

WAY = {"id": "plain", "timePerSample": 0.5, "parameterSize": 100.0, "memoryUsageA": 30.0, "memoryUsageB": 400.0}
PIPER: dict[str, Any] = {
    "maxDevices": 2,
    "maxMemoryPerDevice": 1e9,
    "bandwidth": 1e6,
    "mbsInBatch": 4,
    "nodes": [{"id": 7, "TMPCs": {"1": [WAY]}}, {"id": 8, "TMPCs": {"1": [{**WAY, "syncTimeFw": {"7": 8.0}}]}}],
    "edges": [{"sourceId": 7, "destId": 8, "communicationCost": 64.0}],
}


def pipedream(**values: Any) -> str:
    fields = {"forward_compute_time": 1, "backward_compute_time": 2, "activation_size": 8, "parameter_size": 4}
    told = ", ".join(f"{key}={value}" for key, value in {**fields, **values}.items())
    plain = ", ".join(f"{key}={value}" for key, value in fields.items())
    return f"node1 -- Linear -- {plain}\nnode2 -- Linear -- {told}\n\tnode1 -- node2\n"


def written(tmp_path: Path, data: object) -> Path:
    path = tmp_path / "small.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def changed(data: dict[str, Any], change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    result = copy.deepcopy(data)
    change(result)
    return result


NO_AMOUNTS = [-1, math.nan, math.inf, "x", None, True]


@pytest.mark.parametrize("amount", NO_AMOUNTS)
@pytest.mark.parametrize(
    ("key", "where"),
    [("size", "node 8"), ("fpgaLatency", "node 8"), ("cost", "edge 8 -> 9"), ("maxSizePerFPGA", "the file")],
)
def test_a_workload_without_amounts(tmp_path: Path, key: str, where: str, amount: object) -> None:
    def change(data: dict[str, Any]) -> None:
        {"cost": data["edges"][2], "maxSizePerFPGA": data}.get(key, data["nodes"][1])[key] = amount

    with pytest.raises(FormatError, match=rf"small.json .*{where}: {key}={amount!r}; it must be a finite number"):
        FORMATS["dnn-partitioning"](written(tmp_path, changed(DNN, change)))


@pytest.mark.parametrize("amount", NO_AMOUNTS)
@pytest.mark.parametrize("key", ["timePerSample", "parameterSize", "memoryUsageA", "memoryUsageB"])
def test_an_alternative_without_amounts(tmp_path: Path, key: str, amount: object) -> None:
    data = changed(PIPER, lambda d: d["nodes"][1]["TMPCs"]["1"][0].update({key: amount}))
    with pytest.raises(FormatError, match=f"small.json .*node 8, degree 1, alternative 'plain': {key}={amount!r}"):
        FORMATS["piper"](written(tmp_path, data))


@pytest.mark.parametrize("amount", ["-1", "nan", "inf", "x", "[1; -1]", "[1; nan]"])
@pytest.mark.parametrize("key", ["forward_compute_time", "backward_compute_time", "activation_size", "parameter_size"])
def test_a_profile_without_amounts(tmp_path: Path, key: str, amount: str) -> None:
    with pytest.raises(FormatError, match=rf"small.json:2: node node2: {key}=.*; it must be a finite number"):
        FORMATS["pipedream"](written(tmp_path, pipedream(**{key: amount})))


@pytest.mark.parametrize("amount", [-1, math.nan, math.inf, "x"])
def test_own_costs_without_amounts(tmp_path: Path, amount: object) -> None:
    data = GraphCosts(layers=(LayerCosts(name="stem"), LayerCosts(name="head"))).model_dump(mode="json")
    data["layers"][1]["forward_seconds"] = amount
    with pytest.raises(FormatError, match=r"small.json .*layer head: forward_seconds"):
        FORMATS["pipeflow"](written(tmp_path, data))


@pytest.mark.parametrize(
    ("format", "data", "story"),
    [
        ("dnn-partitioning", changed(DNN, lambda d: d["nodes"][1].pop("size")), "node 8 has no key 'size'"),
        ("dnn-partitioning", changed(DNN, lambda d: d["nodes"][1].pop("id")), "node number 1 has no key 'id'"),
        ("dnn-partitioning", changed(DNN, lambda d: d["edges"][1].pop("cost")), "edge 7 -> 9 has no key 'cost'"),
        ("dnn-partitioning", changed(DNN, lambda d: d.pop("maxFPGAs")), "the file has no key 'maxFPGAs'"),
        ("piper", changed(PIPER, lambda d: d["nodes"][1].pop("TMPCs")), "node 8 has no key 'TMPCs'"),
        (
            "piper",
            changed(PIPER, lambda d: d["nodes"][1]["TMPCs"]["1"][0].pop("memoryUsageA")),
            "node 8, degree 1, alternative 'plain' has no key 'memoryUsageA'",
        ),
        ("piper", changed(PIPER, lambda d: d["nodes"][1]["TMPCs"]["1"][0].pop("id")), "degree 1 has no key 'id'"),
        ("piper", changed(PIPER, lambda d: d["edges"][0].pop("communicationCost")), "no key 'communicationCost'"),
        ("piper", changed(PIPER, lambda d: d.pop("mbsInBatch")), "the file has no key 'mbsInBatch'"),
        ("pipedream", pipedream().replace("parameter_size=4\n\t", "\n\t"), "node node2 has no key 'parameter_size'"),
    ],
)
def test_a_key_that_is_missing(tmp_path: Path, format: str, data: object, story: str) -> None:
    with pytest.raises(FormatError, match=story):
        FORMATS[format](written(tmp_path, data))


@pytest.mark.parametrize(
    ("format", "data", "story"),
    [
        ("dnn-partitioning", changed(DNN, lambda d: d["nodes"].append(d["nodes"][1])), "node 8: id=8"),
        ("dnn-partitioning", changed(DNN, lambda d: d["nodes"][2].update(id="8")), "node 8: id='8'"),
        ("dnn-partitioning", changed(DNN, lambda d: d["nodes"][1].update(id=[8])), r"id=\[8\]; it must be a whole"),
        ("dnn-partitioning", changed(DNN, lambda d: d.update(maxFPGAs=0)), "maxFPGAs=0; it must be a whole number"),
        ("dnn-partitioning", changed(DNN, lambda d: d.update(maxFPGAs=2.5)), "maxFPGAs=2.5; it must be a whole number"),
        (
            "dnn-partitioning",
            changed(DNN, lambda d: d["edges"][1].update(cost=0.75)),
            "edge 7 -> 9: cost=0.75, but another edge of node 7 has cost=0.25",
        ),
        ("dnn-partitioning", changed(DNN, lambda d: d["nodes"][1].update(supportedOnFpga="no")), "node 8: supported"),
        ("dnn-partitioning", changed(DNN, lambda d: d["nodes"][1].update(colorClass=[1])), "node 8: colorClass"),
        ("dnn-partitioning", changed(DNN, lambda d: d["edges"][1].update(destId=7)), "in a cycle: 7"),
        ("dnn-partitioning", changed(DNN, lambda d: d.update(nodes=[1])), r"nodes\[0\] of the file=1"),
        ("piper", changed(PIPER, lambda d: d.update(maxDevices=0)), "maxDevices=0"),
        ("piper", changed(PIPER, lambda d: d["nodes"][1]["TMPCs"].update(two=[WAY])), "node 8: TMPCs .* 'two'"),
        (
            "piper",
            changed(PIPER, lambda d: d["nodes"][1]["TMPCs"]["1"][0]["syncTimeFw"].update({"7": -1})),
            r"syncTimeFw\[7\]=-1",
        ),
        ("pipedream", pipedream() + pipedream(), r":4: node node1 stands twice"),
    ],
)
def test_a_value_that_a_key_may_not_have(tmp_path: Path, format: str, data: object, story: str) -> None:
    with pytest.raises(FormatError, match=story):
        FORMATS[format](written(tmp_path, data))


@pytest.mark.parametrize(
    ("format", "data"),
    [
        ("dnn-partitioning", changed(DNN, lambda d: d.update(nodes=[], edges=[]))),
        ("piper", changed(PIPER, lambda d: d.update(nodes=[], edges=[]))),
        ("pipedream", pipedream().splitlines()[0].replace("Linear", "Input")),
        ("pipeflow", '{"layers": []}'),
    ],
)
def test_a_graph_without_layers(tmp_path: Path, format: str, data: object) -> None:
    with pytest.raises(FormatError, match="at least one|no nodes"):
        FORMATS[format](written(tmp_path, data))


@pytest.mark.parametrize("name", PARTITIONERS)
def test_costs_without_layers_are_not_cut(name: str) -> None:
    with pytest.raises(PlanError, match="no layers"):
        partition(GraphCosts(layers=()), num_devices=2, partitioner=name)


def test_keys_that_may_be_missing_and_ids_of_other_types(tmp_path: Path) -> None:
    plain = FORMATS["dnn-partitioning"](written(tmp_path, DNN))

    def change(data: dict[str, Any]) -> None:
        for node in data["nodes"]:
            del node["supportedOnFpga"], node["isBackwardNode"]
            node["id"] = str(node["id"])
        data["edges"][0]["sourceId"] = 7.0

    assert FORMATS["dnn-partitioning"](written(tmp_path, changed(DNN, change))) == plain


def test_a_profile_with_commas_in_lists_and_comments(tmp_path: Path) -> None:
    plain = FORMATS["pipedream"](written(tmp_path, pipedream(activation_size="[8; 2]")))
    text = "# of a GPU -- in ms\n" + pipedream(activation_size="[8, 2]") + "  # node3 -- node4\n"
    assert FORMATS["pipedream"](written(tmp_path, text)) == plain
    assert plain.costs.tensor_by_name["node2"].bytes == 10


@pytest.mark.parametrize("name", ["auto", "chain", "orders", "moves", "cpsat", "milp", "exhaustive"])
@pytest.mark.parametrize("cost", [1e9, 1e14, 1e100])
def test_transfers_that_take_forever_are_avoided(tmp_path: Path, name: str, cost: float) -> None:
    """Bytes made up for them once did not fit 64 bits."""
    data = changed(DNN, lambda d: [edge.update(cost=cost) for edge in d["edges"]])
    report = partition(written(tmp_path, data), format="dnn-partitioning", partitioner=name)
    assert report.objective == pytest.approx(6.0)


@pytest.mark.parametrize("unit", [1e-200, 1e-14, 1e-9, 1e-3, 1.0, 1e9, 1e200])
def test_times_are_told_apart_whatever_their_unit(tmp_path: Path, unit: float) -> None:
    """Transfers of picoseconds once were none."""

    def change(data: dict[str, Any]) -> None:
        for node, seconds in zip(data["nodes"], (1.0, 1.0, 3.0), strict=True):
            node["fpgaLatency"] = seconds * unit
        for edge in data["edges"]:
            edge["cost"] = 0.25 * unit

    for count, best in ((2, 3.5), (3, 3.5)):
        report = partition(
            written(tmp_path, changed(DNN, change)), format="dnn-partitioning", num_devices=count, partitioner="chain"
        )
        assert report.objective / unit == pytest.approx(best)


def test_bytes_that_cannot_be_added_up() -> None:
    with pytest.raises(CostError, match="layer 'b'; they must stay below"):
        GraphCosts(layers=(LayerCosts(name="a"), LayerCosts(name="b", parameter_bytes=MOST_BYTES + 1)))


@pytest.mark.parametrize(("size", "limit"), [(0.4, 0.8), (0.1, 0.2), (1000.3, 2000.6), (1 / 3, 2 / 3)])
def test_fractions_of_bytes_that_just_fit(tmp_path: Path, size: float, limit: float) -> None:
    """Each rounded up, as it once was, two would not fit."""

    def change(data: dict[str, Any]) -> None:
        data["maxSizePerFPGA"] = limit
        for node in data["nodes"]:
            node["size"] = size

    path = written(tmp_path, changed(DNN, change))
    report = partition(path, format="dnn-partitioning")
    assert sorted(map(len, report.stages)) == [1, 2]
    with pytest.raises(Infeasible, match="bytes|B"):
        partition(path, format="dnn-partitioning", num_devices=1)
    assert partition(path, format="dnn-partitioning", num_devices=1, memory_bytes=4000).gap < 1e-9
    path.write_text(path.read_text().replace(f'"maxSizePerFPGA": {limit}', f'"maxSizePerFPGA": {limit * 0.999}'))
    with pytest.raises(Infeasible):
        partition(path, format="dnn-partitioning")


def test_fractions_are_told_in_bytes(tmp_path: Path) -> None:
    data = changed(DNN, lambda d: (d.update(maxSizePerFPGA=1000.25), d["nodes"][1].update(size=1500.5)))
    with pytest.raises(Infeasible, match=r"1\.5 KiB .*device:0' of 1000\.2 B"):
        partition(written(tmp_path, data), format="dnn-partitioning")


def test_units_of_whole_bytes() -> None:
    assert WholeBytes.of((3.0, 1e15)).unit == 1.0
    assert WholeBytes.of((0.5, 0.25)).unit == 0.25
    thirds = WholeBytes.of((1 / 3,) * 3)
    assert 3 * thirds.amount(1 / 3) <= thirds.limit(1.0)
    assert WholeBytes.of((1e300, 0.5)).unit == 1.0


@pytest.mark.parametrize("name", ["auto", "milp", "cpsat", "chain", "ideals", "beam"])
def test_no_memory_at_all_is_enough_for_nothing(tmp_path: Path, name: str) -> None:
    """milp once divided by it."""
    none = changed(DNN, lambda d: (d.update(maxSizePerFPGA=0), [node.update(size=0) for node in d["nodes"]]))
    report = partition(written(tmp_path, none), format="dnn-partitioning", partitioner=name)
    assert report.objective == pytest.approx(3.75)
    some = changed(none, lambda d: d["nodes"][0].update(size=1))
    with pytest.raises(Infeasible):
        partition(written(tmp_path, some), format="dnn-partitioning", partitioner=name)


def test_memory_beyond_64_bits_is_no_limit(tmp_path: Path) -> None:
    """Counted in the small unit of a file with fractions, a few terabytes are."""
    path = written(tmp_path, pipedream(parameter_size=0.1))
    limited = partition(path, format="pipedream", num_devices=2, memory_bytes=10**15)
    assert limited.objective == partition(path, format="pipedream", num_devices=2).objective
