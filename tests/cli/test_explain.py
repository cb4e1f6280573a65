from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from click.testing import CliRunner

from pipeflow.cli import cli
from tests.cli.conftest import chain_costs, chain_plan


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


def test_a_name_stays_on_one_line(tmp_path: Path) -> None:
    def renamed(text: str) -> str:
        return re.sub(r'"l(\d)"', r'"two\\nlines\\u2028 \\u001b[31m\1"', text)

    path = tmp_path / "plan.json"
    path.write_text(renamed(chain_plan().model_dump_json()))
    done = CliRunner().invoke(cli, ["explain", str(path)])
    assert done.exit_code == 0, done.output
    plain = CliRunner().invoke(cli, ["explain", str(written(tmp_path))])
    assert len(done.stdout.splitlines()) == len(plain.stdout.splitlines())
    assert r"two\nlines\u2028 \x1b[31m1" in done.stdout
    costs_path = tmp_path / "costs.json"
    costs_path.write_text(renamed(chain_costs(4).model_dump_json()))
    done = CliRunner().invoke(cli, ["partition", str(costs_path), "--devices", "2"])
    assert done.exit_code == 0, done.output
    assert r"two\nlines\u2028 \x1b[31m0" in done.stdout
    assert "\x1b" not in done.stdout


def written(tmp_path: Path) -> Path:
    path = tmp_path / "plain.json"
    chain_plan().save(path)
    return path
