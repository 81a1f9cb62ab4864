"""`reason sync`: bring MLflow up to date with the run folders."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from reason.cli.arguments import RUNS, Json, Runs
from reason.cli.output import emit_json, lines, say

if TYPE_CHECKING:
    from reason.tracking.mirror import Synced


def sync(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[RUN ...]", help="Runs or sweeps. Default: all.")
    ] = None,
    as_json: Json = False,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Move a damaged SQLite store aside and rebuild it.")
    ] = False,
    runs: Runs = RUNS,
) -> None:
    """Copy to MLflow what is missing there, and close interrupted runs.

    The run folders are authoritative, so this is safe to repeat.
    """
    from reason.errors import ConfigError
    from reason.tracking.mirror import sync as bring
    from reason.tracking.store import move_aside, shown, tracking_uri

    uri = tracking_uri()
    if rebuild and names:
        wrong = "--rebuild rebuilds the whole store and cannot be limited to some runs."
        raise ConfigError(wrong, "Remove the names of the runs.")
    if rebuild and (aside := move_aside(uri)):
        say(f"The damaged store was moved to {aside}.")
    report = bring(runs, uri, names or None)
    failed = [s for s in report if s.error]
    if as_json:
        rows = [
            {"run": s.name, "status": s.status, "created": s.change.created, "points": s.change.points,
             "files": s.change.files, "changed": s.change.details, "error": s.error or None}
            for s in report
        ]  # fmt: skip
        emit_json({"store": shown(uri), "runs": rows})
    elif report:
        lines("runs", [["run", "status", "in MLflow"], *map(_line, report)])
    if not as_json:
        same = sum(not s.change and not s.error for s in report)
        updated = len(report) - same - len(failed)
        say(f"{len(report)} runs in {shown(uri)}: {updated} updated, {same} already up to date.")
    if failed:
        raise typer.Exit(1)


def _line(s: Synced) -> list[str]:
    parts = ["new"] if s.change.created else []
    parts += [f"{n} {word}" for n, word in ((s.change.points, "points"), (s.change.files, "files")) if n]
    parts += s.change.details
    return [s.name, s.status, f"failed: {s.error}" if s.error else ", ".join(parts) or "up to date"]
