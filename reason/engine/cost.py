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
    GPU-hours are device-hours held on GPUs: 0 on a CPU. What cannot be known any more is left out, also where
    events were lost: a part of the hours is no answer.
    """
    if folder.log_problem("events.jsonl") is not None:
        return {}
    spent, mine = device_hours(folder, devices), owner.path == folder.path
    own, trained = spent["total"], spent["train"] if mine else _training(owner, devices)
    found = {"device_hours": own, "gpu_hours": own if on_gpu else 0.0}
    if trained is None:
        return found
    found["train_device_hours"] = trained
    for name in ("device_hours", "gpu_hours"):
        if mine:
            with suppress(DamagedRun, KeyError):  # a stage was deleted, or has lost its hours
                stages = sum(stage.result.metrics[name] for stage in lineage(folder) if stage.result)
                found[f"lineage_{name}"] = found[name] + stages
        elif (theirs := owner.result) is not None:  # its stages may be gone by now: it says what they cost
            stages = theirs.metrics.get(f"lineage_{name}", theirs.metrics[name]) - theirs.metrics[name]
            training = trained if name == "device_hours" or theirs.gpus else 0.0
            found[f"lineage_{name}"] = found[name] + training + stages
    return found


def _training(owner: RunFolder, devices: int) -> float | None:
    """The device-hours that a run has trained for, by its result where it has one; None where they were lost."""
    if (result := owner.result) is not None:
        return result.metrics.get("train_device_hours")
    lost = owner.log_problem("events.jsonl")
    return None if lost else device_hours(owner, devices)["train"]


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
