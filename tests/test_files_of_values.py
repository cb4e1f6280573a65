"""Every JSON file of ours is read by one rule: what is wrong with it is said in its own error, key by key."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeflow.cli.planning import load_source
from pipeflow.errors import ClusterError, FormatError, PipeflowError, PlanError
from pipeflow.execution_plan import Plan
from pipeflow.graphs import LayerGraph, profile_cache
from pipeflow.graphs.zoo import digits_cnn
from pipeflow.partitioners.cluster import Cluster
from pipeflow.partitioning import read_profile
from tests.cli.conftest import chain_costs, chain_plan


def write_cache(path: Path) -> None:
    profile_cache.write(path, {"graph": "g"}, chain_costs(2))


FILES: dict[str, tuple[Callable[[Path], object], Callable[[Path], object], type[PipeflowError]]] = {
    "plan": (chain_plan().save, Plan.load, PlanError),
    "cluster": (Cluster.uniform(2).save, Cluster.from_file, ClusterError),
    "graph": (digits_cnn().save, LayerGraph.load, FormatError),
    "cache": (write_cache, lambda path: profile_cache.read(path, {"graph": "g"}), FormatError),
    "costs": (lambda path: path.write_text(chain_costs(2).model_dump_json()), read_profile, FormatError),
    "source": (
        lambda path: path.write_text(chain_costs(2).model_dump_json()),
        lambda p: load_source(str(p)),
        FormatError,
    ),
}


def damaged(path: Path, name: str, text: str | bytes) -> tuple[Callable[[Path], object], type[PipeflowError]]:
    write, read, error = FILES[name]
    write(path)
    read(path)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read, error


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, b"\xff\xfe\x00", "[]", "3", '{"format": "other"}'])
def test_what_is_no_such_file_is_refused(name: str, text: str | bytes, tmp_path: Path) -> None:
    read, error = damaged(tmp_path / "file.json", name, text)
    with pytest.raises(error, match=r"file\.json") as caught:
        read(tmp_path / "file.json")
    assert "pydantic" not in str(caught.value)


@pytest.mark.parametrize("name", FILES)
def test_a_key_that_stands_twice_is_refused(name: str, tmp_path: Path) -> None:
    """The last one would hide the first: a memory limit that somebody reads above and nobody keeps."""
    path = tmp_path / "file.json"
    write, read, error = FILES[name]
    write(path)
    text = path.read_text()
    for key in ('"format"', '"name"'):
        start = text.find(key)
        if start >= 0:
            end = text.index(",", start) + 1
            path.write_text(text[:end] + text[start:end] + text[end:])
            with pytest.raises(error, match=f"the key {key.replace(chr(34), chr(39))} stands twice"):
                read(path)


@pytest.mark.parametrize("name", sorted(set(FILES) - {"cache"}))
def test_a_file_that_is_not_there_and_a_folder_are_refused(name: str, tmp_path: Path) -> None:
    _, read, error = FILES[name]
    for path in (tmp_path / "nowhere.json", tmp_path):
        with pytest.raises(error, match="give the path of|give a recipe|no module"):
            read(path)


def test_a_cache_that_is_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="cannot be read"):
        profile_cache.read(tmp_path, {})


@pytest.mark.parametrize("name", ["plan", "cluster", "graph", "cache"])
def test_a_file_that_cannot_be_written_is_refused(name: str, tmp_path: Path) -> None:
    write, _, error = FILES[name]
    with pytest.raises(error, match="cannot be written"):
        write(tmp_path / "nowhere" / "file.json")


def cluster_file(path: Path, **changes: Any) -> Path:
    document = json.loads(Cluster.uniform(2).model_dump_json()) | changes
    path.write_text(json.dumps(document))
    return path


def test_each_wrong_key_has_a_line_with_its_value_and_the_rule(tmp_path: Path) -> None:
    devices = [{"name": "a", "speed": -1}, {"name": "b", "sped": 2}, {"kind": "cpu"}]
    with pytest.raises(ClusterError) as caught:
        Cluster.from_file(cluster_file(tmp_path / "c.json", devices=devices))
    assert str(caught.value).splitlines()[1:] == [
        "  devices.0.speed: -1; input should be greater than 0",
        "  devices.1.sped: 2; extra inputs are not permitted",
        "  devices.2.name: field required",
    ]


def test_amounts_are_written_as_people_write_them(tmp_path: Path) -> None:
    devices = [{"name": f"d{i}", "memory_bytes": "16GiB", "host_bandwidth": "1.5 GB"} for i in range(2)]
    levels = [{"size": 2, "bandwidth": "10GB"}]
    cluster = Cluster.from_file(cluster_file(tmp_path / "c.json", devices=devices, levels=levels))
    assert cluster.devices[1].memory_bytes == 2**34
    assert cluster.devices[1].host_bandwidth == 1.5e9
    assert cluster.link(0, 1)[0] == 10e9
    with pytest.raises(ClusterError, match=r"levels\.0\.bandwidth: .*'fast' is not an amount of bytes; write"):
        Cluster.from_file(cluster_file(tmp_path / "c.json", levels=[{"size": 2, "bandwidth": "fast"}]))
    with pytest.raises(ClusterError, match=r"levels\.0\.bandwidth: 0; input should be greater than 0"):
        Cluster.from_file(cluster_file(tmp_path / "c.json", levels=[{"size": 2, "bandwidth": "0"}]))


def test_a_cluster_does_not_contradict_itself(tmp_path: Path) -> None:
    links = [{"a": 0, "b": 1, "bandwidth": 1e9}, {"a": 1, "b": 0, "bandwidth": 2e9}]
    with pytest.raises(ClusterError, match="devices 0 and 1 are linked twice"):
        Cluster.from_file(cluster_file(tmp_path / "c.json", links=links))
    assert Cluster.from_file(cluster_file(tmp_path / "c.json", links=[links[0], links[0]])).link(1, 0) == (1e9, 0.0)
    with pytest.raises(ClusterError, match="2 devices are named 'a'"):
        Cluster.from_file(cluster_file(tmp_path / "c.json", devices=[{"name": "a"}, {"name": "a"}]))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"memory_bytes": -5}, "memory_bytes: -5; input should be greater than or equal to 0"),
        ({"bandwidth": -1.0}, "bandwidth: -1.0; input should be greater than 0"),
        ({"bandwidth": 0.0}, "bandwidth: 0.0"),
        ({"latency": float("nan")}, "latency: nan"),
    ],
)
def test_uniform_devices_have_amounts(options: dict[str, float], words: str) -> None:
    with pytest.raises(ClusterError, match=words):
        Cluster.uniform(2, **options)  # type: ignore[arg-type]
