"""`reason list`: what can be run, and what has been."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from reason.cli.arguments import RUNS, Json, Runs

KINDS = ("methods", "experiments", "sweeps", "datasets", "backbones", "runs")


def list_(
    kind: Annotated[
        str, typer.Argument(metavar="[KIND]", help=f"One of {', '.join(KINDS)}; by default all but runs.")
    ] = "",
    json: Json = False,
    runs: Runs = RUNS,
) -> None:
    """List methods, experiments, sweeps, datasets, backbones or runs."""
    from reason.cli.output import emit_json, lines, stderr, stdout
    from reason.errors import unknown

    if kind and kind not in KINDS:
        raise unknown("kind", kind, KINDS)
    shown = {k: _rows(k, runs) for k in ([kind] if kind else [k for k in KINDS if k != "runs"])}
    warnings = [w for _, _, warned in shown.values() for w in warned]
    if json:
        emit_json(
            {k: [dict(zip(heads, row, strict=True)) for row in rows] for k, (heads, rows, _) in shown.items()}
        )
    else:
        for k, (columns, rows, _) in shown.items():
            if k == "runs":  # thousands, which a table would take seconds to draw
                lines(k, [columns, *(rows or [["(none)"]])])
            else:
                stdout().print(_table(k, columns, rows))
        if not kind:
            stdout().print(
                "Start with `reason run latent`. `reason show NAME` explains an entry; `reason list runs` shows your runs."
            )
    for warning in warnings:
        stderr().print(f"warning: {warning}")


def _table(kind: str, columns: list[str], rows: list[list[str]]):
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=kind, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, no_wrap=i == 0, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    if not rows:
        table.add_row("(none)", *[""] * (len(columns) - 1))
    return table


def _rows(kind: str, runs) -> tuple[list[str], list[list[str]], list[str]]:
    from reason import registry
    from reason.engine import layers

    if kind == "runs":
        return _runs(runs)
    if kind in ("experiments", "sweeps"):
        what, found = ("run", layers.sweeps()) if kind == "sweeps" else ("method", layers.experiments())
        rows = [[n, str(b.get(what, n)), str(b.get("summary", ""))] for n, b in found.items()]
        return ["name", what, "summary"], rows, []
    cards, warnings = registry.cards(kind)
    if kind == "methods":
        return ["name", "depth", "summary"], [[c.name, c.depth.unit, c.summary] for c in cards], warnings
    if kind == "datasets":
        rows = [[c.name, ", ".join(c.views), c.summary] for c in cards]
        return ["name", "views", "summary"], rows, warnings
    return ["name", "kind", "summary"], [[c.name, c.kind, c.summary] for c in cards], warnings


def _runs(root) -> tuple[list[str], list[list[str]], list[str]]:
    from reason.tracking.folder import RunFolder
    from reason.tracking.overview import overviews

    rows, problems = [], []
    for run in sorted(
        overviews(root), key=lambda run: run.created
    ):  # what has no time of creation comes first
        status = "damaged" if run.problem else run.status
        made = time.strftime("%Y-%m-%d %H:%M", time.localtime(run.created)) if run.kind else ""
        rows.append([run.name, status, "" if run.depth is None else str(run.depth), run.accuracy, made])
        problems += [f"{run.problem.message} {run.problem.hint}"] if run.problem else []
    lost = RunFolder.leftovers(root)
    problems += [
        f"{folder.name} was left behind by a run that ended before it started. Delete it with: reason rm {folder.name}"
        for folder in lost
    ]
    rows[:0] = [[folder.name, "never started", "", "", ""] for folder in lost]
    return ["run", "status", "depth", "accuracy", "created"], rows, problems
