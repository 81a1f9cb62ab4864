"""The run folder: the one true record of a run. MLflow is its mirror.

    runs/<experiment>-<config_hash8>-<n>/
        config.yaml      every key as resolved          origin.json   the layer that set each key
        run.json         identity: hashes, command, parent, creation time
        env.json         provenance: commit, versions, machine          git.diff
        events.jsonl     what happened to the run as a whole, with times (attempts, phases, closing)
        metrics.jsonl    points of curves: {"name", "value", "step", "time"}
        checkpoints/     the last two states of training    model/        the trained model
        rows/            one row per example of each evaluation, Arrow
        log.txt          what the run said (log-rank1.txt ... for further ranks)
        result.json      written last, by rename: if it is there, the run is finished

Whoever executes a run holds the lock on its folder; the operating system drops it with the
process, however that ends. So the state of a run needs no bookkeeping: see ``RunFolder.status``.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from reason.errors import ConfigError, RunError, nearest
from reason.files import read_json, write_json

FINISHED, FAILED, KILLED, RUNNING, INTERRUPTED = "finished", "failed", "killed", "running", "interrupted"


class RunFolder:
    """One run on disk. Cheap to make: nothing is read until it is asked for."""

    def __init__(self, path: Path | str):
        self.path = Path(path)

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def name(self) -> str:
        return self.path.name

    # --- making and finding ----------------------------------------------------------------

    @classmethod
    def create(cls, root: Path | str, experiment: str, config_hash: str) -> RunFolder:
        """A fresh folder with the next free number. Two processes never get the same one.

        Raises:
            ConfigError: the root cannot be written.
        """
        root = Path(root)
        stem = f"{re.sub(r'[^A-Za-z0-9._-]+', '_', experiment)}-{config_hash[:8]}"
        try:
            root.mkdir(parents=True, exist_ok=True)
            number = 1
            while True:
                path = root / f"{stem}-{number}"
                try:
                    path.mkdir()
                    break
                except FileExistsError:
                    number += 1
            for inner in ("checkpoints", "rows"):
                (path / inner).mkdir()
        except OSError as error:
            raise ConfigError(
                f"Cannot make a run folder under {root}: {error.strerror or error}.",
                "Choose a folder that can be written: runs=PATH.",
            ) from error
        return cls(path)

    @classmethod
    def find(cls, name: str, root: Path | str) -> RunFolder:
        """The run called ``name`` (a folder, its name, a unique beginning of it, or ``last``).

        Raises:
            ConfigError: no run, or several, go by that name.
        """
        direct = Path(name)
        if (direct / "run.json").is_file():
            return cls(direct.absolute().resolve())
        runs = {run.name: run for run in cls.all(root)}
        if name in runs:
            return runs[name]
        if name == "last" and runs:
            return max(runs.values(), key=lambda run: run.identity.get("created", 0.0))
        starts = [run for key, run in runs.items() if key.startswith(name)]
        if len(starts) == 1:
            return starts[0]
        if starts:
            raise ConfigError(
                f"{name!r} is the beginning of {len(starts)} runs.",
                "Say which: " + ", ".join(r.name for r in starts[:8]),
            )
        close = nearest(name, runs)
        raise ConfigError(
            f"There is no run {name!r} under {root}.",
            f"Did you mean {close!r}?" if close else "`reason list runs` shows what there is.",
        )

    @classmethod
    def all(cls, root: Path | str) -> list[RunFolder]:
        """Every run under ``root``, oldest name first. Folders without run.json are not runs."""
        root = Path(root)
        if not root.is_dir():
            return []
        return [cls(p) for p in sorted(root.iterdir()) if (p / "run.json").is_file()]

    # --- what is in it ---------------------------------------------------------------------

    @property
    def identity(self) -> dict[str, Any]:
        """run.json: experiment, method, config_hash, train_hash, parent, trained_by, created, argv."""
        return read_json(self / "run.json")

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration as nested plain values."""
        import yaml

        return yaml.safe_load((self / "config.yaml").read_text(encoding="utf-8"))

    @property
    def result(self) -> dict[str, Any] | None:
        """result.json, or None while there is none."""
        try:
            return read_json(self / "result.json")
        except FileNotFoundError:
            return None
        except json.JSONDecodeError as error:
            raise RunError(
                f"{self / 'result.json'} is not valid JSON ({error}).",
                "Delete it and `reason resume` the run.",
            ) from error

    def write_result(self, result: dict[str, Any]) -> None:
        """The last act of a run. After it the run is finished."""
        write_json(self / "result.json", result)

    @property
    def status(self) -> str:
        """finished | running | failed | killed | interrupted, from the files and the lock alone."""
        if (self / "result.json").exists():
            return FINISHED
        if self.is_locked():
            return RUNNING
        last = self._last_of("attempt", "closed")
        if last is None or last["event"] != "closed" or last["status"] == FINISHED:
            return (
                INTERRUPTED  # closed as finished, and yet no result: it was deleted and has to be made again
            )
        return last["status"]

    def settle(self) -> str:
        """The status, once an attempt that ended without a word is closed, at its last sign of life."""
        status, last = self.status, self._last_of("attempt", "closed")
        if status in (RUNNING, FAILED, KILLED) or last is None or last["event"] == "closed":
            return status
        closing = FINISHED if status == FINISHED else KILLED
        self.event("closed", status=closing, until=self.last_beat, why="the process ended without a word")
        return self.status

    def _last_of(self, *names: str) -> dict[str, Any] | None:
        return next((e for e in reversed(self.events()) if e["event"] in names), None)

    # --- the log of events and points ------------------------------------------------------

    def event(self, event: str, **data: Any) -> None:
        """Append one event with the time of day."""
        self._append("events.jsonl", [{"event": event, "time": time.time(), **data}])

    def events(self) -> list[dict[str, Any]]:
        return list(self._lines("events.jsonl"))

    def log_points(self, points: list[dict[str, Any]]) -> None:
        """Append points of curves: {"name", "value", "step", "time"}."""
        self._append("metrics.jsonl", points)

    def points(self, offset: int = 0, end: int | None = None) -> tuple[list[dict[str, Any]], int]:
        """Points from byte ``offset`` on (up to ``end``), and the offset after the last whole line."""
        path = self / "metrics.jsonl"
        if not path.exists():
            return [], offset
        with open(path, "rb") as f:
            f.seek(offset)
            data = f.read() if end is None else f.read(end - offset)
        whole = data[: data.rfind(b"\n") + 1]
        points = []
        for line in whole.splitlines():
            try:
                points.append(json.loads(line))
            except ValueError:  # a line torn by a kill
                continue
        return points, offset + len(whole)

    def _append(self, name: str, rows: list[dict[str, Any]]) -> None:
        if rows:
            data = "".join(json.dumps(row) + "\n" for row in rows).encode()
            path = self / name
            torn = path.exists() and path.stat().st_size > 0 and _last_byte(path) != b"\n"
            with open(path, "ab") as f:  # one write, so that lines of several processes do not mix
                f.write(b"\n" + data if torn else data)

    def _lines(self, name: str) -> Iterator[dict[str, Any]]:
        try:
            text = (self / name).read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return
        for line in text.splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                continue

    # --- the lock --------------------------------------------------------------------------

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run. The last beat stays what it was, so that it can tell when a killed attempt ended.

        Raises:
            RunError: another process holds it.
        """
        import filelock

        lock = filelock.FileLock(self / "lock")
        try:
            lock.acquire(timeout=0.5, poll_interval=0.02)  # outlasts the blink of someone's ``is_locked``
        except filelock.Timeout as error:
            raise RunError(
                f"{self.name} is being executed by another process.", "Wait for it, or stop that process."
            ) from error
        try:
            yield
        finally:
            lock.release()

    def is_locked(self) -> bool:
        import filelock

        if not (self / "lock").exists():
            return False
        lock = filelock.FileLock(self / "lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            return True
        lock.release()
        return False

    def beat(self) -> None:
        """Sign of life. ``last_beat`` bounds the cost of an attempt that was killed."""
        (self / "alive").touch()

    @property
    def last_beat(self) -> float:
        try:
            return os.path.getmtime(self / "alive")
        except FileNotFoundError:
            return 0.0


def _last_byte(path: Path) -> bytes:
    with open(path, "rb") as f:
        f.seek(-1, os.SEEK_END)
        return f.read(1)
