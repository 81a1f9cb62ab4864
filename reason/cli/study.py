"""`reason study`: whether deeper reasoning is worth it, for whom, and at what cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from reason.cli.arguments import RUNS, Json, Names, Plot, Runs


def study(
    names: Names = None,
    json: Json = False,
    plot: Annotated[
        Path | None, Plot(help="Also plot accuracy against mean depth, and the gain from depth by group.")
    ] = None,
    runs: Runs = RUNS,
) -> None:
    """Study whether deeper reasoning pays off: who gains, how much is luck, and at what cost.

    Example: reason study latent --plot study.png
    """
    from reason.cli.output import emit_json, say, show

    if plot is not None:
        from reason.reports.plots import check_picture

        check_picture(plot)
    from reason.reports.study import as_dict, studies

    found = studies(runs, names or [])
    if json:
        emit_json({"schema": 1, "studies": [as_dict(s) for s in found]})
    else:
        from reason.reports.study.views import StudyView

        for one in found:
            show(StudyView(one))
    for remark in dict.fromkeys(n for s in found for n in s.evidence.notes):
        say(remark)
    if plot is not None:
        from reason.reports.study.picture import draw_studies

        for path in draw_studies(found, plot):
            say(f"Image: {path}")
