"""What a run has cost, read from its folder: whatever became of its attempts, all of them count."""

from __future__ import annotations

from reason.tracking.clock import device_hours
from reason.tracking.folder import RunFolder


def costs(folder: RunFolder, owner: RunFolder, devices: int, on_gpu: bool) -> dict[str, float]:
    """The hours of a run as ``result.json`` has them, named as MLflow shows them.

    ``device_hours`` are the run's own. ``lineage_device_hours`` are what it took to have these numbers: with
    the training of the model that was taken over from ``owner``, and with the stages that the model stands on.
    GPU-hours are device-hours held on GPUs: 0 on a CPU.
    """
    own, trained = device_hours(folder, devices)["total"], device_hours(owner, devices)["train"]
    found = {
        "device_hours": own, "train_device_hours": trained, "gpu_hours": own if on_gpu else 0.0,
        "lineage_device_hours": own, "lineage_gpu_hours": own if on_gpu else 0.0,
    }  # fmt: skip
    if owner.path != folder.path:
        found["lineage_device_hours"] += trained
        found["lineage_gpu_hours"] += trained if owner.result and owner.result.gpus else 0.0
    for stage in lineage(owner):
        spent = stage.result.metrics if stage.result else {}
        for name in ("device_hours", "gpu_hours"):
            found[f"lineage_{name}"] += spent.get(name, 0.0)
    return found


def lineage(folder: RunFolder) -> list[RunFolder]:
    """The runs that a run's model stands on: its stages, theirs, and so on; each once."""
    found: dict[str, RunFolder] = {}
    waiting = [folder]
    while waiting:
        here = waiting.pop()
        for name in here.identity.get("stages", {}).values():
            if name not in found:
                found[name] = RunFolder(folder.path.parent / name)
                waiting.append(found[name])
    return list(found.values())
