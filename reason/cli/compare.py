"""`reason compare`: runs side by side, on the same footing or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reason.cli.arguments import RUNS, Json, Names, Runs


def compare(
    names: Names = None,
    best: Annotated[
        bool, typer.Option("--best", help="Only the depth and settings that validation prefers.")
    ] = False,
    json: Json = False,
    csv: Annotated[bool, typer.Option("--csv", help="One line per row, as CSV on stdout.")] = False,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot",
            metavar="FILE",
            help="Also draw accuracy against depth, hours and latency.",
            show_default=False,
        ),
    ] = None,
    runs: Runs = RUNS,
) -> None:
    """Rank finished runs with 95% intervals and paired differences to the base.

    Example: reason compare latent --plot latent.png
    """
    from reason.cli.output import emit_csv, emit_json, say, show
    from reason.errors import ConfigError

    if json and csv:
        raise ConfigError("--json and --csv are two forms of the same answer.", "Choose one of them.")
    if plot is not None:
        from reason.reports.plots import check_picture

        check_picture(plot)
    from reason.reports.comparison import as_dict, as_lines
    from reason.reports.comparison import compare as compare_runs

    tables = compare_runs(runs, names or [], best=best)
    if json:
        emit_json({"schema": 1, "tables": [as_dict(t) for t in tables]})
    elif csv:
        emit_csv([line for t in tables for line in as_lines(t)])
    else:
        from reason.reports.summaries import comparison

        for table in tables:
            show(comparison(table))
    for remark in dict.fromkeys(remark for t in tables for remark in [*t.notes, *t.hints]):
        say(remark)
    if plot is not None:
        from reason.reports.plots import draw_comparisons

        for path in draw_comparisons(tables, plot):
            say(f"picture: {path}")
