from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from pipeflow.cli import cli


def test_costs_are_cut_with_a_certificate(costs_file: Path) -> None:
    done = CliRunner().invoke(cli, ["partition", str(costs_file), "--devices", "3"])
    assert done.exit_code == 0, done.output
    assert "gap 0.0%" in done.stdout
    assert done.stderr == ""


def test_json_has_the_stages(costs_file: Path) -> None:
    done = CliRunner().invoke(cli, ["partition", str(costs_file), "--devices", "3", "--max-replicas", "1", "--json"])
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert [len(stage) for stage in document["stages"]] == [2, 2, 2]
    assert document["replicas"] == [1, 1, 1]
    assert document["lower_bound"] <= document["objective"]


def test_what_does_not_fit_is_a_negative_result(costs_file: Path) -> None:
    arguments = ["partition", str(costs_file), "--devices", "2", "--memory", "10"]
    assert CliRunner().invoke(cli, arguments).exit_code == 1
    done = CliRunner().invoke(cli, [*arguments, "--json"])
    assert done.exit_code == 1
    document = json.loads(done.stdout)
    assert document["feasible"] is False
    assert [(rule["kind"], rule["devices"]) for rule in document["rules"]] == [("memory", [0]), ("memory", [1])]


def test_a_file_of_another_format_is_a_wrong_call(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    path.write_text("{}")
    assert CliRunner().invoke(cli, ["partition", str(path), "--devices", "2"]).exit_code == 2


def test_the_number_of_devices_is_asked_for(costs_file: Path) -> None:
    done = CliRunner().invoke(cli, ["partition", str(costs_file)])
    assert done.exit_code == 2
    assert "number of devices" in done.stderr


def test_pins_are_kept(costs_file: Path) -> None:
    fixed = ["--pin", "l0=device:2", "--together", "l3,l5", "--apart", "l1,l2", "--no-cut", "l0,l1"]
    done = CliRunner().invoke(cli, ["partition", str(costs_file), "--devices", "3", "--json", *fixed])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["stages"] == [["l0", "l1"], ["l2"], ["l3", "l4", "l5"]]


@pytest.mark.parametrize(
    ("option", "text", "story"),
    [
        ("--pin", "l0", "write for example head=stage:-1"),
        ("--pin", "l0=device:-1", "write for example head=stage:-1"),
        ("--pin", "z=stage:0", "not a layer"),
        ("--no-cut", "l0", "write its two layers"),
        ("--apart", "l0", "at least two layers"),
    ],
)
def test_pins_that_make_no_sense_are_a_wrong_call(costs_file: Path, option: str, text: str, story: str) -> None:
    done = CliRunner().invoke(cli, ["partition", str(costs_file), "--devices", "2", option, text])
    assert done.exit_code == 2
    assert story in " ".join(done.stderr.split())


PIPEDREAM = """node1 -- Input0 -- forward_compute_time=9, backward_compute_time=0, activation_size=64, parameter_size=0
node2 -- Conv2d(3, 64) -- forward_compute_time=2, backward_compute_time=4, activation_size=1e6, parameter_size=1e6
node3 -- Linear(64, 8) -- forward_compute_time=1, backward_compute_time=2, activation_size=10, parameter_size=4e6
\tnode1 -- node2
\tnode2 -- node3
"""


def test_a_profile_counts_as_its_own_planner_does(tmp_path: Path) -> None:
    path = tmp_path / "small.graph.txt"
    path.write_text(PIPEDREAM)

    def milliseconds(*options: str) -> float:
        arguments = ["partition", str(path), "--format", "pipedream", "--devices", "3", "--bandwidth", "1GB", "--json"]
        done = CliRunner().invoke(cli, [*arguments, *options])
        assert done.exit_code == 0, done.output
        return float(json.loads(done.stdout)["objective"])

    assert milliseconds("--max-replicas", "1") == pytest.approx(6.0)
    # on 2 replicas 4 * 1/2 * 1 MB / 1 GB/s = 2 ms to reduce: (6 + 2) / 2
    assert milliseconds() == pytest.approx(4.0)
    assert milliseconds("--transfers", "relayed") == pytest.approx(4.0)
    # 1 MB there and back in 2 ms, after 6 ms, or beside them
    assert milliseconds("--transfers", "added", "--max-replicas", "1") == pytest.approx(8.0)
    assert milliseconds("--transfers", "overlapped", "--max-replicas", "1") == pytest.approx(6.0)


def test_levels_of_links_are_planned_one_inside_the_other(tmp_path: Path) -> None:
    path = tmp_path / "small.graph.txt"
    path.write_text(PIPEDREAM)
    arguments = ["partition", str(path), "--format", "pipedream", "--json", "--devices", "2x2"]
    done = CliRunner().invoke(cli, [*arguments, "--bandwidth", "10GB,1GB"])
    assert done.exit_code == 0, done.output
    # node2 on both devices of one machine: (6 + 4 * 1/2 * 1 MB / 10 GB/s) / 2
    assert json.loads(done.stdout)["objective"] == pytest.approx(3.1)
    assert json.loads(done.stdout)["devices"] == [[0, 1], [2, 3]]
    for wrong, story in (("2x", "4x2"), ("0x2", "at least 1")):
        done = CliRunner().invoke(cli, [*arguments[:-1], wrong])
        assert done.exit_code == 2
        assert story in done.stderr
    done = CliRunner().invoke(cli, [*arguments, "--bandwidth", "1GB,2GB,3GB"])
    assert done.exit_code == 2
    assert "one bandwidth for all or for each" in done.stderr


def test_chunks_tell_what_they_gain_and_where_each_is(costs_file: Path) -> None:
    arguments = ["partition", str(costs_file), "--devices", "4", "--max-replicas", "1", "--chunks", "3"]
    done = CliRunner().invoke(cli, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["chunks"] == 3
    assert document["contiguous_objective"] == pytest.approx(0.006)
    assert document["objective"] == pytest.approx(0.006)
    assert document["gain_over_contiguous"] == pytest.approx(0.0)
    assert len(document["devices"]) == len(document["stages"])
    done = CliRunner().invoke(cli, arguments)
    assert "up to 3 stages on a device: 0.006, against 0.006 with contiguous stages, a gain of 0.0%" in done.stdout
    assert CliRunner().invoke(cli, [*arguments, "--stages", "2"]).exit_code == 2
