"""Exit codes mean something: a defect of pipeflow is not mistaken for a negative result."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from pipeflow.cli import cli


def broken(*args: object, **options: object) -> None:
    raise IndexError("list index out of range")


def test_a_defect_has_a_code_of_its_own(costs_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeflow.partitioning.partition", broken)
    done = CliRunner().invoke(cli, ["partition", str(costs_file), "--devices", "2"])
    assert done.exit_code == 70
    assert "IndexError: list index out of range" in done.stderr
    assert "Traceback" in done.stderr
    assert "defect of pipeflow" in done.stderr
    assert done.stdout == ""


def test_the_codes_are_told() -> None:
    done = CliRunner().invoke(cli, ["--help"])
    assert "70 a defect of pipeflow" in " ".join(done.stdout.split())


def test_a_traceback_does_not_change_what_a_code_means(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    path.write_text("{}")
    done = CliRunner().invoke(cli, ["--traceback", "partition", str(path), "--devices", "2"])
    assert done.exit_code == 2
    assert "Traceback" in done.stderr
