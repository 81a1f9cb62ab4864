"""The command line: one verb per file, registered here, and the one place where errors become exit codes.

Verbs read arguments, call the engine and draw the answer; they compute nothing. Importing this
module, and so ``--help``, imports neither torch nor mlflow.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

import typer

from reason import __version__
from reason.errors import ReasonError, writing
from reason.printable import say

INTERRUPTED, TERMINATED = 130, 143

# command -> (its panel in --help, the module under reason.cli and the function or app in it)
VERBS = {
    "run": ("Experiments", "run:run"),
    "sweep": ("Experiments", "sweep:sweep"),
    "resume": ("Experiments", "resume:resume"),
    "evaluate": ("Experiments", "evaluate:evaluate"),
    "list": ("Overview", "list:list_"),
    "show": ("Overview", "show:show"),
    "compare": ("Results", "compare:compare"),
    "study": ("Results", "study:study"),
    "inspect": ("Results", "inspect:inspect"),
    "predict": ("Results", "predict:predict"),
    "ui": ("Results", "ui:ui"),
    "doctor": ("Maintenance", "doctor:doctor"),
    "sync": ("Maintenance", "sync:sync"),
    "rm": ("Maintenance", "rm:rm"),
    "data": ("Maintenance", "data:app"),
}


def guarded(verb: Callable[..., Any]) -> Callable[..., Any]:
    """The verb with its errors reported to the user and turned into exit codes."""

    @functools.wraps(verb)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            with writing("A file"):
                return verb(*args, **kwargs)
        except ReasonError as error:
            _print_error(error)
            raise typer.Exit(error.exit_code) from None
        except MemoryError:  # a run says what to lower; here it is data, or tables of many runs
            _print_error(
                ReasonError(
                    "There is not enough memory.", "Close other programs, or ask for fewer runs or less data."
                )
            )
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None
        except BaseException as error:
            if type(error).__name__ == "Terminated":  # the launcher's, named so as not to import it here
                print("terminated", file=sys.stderr)
                raise typer.Exit(TERMINATED) from None
            raise

    return call


def _print_error(error: ReasonError) -> None:
    from rich.text import Text

    from reason.cli.output import stderr

    stderr().print(Text.assemble(("error:", "bold red"), f" {error.message}"), soft_wrap=True)
    if error.hint:
        stderr().print(error.hint, soft_wrap=True)


def _version(value: bool) -> None:
    if value:
        print(f"reason {__version__}")
        raise typer.Exit


def root(
    version: bool = typer.Option(
        False, "--version", help="Print the version and exit.", callback=_version, is_eager=True
    ),
) -> None:
    pass


def build(only: str | None = None) -> typer.Typer:
    """The command with all its verbs, or with one: loading a verb costs milliseconds that others need not pay."""
    app = typer.Typer(
        name="reason",
        no_args_is_help=True,
        rich_markup_mode="rich",
        pretty_exceptions_show_locals=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        help="Run five ways of giving a model more reasoning, sweep over their depth, and compare them on equal terms."
        "\n\nStart with [bold]reason run latent[/bold], then try [bold]reason list[/bold] and [bold]reason ui[/bold].",
    )
    app.callback()(root)
    for name, (panel, target) in VERBS.items():
        if only not in (None, name):
            continue
        module, _, attribute = target.partition(":")
        verb = getattr(importlib.import_module(f"reason.cli.{module}"), attribute)
        if isinstance(verb, typer.Typer):
            for command in verb.registered_commands:
                assert command.callback is not None
                command.callback = guarded(command.callback)
            app.add_typer(verb, name=name, rich_help_panel=panel)
        else:
            app.command(name, rich_help_panel=panel)(guarded(verb))
    return app


def main() -> None:
    """The console script."""
    completing = any(name.endswith("_COMPLETE") for name in os.environ)
    verb = sys.argv[1] if len(sys.argv) > 1 and not completing else None
    try:
        build(verb if verb in VERBS else None)(prog_name="reason")
    except BrokenPipeError:
        _reader_has_gone()
    except SystemExit as end:
        try:
            if sys.stdout is not None:
                sys.stdout.flush()
        except BrokenPipeError:
            _reader_has_gone()
        except OSError as error:
            say(f"error: The answer cannot be written: {error.strerror}.")
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            raise SystemExit(1) from None
        raise end


def _reader_has_gone() -> None:
    """Whoever read our answer wanted no more of it (`reason list | head -1`): nothing is wrong."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    raise SystemExit(0)
