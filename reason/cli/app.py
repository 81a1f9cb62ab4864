"""The command line: one verb per file, registered here, and the one place where errors become exit codes.

Verbs read arguments, call the engine and draw the answer; they compute nothing. Importing this
module, and so ``--help``, imports neither torch nor mlflow.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import typer

from reason import __version__
from reason.cli import compare as _compare
from reason.cli import data as _data
from reason.cli import doctor as _doctor
from reason.cli import evaluate as _evaluate
from reason.cli import inspect as _inspect
from reason.cli import list as _list
from reason.cli import predict as _predict
from reason.cli import resume as _resume
from reason.cli import rm as _rm
from reason.cli import run as _run
from reason.cli import show as _show
from reason.cli import sweep as _sweep
from reason.cli import sync as _sync
from reason.cli import ui as _ui
from reason.errors import ReasonError

INTERRUPTED, TERMINATED = 130, 143

app = typer.Typer(
    name="reason",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Five ways of giving a model more reasoning, run, swept over their depth and compared on the same footing.\n\n"
    "Start with [bold]reason run latent[/bold]; then [bold]reason list[/bold] and [bold]reason ui[/bold].",
)


def guarded(verb: Callable[..., Any]) -> Callable[..., Any]:
    """The verb with its errors told to a person and turned into exit codes."""

    @functools.wraps(verb)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return verb(*args, **kwargs)
        except ReasonError as error:
            _tell(error)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:  # the reader of our answer has gone: nothing is wrong
            sys.stderr.close()
            raise typer.Exit(0) from None
        except BaseException as error:
            if type(error).__name__ == "Terminated":  # the launcher's, named so as not to import it here
                print("terminated", file=sys.stderr)
                raise typer.Exit(TERMINATED) from None
            raise

    return call


def _tell(error: ReasonError) -> None:
    from reason.cli.output import stderr

    console = stderr()
    console.print(f"[bold red]error[/bold red] {_escape(error.message)}", highlight=False, soft_wrap=True)
    if error.hint:
        console.print(_escape(error.hint), highlight=False, soft_wrap=True)


def _escape(text: str) -> str:
    return text.replace("[", "\\[")


def _version(value: bool) -> None:
    if value:
        print(f"reason {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: bool = typer.Option(
        False, "--version", help="Print the version and exit.", callback=_version, is_eager=True
    ),
) -> None:
    pass


for panel, verbs in {
    "Run": [_run.run, _sweep.sweep, _resume.resume, _evaluate.evaluate],
    "See": [_list.list_, _show.show, _compare.compare, _inspect.inspect, _predict.predict, _ui.ui],
    "Keep house": [_doctor.doctor, _sync.sync, _rm.rm],
}.items():
    for verb in verbs:
        app.command(verb.__name__.rstrip("_"), rich_help_panel=panel)(guarded(verb))
for command in _data.app.registered_commands:
    assert command.callback is not None
    command.callback = guarded(command.callback)
app.add_typer(_data.app, name="data", rich_help_panel="Keep house")


def main() -> None:
    """The console script."""
    app()
