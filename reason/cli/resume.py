"""`reason resume`: continue what was interrupted."""

from __future__ import annotations

from reason.cli.arguments import RUNS, Device, Gpus, RunName, Runs
from reason.cli.run import draw_result
from reason.cli.sweep import draw_sweep


def resume(run: RunName, gpus: Gpus = None, device: Device = None, runs: Runs = RUNS) -> None:
    """Continue an interrupted run from its last checkpoint, or an interrupted sweep.

    Example: reason resume last
    """
    from reason.engine import runner
    from reason.engine import sweep as engine
    from reason.errors import ConfigError
    from reason.tracking.folder import FINISHED, RunFolder

    folder = RunFolder.find(run, runs)
    while run == "last":  # the newest may be a stage or a trial: what was interrupted is what it is part of
        above = folder.identity.get("stage_of") or folder.identity.get("parent")
        if not above or RunFolder(folder.path.parent / above).status == FINISHED:
            break
        folder = RunFolder(folder.path.parent / above)
    keys = {k: v for k, v in {"hardware.gpus": gpus, "hardware.device": device}.items() if v is not None}
    if folder.identity.get("kind") == "sweep":
        if keys:
            raise ConfigError(
                "A sweep is resumed on the devices it was started on.", "Remove --device and --gpus."
            )
        draw_sweep(engine.resume_sweep(folder), picture=True)
    else:
        draw_result(runner.resume(folder, keys))
