"""`reason compare`: runs side by side, on the same footing or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reason.cli.arguments import RUNS, Json, Names, Plot, Runs


def compare(
    names: Names = None,
    best: Annotated[
        bool, typer.Option("--best", help="Show only the depth and settings chosen on validation.")
    ] = False,
    json: Json = False,
    csv: Annotated[bool, typer.Option("--csv", help="Print the rows as CSV to stdout.")] = False,
    plot: Annotated[
        Path | None, Plot(help="Also plot accuracy against depth, tokens, FLOPs, latency and device-hours.")
    ] = None,
    runs: Runs = RUNS,
) -> None:
    """Compare finished runs: 95% confidence intervals and paired differences from the base.

    Example: reason compare latent --plot latent.png
    """
    from reason.cli.output import emit_csv, emit_json, say, show
    from reason.errors import ConfigError

    if json and csv:
        raise ConfigError("--json and --csv cannot be used together.", "Choose one.")
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
            say(f"Image: {path}")
