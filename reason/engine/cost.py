"""What a run has cost, read from its folder: whatever became of its attempts, all of them count."""

from __future__ import annotations

from contextlib import suppress

from reason.errors import DamagedRun
from reason.tracking.clock import device_hours
from reason.tracking.folder import RunFolder


def costs(folder: RunFolder, owner: RunFolder, devices: int, on_gpu: bool) -> dict[str, float]:
    """The hours of a run as ``result.json`` has them, named as MLflow shows them.

    ``device_hours`` are the run's own. ``lineage_device_hours`` are what it took to have these numbers: with
    the training of the model that was taken over from ``owner``, and with the stages that the model stands on.
    GPU-hours are device-hours held on GPUs: 0 on a CPU. What cannot be known any more is left out.
    """
    own, trained = device_hours(folder, devices)["total"], device_hours(owner, devices)["train"]
    found = {"device_hours": own, "train_device_hours": trained, "gpu_hours": own if on_gpu else 0.0}
    for name in ("device_hours", "gpu_hours"):
        if owner.path == folder.path:
            with suppress(DamagedRun):  # a stage was deleted
                stages = sum(stage.result.metrics[name] for stage in lineage(folder) if stage.result)
                found[f"lineage_{name}"] = found[name] + stages
        elif (theirs := owner.result) is not None:  # its stages may be gone by now: it says what they cost
            stages = theirs.metrics.get(f"lineage_{name}", theirs.metrics[name]) - theirs.metrics[name]
            training = trained if name == "device_hours" or theirs.gpus else 0.0
            found[f"lineage_{name}"] = found[name] + training + stages
    return found


def lineage(folder: RunFolder) -> list[RunFolder]:
    """The runs that a run's model stands on: its stages, theirs, and so on; each once.

    Raises:
        DamagedRun: one of them has been deleted, or cannot be read.
    """
    found: dict[str, RunFolder] = {}
    waiting = [folder]
    while waiting:
        here = waiting.pop()
        for name in here.identity.get("stages", {}).values():
            if name not in found:
                found[name] = RunFolder(folder.path.parent / name)
                waiting.append(found[name])
    return list(found.values())
