"""What is worth knowing of each run without opening it: for lists, and for choosing whom to read."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reason.errors import DamagedRun
from reason.tracking.folder import FINISHED, RunFolder
from reason.tracking.index import Index, names_of, state

_FILES = (
    "run.json", "config.yaml", "plan.json", "result.json", "origin.json", "env.json", "calibration.json", "events.jsonl",
)  # fmt: skip


@dataclass(kw_only=True)
class Overview:
    """A run or a sweep at a glance. What stands in a file that cannot be read is None or empty."""

    root: Path | str
    name: str  # of its folder
    kind: str = ""  # "run" | "sweep"; "" where run.json is damaged
    experiment: str = ""
    method: str = ""
    parent: str | None = None
    created: float = 0.0
    finished: bool = False  # has a result.json
    closed: bool = False  # the end of its last attempt is noted
    # Of the result of a run:
    depth: int | None = None
    train_depth: int | None = None
    backbone: str = ""
    data_digest: str = ""
    accuracy: str = ""  # its name and value
    problem: DamagedRun | None = None  # ``RunFolder.problem``

    @property
    def folder(self) -> RunFolder:
        return RunFolder(Path(self.root, self.name))

    @property
    def status(self) -> str:
        """``RunFolder.settle``, or without closing anything where the folder cannot be written."""
        if self.finished and self.closed:
            return FINISHED
        try:
            return self.folder.settle()
        except OSError:
            return self.folder.status


def overviews(root: Path | str) -> list[Overview]:
    """Every run and sweep under ``root``, damaged ones too, oldest name first."""
    index, names, where, found = Index.of(root, "overviews"), names_of(root), str(root), []
    for name in names:
        now = state(f"{where}/{name}", _FILES)
        if told := index.recall(name, now):
            found.append(Overview(root=root, name=name, **told))
        elif (folder := RunFolder(Path(root, name))).exists:
            told = _read(folder)
            if told["problem"] is None:  # what cannot be read may be so for one user and not for another
                index.keep(name, now, {key: value for key, value in told.items() if key != "problem"})
            found.append(Overview(root=root, name=name, **told))
    index.save(names)
    return found


def _read(folder: RunFolder) -> dict[str, Any]:
    told: dict[str, Any] = {"problem": folder.problem}
    try:
        identity = folder.identity
    except DamagedRun:
        return told
    told |= {key: identity[key] for key in ("kind", "experiment", "method", "parent", "created")}
    told |= {"finished": (folder / "result.json").exists(), "closed": folder.is_closed}
    with suppress(DamagedRun):
        if identity["kind"] == "run" and (result := folder.result):
            told |= {key: getattr(result, key) for key in ("depth", "train_depth", "backbone", "data_digest")}
            told["accuracy"] = f"{result.accuracy.name} {result.accuracy.value:.4f}"
    return told
