"""`reason rm`: delete runs, here and in the MLflow store."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from reason.cli.arguments import RUNS, Runs


def rm(
    names: Annotated[list[str], typer.Argument(metavar="RUN ...", help="Runs or sweeps to delete.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    runs: Runs = RUNS,
) -> None:
    """Delete run folders and mark their MLflow runs deleted.

    A run whose model others use is kept until those are gone.
    """
    import shutil

    from reason.errors import ConfigError, RunError
    from reason.tracking.folder import RUNNING, RunFolder
    from reason.tracking.mirror import forget

    chosen = list({(r := RunFolder.find(name, runs)).path.resolve(): r for name in names}.values())
    gone = {r.path.resolve() for r in chosen}
    for folder in chosen:
        if folder.status == RUNNING:
            raise RunError(f"{folder.name} is running.", "Stop it first.")
        users = [
            r.name
            for r in RunFolder.all(folder.path.parent)
            if r.identity.get("trained_by") == folder.name and r.path.resolve() not in gone
        ]
        if users:
            raise ConfigError(
                f"{', '.join(users[:3])} use the model of {folder.name}.",
                "Delete them too, in the same command.",
            )
    if not yes:
        if not sys.stdin.isatty():
            raise ConfigError("Deleting asks for consent, and there is no terminal to ask on.", "Add --yes.")
        typer.confirm(f"Delete {', '.join(sorted(r.name for r in chosen))}?", abort=True, err=True)
    for folder in chosen:
        forget(folder)
        shutil.rmtree(folder.path)
        print(f"deleted {folder.name}", file=sys.stderr)
