"""`reason rm`: delete runs, here and in the MLflow store."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from reason.cli.arguments import RUNS, Runs
from reason.printable import say


def rm(
    names: Annotated[
        list[str], typer.Argument(metavar="RUN ...", help="Runs or sweeps to delete, by full name or path.")
    ],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")] = False,
    runs: Runs = RUNS,
) -> None:
    """Delete run folders and mark their MLflow runs as deleted.

    A run whose model other runs use can be deleted only together with them.
    """
    from reason.errors import ConfigError, RunError
    from reason.tracking.folder import RUNNING
    from reason.tracking.removal import check_unused, deletable, delete, held

    chosen = list({(r := deletable(name, runs)).path.absolute(): r for name in names}.values())
    for folder in chosen:
        if folder.status == RUNNING:
            raise RunError(f"{folder.name} is running.", "Stop it first.")
    check_unused(chosen)
    if not yes:
        if not sys.stdin.isatty():
            raise ConfigError(
                "Deleting needs confirmation, but there is no terminal to ask in.", "Add --yes to confirm."
            )
        typer.confirm(f"Delete {', '.join(sorted(r.name for r in chosen))}?", abort=True, err=True)
    with held(chosen):  # a run that was resumed while we asked is not deleted
        check_unused(chosen)
        for folder in chosen:
            delete(folder)
            say(f"deleted {folder.name}")
