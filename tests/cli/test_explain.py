from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from click.testing import CliRunner

from pipeflow.cli import cli


def test_the_bottleneck_and_the_cuts_are_told(plan_file: Path) -> None:
    done = CliRunner().invoke(cli, ["explain", str(plan_file)])
    assert done.exit_code == 0, done.output
    assert "set by stage 1 of 2" in done.stdout
    assert "cut 0 | 1: 1 tensor" in done.stdout
    assert "one more device" in done.stdout
    assert done.stderr == ""


def test_json_and_a_drawing(plan_file: Path, tmp_path: Path) -> None:
    drawing = tmp_path / "plan.svg"
    done = CliRunner().invoke(cli, ["explain", str(plan_file), "--json", "--bounds", "--svg", str(drawing)])
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["bottleneck"] == 1
    assert document["svg"] == str(drawing)
    assert {richer["is_bound"] for richer in document["richer"]} == {True}
    assert ElementTree.parse(drawing).getroot().tag.endswith("svg")


def test_a_file_that_is_no_plan_is_a_wrong_call(costs_file: Path) -> None:
    assert CliRunner().invoke(cli, ["explain", str(costs_file)]).exit_code == 2
