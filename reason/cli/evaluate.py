"""`reason evaluate`: judge a trained run again, at another depth or on another share of the data."""

from __future__ import annotations

from reason.cli.arguments import RUNS, Device, Overrides, RunName, Runs
from reason.cli.run import draw_result


def evaluate(run: RunName, overrides: Overrides = None, device: Device = None, runs: Runs = RUNS) -> None:
    """Evaluate the model of a run as a new run, without training.

    Example: reason evaluate last depth=1 eval.limit=100
    """
    from reason.engine import runner
    from reason.engine.layers import split
    from reason.engine.session import model_owner, recorded_plan
    from reason.errors import RunError
    from reason.tracking.folder import FINISHED, RunFolder

    folder = RunFolder.find(run, runs)
    if folder.status != FINISHED:
        wrong = f"{folder.name} is {folder.status}: it has no model to evaluate yet."
        raise RunError(wrong, folder.unfinished)
    keys = dict(split(word) for word in overrides or [])
    if device is not None:
        keys["hardware.device"] = device
    plan = recorded_plan(folder, {"runs": str(folder.path.parent), **keys})
    draw_result(runner.run(plan, model=model_owner(folder)))
