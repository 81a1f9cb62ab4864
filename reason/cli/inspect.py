"""`reason inspect`: see what happened on one example."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reason.cli.arguments import RUNS, Json, Plot, RunName, Runs


def inspect(
    run: RunName,
    example: Annotated[
        str, typer.Argument(metavar="[EXAMPLE]", help="Id of an example; by default the method chooses one.")
    ] = "",
    plot: Annotated[Path | None, Plot(help="Also save the figures as an image (PNG, PDF or SVG).")] = None,
    html: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", help="Also save them as one self-contained HTML page."),
    ] = None,
    json: Json = False,
    runs: Runs = RUNS,
) -> None:
    """Show one example step by step in the terminal; also as an image (--plot) or a web page (--html).

    Example: reason inspect last 196 --html user.html
    """
    if plot is not None:
        from reason.reports.plots import check_picture

        check_picture(plot)
    if html is not None:
        from reason.reports.html import check_page

        check_page(html)
    from reason.cli.output import emit_json, say, show
    from reason.engine.session import open_run
    from reason.tracking.folder import RunFolder

    loaded = open_run(RunFolder.find(run, runs))
    figures = loaded.inspect(example)
    if json:
        from reason.methods.figures import as_dict

        emit_json({"figures": [as_dict(f) for f in figures]})
    else:
        from reason.reports.terminal import figure

        for f in figures:
            show(figure(f))
    if plot is not None:
        from reason.reports.plots import draw_figures

        draw_figures(figures, plot)
        say(f"Image: {plot}")
    if html is not None:
        from reason.files import atomic
        from reason.reports.html import about, page

        with atomic(html) as f:
            f.write(page(figures, **about(loaded.result, example)))
        say(f"Page: {html}")
