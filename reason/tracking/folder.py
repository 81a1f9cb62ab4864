"""The run folder: the one true record of a run. MLflow is its mirror.

    runs/<experiment>-<config_hash8>-<n>/
        config.yaml      every key as resolved          origin.json   the layer that set each key
        run.json         identity: hashes, command, parent, creation time
        env.json         provenance: commit, versions, machine          git.diff
        events.jsonl     what happened to the run as a whole, and when (attempts, phases, closing)
        metrics.jsonl    points of curves: {"name", "value", "step", "time"}
        checkpoints/     the last two states of training    model/        the trained model
        rows/            one row per example of each evaluation, Arrow
        log.txt          what the run said (log-rank1.txt ... for further ranks)
        alive            written each second while an attempt goes on, with the sizes of both logs; lock: held by whoever executes the run
        result.json      written last, by rename: if it is there, the run is finished
    runs/.index-*.jsonl  what was read of runs that have not changed since; may be deleted at any time

Whoever executes a run holds the lock on its folder; the operating system drops it with the
process, however that ends. So the state of a run needs no bookkeeping: see ``RunFolder.status``.

Every file carries a checksum, or ``result.json`` holds it. A file that cannot be read, or is not what was written,
raises ``DamagedRun``, which says how to be rid of the damage. Whoever goes
over many runs uses ``RunFolder.scan``, so that one damaged folder does not hide the others, and what was
read of runs that have not changed is taken from an index (``reason.tracking.index``).
"""

from __future__ import annotations

import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from reason.errors import ConfigError, DamagedRun, RunError, nearest
from reason.files import (
    Altered,
    append_json_lines,
    atomic,
    check_content,
    check_signature,
    content,
    is_locked,
    json_line,
    parse_json_line,
    read_json,
    read_json_lines,
    signed,
    write_json,
)
from reason.tracking.clock import Instant
from reason.tracking.index import Index, names_of, state
from reason.tracking.result import Kind, Result, SweepResult, from_json, to_json

FINISHED, FAILED, KILLED, RUNNING, INTERRUPTED = "finished", "failed", "killed", "running", "interrupted"

NAME = re.compile(r".+-[0-9a-f]{8}-\d+")  # <experiment>-<hash8>-<n>
INNER = ("checkpoints", "rows")
LEFTOVER_S = 60.0  # a folder without run.json that is younger may be a run that is just starting

