from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from pipeflow.cli import cli
from pipeflow.execution_plan import Plan


def test_a_sound_plan_is_proved(plan_file: Path) -> None:
    done = CliRunner().invoke(cli, ["verify", str(plan_file)])
    assert done.exit_code == 0, done.output
    assert "chain: proved, with posted sends" in done.stdout
    assert done.stderr == ""


def test_json_holds_the_proofs_of_both_programs(plan_file: Path) -> None:
    done = CliRunner().invoke(cli, ["verify", str(plan_file), "--json"])
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["proved"] is True
    assert document["digest"] == Plan.load(plan_file).digest
    assert [proof["mode"] for proof in document["proofs"]] == ["train", "infer"]
    assert all(len(proof["peak_bytes_by_rank"]) == 3 for proof in document["proofs"])


def test_a_plan_beyond_memory_is_refused_in_one_message(tight_plan_file: Path) -> None:
    done = CliRunner().invoke(cli, ["verify", str(tight_plan_file)])
    assert done.exit_code == 1
    assert done.stdout == ""
    assert done.stderr.startswith("Error: ")
    assert "Traceback" not in done.stderr


def test_a_refusal_as_json_has_the_counterexample(tight_plan_file: Path) -> None:
    done = CliRunner().invoke(cli, ["verify", str(tight_plan_file), "--json"])
    assert done.exit_code == 1
    document = json.loads(done.stdout)
    assert document["proved"] is False
    assert document["counterexample"]


def test_a_file_that_is_no_plan_is_a_wrong_call(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text('{"format": "something"}')
    done = CliRunner().invoke(cli, ["verify", str(path)])
    assert done.exit_code == 2
    assert "is not a plan" in done.stderr


def test_a_file_that_is_not_there_is_a_wrong_call() -> None:
    assert CliRunner().invoke(cli, ["verify", "nowhere.json"]).exit_code == 2


def test_the_place_of_an_error_is_shown_when_asked(tight_plan_file: Path) -> None:
    done = CliRunner().invoke(cli, ["--traceback", "verify", str(tight_plan_file)])
    assert done.exit_code == 1
    assert type(done.exception).__name__ == "VerificationError"


@pytest.mark.parametrize("name", ["os:system", "builtins:exec", "plan_of_an_attacker:order", "shutil:rmtree"])
@pytest.mark.parametrize("command", ["verify", "simulate", "explain"])
def test_a_file_may_not_name_what_is_called(
    command: str, name: str, plan_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a plan names as its schedule is called, with numbers out of the same file."""
    (tmp_path / "plan_of_an_attacker.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    plan_file.write_text(plan_file.read_text().replace('"schedule": "1f1b"', f'"schedule": "{name}"'))
    done = CliRunner().invoke(cli, [command, str(plan_file)])
    assert done.exit_code == 2
    assert "may not be named by a file" in done.stderr
    assert "plan_of_an_attacker" not in sys.modules


def test_a_schedule_that_is_allowed_is_imported(
    plan_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "orders_of_a_friend.py").write_text("from pipeflow.schedules.gpipe import order, GPIPE as ROW\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    plan_file.write_text(plan_file.read_text().replace('"schedule": "1f1b"', '"schedule": "orders_of_a_friend:ROW"'))
    for command in ("verify", "simulate", "explain"):
        done = CliRunner().invoke(cli, [command, str(plan_file), "--allow", "orders_of_a_friend"])
        assert done.exit_code == 0, done.output
