"""The command line. This module knows the commands' names and first lines, and loads nothing else.

Exit codes: 0, done; 1, a negative result (no plan is feasible, a plan is refused, a run failed);
2, a wrong call or a file that is not what it should be; 70, a defect of pipeflow (EX_SOFTWARE), with its
traceback.

One file per command; each has a click command named `command`. A new one is one file and one
row in `COMMANDS`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from traceback import format_exc
from types import MappingProxyType
from typing import Any

import click

import pipeflow
from pipeflow.errors import EngineError, Infeasible, PipeflowError, VerificationError

COMMANDS: Mapping[str, str] = MappingProxyType(
    {
        "plan": "Cut a model over devices and order the work.",
        "simulate": "Tell how long a plan takes, and draw it.",
        "explain": "Tell why a plan costs what it costs, and draw it.",
        "verify": "Prove that a plan runs to its end within memory.",
        "partition": "Cut costs from anywhere into stages, with a certificate.",
        "train": "Train a recipe as a pipeline, and compare with one device.",
    }
)


class _NegativeResult(click.ClickException):
    exit_code = 1


class _Defect(click.ClickException):
    exit_code = 70


class _WrongInput(click.ClickException):
    exit_code = 2


class _Commands(click.Group):
    """A group whose help needs none of its commands."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(f"pipeflow.cli.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except PipeflowError as error:
            negative = isinstance(error, Infeasible | VerificationError | EngineError)
            if not ctx.params["traceback"]:
                raise (_NegativeResult if negative else _WrongInput)(str(error)) from error
            if negative:
                raise  # Python's own exit code is that of a negative result
            raise _WrongInput(f"{error}\n\n{format_exc()}") from error
        except (click.ClickException, click.Abort, click.exceptions.Exit, BrokenPipeError):
            raise
        except Exception as error:  # Python would exit with 1, which means a negative result
            raise _Defect(
                f"{type(error).__name__}: {error}\n\n{format_exc()}\nThis is a defect of pipeflow "
                f"{pipeflow.__version__}, unless the last lines are of your own code; please report it with the command"
            ) from error


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(pipeflow.__version__, prog_name="pipeflow")
@click.option("--traceback", is_flag=True, help="Show where an error was raised, not only what it says.")
def cli(traceback: bool) -> None:
    """Cuts any layer graph over the devices there are, proves the plan, and trains it as on one device.

    Exit codes: 0 done; 1 a negative result (infeasible, refused, failed); 2 a wrong call or file;
    70 a defect of pipeflow, shown with its traceback.
    """


def main() -> None:
    """Runs the command line on `sys.argv`."""
    cli(prog_name="pipeflow")
