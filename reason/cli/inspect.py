"""`reason inspect`: see what happened on one example."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reason.cli.arguments import RUNS, Json, RunName, Runs


def inspect(
    run: RunName,
    example: Annotated[
        str, typer.Argument(metavar="[EXAMPLE]", help="Id of an example; left out, the method chooses one.")
    ] = "",
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Also write the figures as one picture.", show_default=False)
    ] = None,
    json: Json = False,
    runs: Runs = RUNS,
) -> None:
    """Show one example step by step: in the terminal, and as a picture with --plot.

    Example: reason inspect last 196 --plot user.png
    """
    from reason.cli.output import emit_json, say, stdout
    from reason.engine.session import open_run
    from reason.reports.figures import as_dict
    from reason.reports.plots import draw_figures
    from reason.reports.terminal import figure
    from reason.tracking.folder import RunFolder

    figures = open_run(RunFolder.find(run, runs)).inspect(example)
    if json:
        emit_json({"figures": [as_dict(f) for f in figures]})
    else:
        for f in figures:
            stdout().print(figure(f))
    if plot is not None:
        draw_figures(figures, plot)
        say(f"picture: {plot}")
