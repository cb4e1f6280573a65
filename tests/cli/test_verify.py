from __future__ import annotations

import json
from pathlib import Path

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
