from __future__ import annotations

from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from pipeflow.cli import COMMANDS, cli


def test_help_lists_every_command() -> None:
    done = CliRunner().invoke(cli, ["--help"])
    assert done.exit_code == 0
    for name, summary in COMMANDS.items():
        assert name in done.stdout
        assert summary in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_json(name: str) -> None:
    done = CliRunner().invoke(cli, [name, "--help"])
    assert done.exit_code == 0, done.output
    assert "--json" in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_says_what_it_does(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    silent = [p.name for p in command.params if isinstance(p, click.Option) and not p.help]
    assert not silent


def test_every_command_is_one_file_and_one_row() -> None:
    import pipeflow.cli

    (folder,) = pipeflow.cli.__path__
    files = {path.stem for path in Path(folder).glob("*.py") if "def command(" in path.read_text()}
    assert files == set(COMMANDS)


def test_an_unknown_command_is_a_wrong_call() -> None:
    assert CliRunner().invoke(cli, ["no-such"]).exit_code == 2
