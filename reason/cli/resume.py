"""`reason resume`: go on with what was interrupted."""

from __future__ import annotations

from reason.cli.arguments import RUNS, RunName, Runs
from reason.cli.run import draw_result
from reason.cli.sweep import draw_sweep


def resume(run: RunName, runs: Runs = RUNS) -> None:
    """Finish a run from its last checkpoint, or a sweep from its plan.

    Example: reason resume last
    """
    from reason.engine import runner
    from reason.engine import sweep as engine
    from reason.tracking.folder import RunFolder

    folder = RunFolder.find(run, runs)
    if folder.identity.get("kind") == "sweep":
        draw_sweep(engine.resume_sweep(folder))
    else:
        draw_result(runner.resume(folder))