# What to do about a file that cannot be read. Without its mend here, a run is lost with the file.
_MENDS = {
    "result.json": "Delete the file, then run `reason resume {name}`.",
    "origin.json": "Delete the file; only the record of which layer set each key is lost.",
    "env.json": "Delete the file; only the record of the commit, the versions and the machine is lost.",
    "calibration.json": "`reason resume {name}` fits it again.",
    "events.jsonl": "What it has cost until now is not known any more; the hours in a result.json are not affected.",
    "alive": "What it has cost until now is not known any more; the hours in a result.json are not affected.",
    "metrics.jsonl": "Points of its curves are lost; its results are not affected.",
}
LOGS = ("events.jsonl", "metrics.jsonl")
# What is in a run folder beside what was made by training and judging
_RECORDS = {
    "run.json", "config.yaml", "origin.json", "env.json", "git.diff", "result.json", "mlflow.json", "failure.json",
    "audit.jsonl", "alive",
}  # fmt: skip
_NOT_KEPT = re.compile(r"checkpoints/.*|.*\.lock|lock|log.*\.txt|(.*/)?\..*")
_IDENTITY: dict[str, type | tuple[type, ...]] = {
    "kind": str, "experiment": str, "method": str, "config_hash": str, "train_hash": str, "created": (int, float),
    "parent": (str, type(None)), "trained_by": (str, type(None)),
}  # fmt: skip


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
        """A fresh folder with the next free number, for its owner alone. Two processes never get the same one.

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
                    path.mkdir(mode=0o700)
                    break
                except FileExistsError:
                    number += 1
            try:
                for inner in INNER:
                    (path / inner).mkdir()
            except OSError:  # a full disk: leave no half of a folder
                shutil.rmtree(path, ignore_errors=True)
                raise
        except OSError as error:
            raise ConfigError(
                f"Cannot create a run folder under {root}: {error.strerror or error}.",
                "Choose a writable folder: runs=PATH.",
            ) from error
        return cls(path)

    @classmethod
    def find(cls, name: str, root: Path | str) -> RunFolder:
        """The run called ``name`` (a folder, its name, a unique beginning of it, or ``last``).

        Raises:
            ConfigError: no run, or several, go by that name.
        """
        if not name:
            raise ConfigError("The name of the run is empty.", "`reason list runs` lists the runs.")
        direct = Path(name)
        if _is_file(direct / "run.json"):
            return cls(direct.absolute().resolve())
        runs = {run.name: run for run in cls.all(root)}
        if name in runs:
            return runs[name]
        if name == "last":
            created = {n: told["created"] for n, told in cls._identities(root) if isinstance(told, dict)}
            if created:
                return runs[max(created, key=created.__getitem__)]
        starts = [run for key, run in runs.items() if key.startswith(name)]
        if len(starts) == 1:
            return starts[0]
        if starts:
            raise ConfigError(
                f"{name!r} matches {len(starts)} runs.",
                "Choose one of: " + ", ".join(r.name for r in starts[:8]),
            )
        close = nearest(name, runs)
        raise ConfigError(
            f"There is no run {name!r} under {root}.",
            f"Did you mean {close!r}?" if close else "`reason list runs` lists the runs.",
        )

    @classmethod
    def all(cls, root: Path | str) -> list[RunFolder]:
        """Every folder under ``root`` that has a run.json, damaged ones too, oldest name first."""
        folders = [Path(root, name) for name in names_of(root)]
        return [run for run in map(cls, folders) if run.exists]

    @classmethod
    def scan(
        cls, root: Path | str, wanted: Callable[[dict[str, Any]], bool] = lambda _: True
    ) -> tuple[list[RunFolder], list[DamagedRun]]:
        """The runs under ``root`` whose identity can be read, and what is wrong with the others.

        wanted: which of the sound ones, by kind, experiment, method, version (None: not known), config_hash,
            train_hash, created, parent and trained_by.
        """
        sound, damaged = [], []
        for name, told in cls._identities(root):
            if isinstance(told, DamagedRun):
                damaged.append(told)
            elif wanted(told):
                sound.append(cls(Path(root, name)))
        return sound, damaged

    @classmethod
    def _identities(cls, root: Path | str) -> Iterator[tuple[str, dict[str, Any] | DamagedRun]]:
        """The name of each run with what ``scan`` can look for in its identity, or with what is wrong with it."""
        index, names, where = Index.of(root, "identities"), names_of(root), str(root)
        for name in names:
            now = state(f"{where}/{name}", ("run.json",))
            told = index.recall(name, now)
            if told is None:
                run = cls(Path(root, name))
                if not run.exists:
                    continue
                try:
                    identity = run.identity
                    told = {key: identity.get(key) for key in (*_IDENTITY, "version")}
                    index.keep(name, now, told)
                except DamagedRun as error:
                    told = error
            yield name, told
        index.save(names)

    @classmethod
    def leftovers(cls, root: Path | str) -> list[RunFolder]:
        """Folders of runs that were killed before they could say who they are: made by us, without run.json."""
        unnamed = [name for name in names_of(root) if not os.path.exists(f"{root}/{name}/run.json")]
        found = [cls(Path(root, name)) for name in unnamed]
        return [r for r in found if r.looks_ours and time.time() - r.path.stat().st_mtime > LEFTOVER_S]

    @property
    def exists(self) -> bool:
        """Whether there is a run, damaged or not: it has a run.json, or may have one in somebody's private folder."""
        return _is_file(self / "run.json")

    @property
    def looks_ours(self) -> bool:
        """Whether the folder looks as ``create`` makes one, whatever became of its files."""
        try:
            return bool(NAME.fullmatch(self.name)) and all((self / inner).is_dir() for inner in INNER)
        except PermissionError:  # somebody else's
            return False

    # --- what is in it ---------------------------------------------------------------------

    @property
    def identity(self) -> dict[str, Any]:
        """run.json: kind, experiment, method, config_hash, train_hash, parent, trained_by, created, argv.

        Raises:
            DamagedRun: it cannot be read, or is not whole.
        """
        told = self._object("run.json")
        if told is None:
            raise self._damaged("run.json", "is missing")
        for key, kind in _IDENTITY.items():
            value = told.get(key, self)
            if not isinstance(value, kind) or isinstance(value, bool):
                raise self._damaged("run.json", f"has no {key}")
        if told["kind"] not in ("run", "sweep") or not math.isfinite(told["created"]):
            raise self._damaged("run.json", "describes neither a run nor a sweep")
        return told

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration as nested plain values.

        Raises:
            DamagedRun: it is missing, no YAML, or lacks a key that ``origin.json`` names.
        """
        import yaml

        try:
            text = (self / "config.yaml").read_text(encoding="utf-8")
            check_signature(text)
            config = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        except FileNotFoundError:
            raise self._damaged("config.yaml", "is missing") from None
        except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
            raise self._damaged("config.yaml", _unreadable(error, "YAML")) from error
        if not isinstance(config, dict) or not text.endswith("\n"):  # YAML cut in two is often still YAML
            raise self._damaged("config.yaml", "is empty" if not text.strip() else "is cut off")
        try:
            absent = sorted(self.origin.keys() - dict(flat(config, ".")).keys())
        except DamagedRun:  # there is nothing to hold it against
            absent = []
        if absent:
            raise self._damaged("config.yaml", f"has no {absent[0]}")
        return config

    def write_config(self, text: str) -> None:
        """Write config.yaml, signed."""
        with atomic(self / "config.yaml") as f:
            f.write(signed(text))

    @property
    def origin(self) -> dict[str, str]:
        """origin.json: the layer that set each dotted key; empty where there is no such file."""
        found = self._object("origin.json")
        if found == {}:  # every run has keys
            raise self._damaged("origin.json", "names no key")
        return found or {}

    @property
    def env(self) -> dict[str, Any]:
        """env.json: see ``provenance.capture``; empty where there is no such file."""
        return self._object("env.json") or {}

    @property
    def plan(self) -> dict[str, Any]:
        """plan.json of a sweep.

        Raises:
            DamagedRun: it cannot be read.
        """
        if (told := self._object("plan.json")) is None:
            raise self._damaged("plan.json", "is missing")
        return told

    @property
    def result(self) -> Result | None:
        """result.json of a run, or None while there is none.

        Raises:
            DamagedRun: it cannot be read as a ``Result``.
        """
        return self._result(Result)

    @property
    def sweep_result(self) -> SweepResult | None:
        """result.json of a sweep, or None while there is none.

        Raises:
            DamagedRun: it cannot be read as a ``SweepResult``.
        """
        return self._result(SweepResult)

    def _result(self, kind: type[Kind]) -> Kind | None:
        told = self._object("result.json")
        try:
            return None if told is None else from_json(kind, told)
        except ValueError as error:
            raise self._damaged("result.json", str(error)) from error

    @property
    def problem(self) -> DamagedRun | None:
        """The first of its files that cannot be read, or has lost lines; None where all is well. Rows and models
        are not looked at."""
        try:
            is_run = self.identity["kind"] == "run"
            _ = self.config if is_run else None
            self._object("plan.json")
            _ = self.result if is_run else self.sweep_result
            for name in ("origin.json", "env.json", "calibration.json"):
                self._object(name)
        except DamagedRun as error:
            return error
        if self.is_locked():  # its logs are being written
            return None
        return next(filter(None, (self.log_problem(name, thorough=False) for name in LOGS)), None)

    def log_problem(self, name: str, *, thorough: bool = True) -> DamagedRun | None:
        """What is wrong with ``events.jsonl`` or ``metrics.jsonl``: lines that were lost or altered.

        A finished run is held against its result. One that is not goes by the checksums of its lines, by the
        sizes that the last sign of life tells, and by whether that sign can be read.

        Args:
            thorough: read the log of a finished run, which says more than its size.
        """
        lost = self._damaged(name, "has lost lines, or they were changed")
        size = os.path.getsize(self / name) if (self / name).exists() else 0
        if (self / "result.json").exists():
            result = self.result if self.identity["kind"] == "run" else None
            if (
                result is None or (whole := result.files.get(name)) is None
            ):  # a sweep, or of an earlier version
                return None
            try:
                if size < whole["bytes"] or thorough:
                    check_content(self / name, whole, grows=True)
                return None
            except (OSError, ValueError):
                return lost
        lines, beat = list(read_json_lines(self / name)), self._last_beat()
        if None in lines or size < (beat or {}).get(name, 0):
            return lost
        open_end = beat == {} and lines and lines[-1].get("event") != "closed"
        if name == "events.jsonl" and (open_end or any(e.get("unsure") for e in lines)):
            return self._damaged("alive", "does not tell when the last attempt ended")
        return None

    def _object(self, name: str) -> dict[str, Any] | None:
        """The JSON object in a file, None where there is no such file."""
        try:
            value = read_json(self / name)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise self._damaged(name, _unreadable(error, "JSON", self / name)) from error
        if not isinstance(value, dict):
            raise self._damaged(name, "is not a JSON object")
        return value

    def _damaged(self, file: str, what: str) -> DamagedRun:
        mend = _MENDS.get(file, "Remove the run with `reason rm {name}`.")
        return DamagedRun(self.name, file, what, mend.format(name=self.name))

    def write_result(self, result: Result | SweepResult) -> None:
        """The last act of a run, or of a sweep. After it, it is finished."""
        write_json(self / "result.json", to_json(result))

    def contents(self) -> dict[str, dict[str, Any]]:
        """What ``Result.files`` holds: the checksums of all that training and judging made, and of the logs."""
        names = sorted(p.relative_to(self.path).as_posix() for p in self.path.rglob("*") if p.is_file())
        return {n: content(self / n) for n in names if n not in _RECORDS and not _NOT_KEPT.fullmatch(n)}

    def altered(self, result: Result) -> list[str]:
        """Those of ``result.files`` that are gone or hold something else; the logs are left out."""
        found = []
        for name, whole in result.files.items():
            try:
                if name not in LOGS:
                    check_content(self / name, whole)
            except (OSError, ValueError):
                found.append(name)
        return found

    @property
    def status(self) -> str:
        """finished | running | failed | killed | interrupted, from the files and the lock alone."""
        if (self / "result.json").exists():
            return FINISHED
        if self.is_locked():
            return RUNNING
        last = self._last_of("attempt", "closed")
        if last is None or last["event"] != "closed" or last["status"] == FINISHED:
            return INTERRUPTED  # closed as finished, but its result was deleted and has to be made again
        return last["status"]

    @property
    def unfinished(self) -> str:
        """In a sentence, how a run that is not finished gets to its end."""
        if self.status == RUNNING:
            return "Wait until it has finished; `reason list runs` shows its status."
        return f"Finish it with: reason resume {self.path}"

    def settle(self) -> str:
        """The status, once an attempt that ended without a word is closed, at its last sign of life."""
        status = self.status
        if status in (RUNNING, FAILED, KILLED) or self.is_closed:
            return status
        closing, sign = FINISHED if status == FINISHED else KILLED, self.last_sign
        unsure = {"unsure": True} if self._last_beat() == {} else {}
        self.event(
            "closed", status=closing, until=sign.time, until_clock=sign.clock, until_boot=sign.boot,
            why="the process ended without a message", **unsure,
        )  # fmt: skip
        return self.status

    @property
    def is_closed(self) -> bool:
        """Whether the end of the last attempt has been noted, if there was one."""
        last = self._last_of("attempt", "closed")
        return last is None or last["event"] == "closed"

    def _last_of(self, *names: str) -> dict[str, Any] | None:
        return next((e for e in reversed(self.events()) if e["event"] in names), None)

    # --- the log of events and points ------------------------------------------------------

    def event(self, event: str, **data: Any) -> None:
        """Append one event with the time of day and the reading of the monotonic clock."""
        now = Instant.now()
        told = {"event": event, "time": now.time, "clock": now.clock, "boot": now.boot, **data}
        append_json_lines(self / "events.jsonl", [told])

    def events(self) -> list[dict[str, Any]]:
        """What was noted by ``event``, oldest first; lines that are none are passed over."""
        return [e for e in read_json_lines(self / "events.jsonl") if _is_event(e)]

    def log_points(self, points: list[dict[str, Any]]) -> None:
        """Append points of curves: {"name", "value", "step", "time"}."""
        append_json_lines(self / "metrics.jsonl", points)

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
            with suppress(ValueError):  # a line that was torn or altered
                points.append(parse_json_line(line))
        return points, offset + len(whole)

    # --- the lock --------------------------------------------------------------------------

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run. The last beat stays what it was, so that it can tell when a killed attempt ended.

        Raises:
            RunError: another process holds it, or the folder is gone.
        """
        import filelock

        gone = RunError(f"{self.name} has been deleted.", "`reason list runs` lists the runs.")
        if not self.path.is_dir():  # the lock would make it anew
            raise gone
        lock = filelock.FileLock(self / "lock")
        try:
            lock.acquire(timeout=0.5, poll_interval=0.02)  # outlasts the blink of someone's ``is_locked``
        except filelock.Timeout as error:
            raise RunError(
                f"{self.name} is running in another process.",
                "Wait until it has finished, or stop that process.",
            ) from error
        try:
            if not (self / "lock").exists():  # deleted by whoever held the lock until now
                raise gone
            yield
        finally:
            lock.release()

    def is_locked(self) -> bool:
        return is_locked(self / "lock")

    def beat(self) -> None:
        """Sign of life. ``last_sign`` bounds the cost of an attempt that was killed; and the logs were so long."""
        now = Instant.now()
        sizes = {name: os.path.getsize(self / name) for name in LOGS if (self / name).exists()}
        # Of one length, and without truncating the file first: a reader never finds it empty.
        line = json_line({"clock": round(now.clock or 0.0, 3), "boot": now.boot, **sizes})
        file = os.open(self / "alive", os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            os.write(file, line.rstrip().ljust(255) + b"\n")
        finally:
            os.close(file)

    def _last_beat(self) -> dict[str, Any] | None:
        """What ``beat`` wrote, {} where that cannot be read, None where it never did."""
        try:
            told = parse_json_line((self / "alive").read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            return {}
        return told if isinstance(told, dict) and is_number(told.get("clock")) else {}

    @property
    def last_sign(self) -> Instant:
        """When the run last gave a sign of life; the epoch where it never did."""
        told = self._last_beat()
        if told is None:
            return Instant(0.0)
        return Instant(os.path.getmtime(self / "alive"), told.get("clock"), str(told.get("boot", "")))


def _is_file(path: Path) -> bool:
    """Whether there is such a file; one in somebody else's private folder may well be."""
    try:
        return path.is_file()
    except PermissionError:
        return True


def _unreadable(error: Exception, form: str, path: Path | None = None) -> str:
    if isinstance(error, OSError):
        return f"cannot be read ({error.strerror or error})"
    if isinstance(error, Altered):
        return str(error)
    if path is not None and path.stat().st_size == 0:
        return "is empty"
    return f"is not valid {form}"


def _is_event(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("event"), str) and is_number(value.get("time"))


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def flat(tree: dict[str, Any], joint: str, prefix: str = "", leaf: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings under joined keys. One that has the key ``leaf`` (a value with its interval) is that."""
    for key, inner in tree.items():
        if isinstance(inner, dict) and leaf and leaf in inner:
            yield f"{prefix}{key}", inner[leaf]
        elif isinstance(inner, dict):
            yield from flat(inner, joint, f"{prefix}{key}{joint}", leaf)
        else:
            yield f"{prefix}{key}", inner
