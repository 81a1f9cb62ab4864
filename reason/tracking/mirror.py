"""MLflow as the mirror of a run folder: live while the run goes on, or afterwards by ``sync``.

A run never talks to MLflow. It writes its folder; a ``Mirror`` in the parent process copies what is
new. How far it came is kept in the folder (``mlflow.json``), so live mirroring, a resumed run and
``sync`` are one and the same step (``_advance``), repeated until nothing is left to send. A store that
is down, slow or locked costs a line on stderr and, at the end of the run, at most ``CLOSE_S``.

Exactly once: the byte range about to be sent is written down before it is sent. After a failure the
same range goes first, cut the same way and with the folder's own timestamps, and MLflow drops points
that it has. This module knows what to send and when; what it is called stands in ``describe``.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import sys
import threading
import time
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reason.errors import DamagedRun, ReasonError
from reason.files import read_json, read_json_lines, write_json
from reason.printable import say
from reason.tracking import traces
from reason.tracking.describe import BATCH_CAP, ENTRY_CAP, Description, Point, surroundings, thinned
from reason.tracking.folder import FAILED, FINISHED, INTERRUPTED, KILLED, RUNNING, RunFolder
from reason.tracking.index import Index, State, state
from reason.tracking.store import (
    check_address,
    damage,
    experiment_id,
    import_mlflow,
    open_store,
    patiently,
    prepare,
    reason_of,
    run_ids,
    shown,
    tracking_uri,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

EVERY_S = 5.0  # seconds between two looks at a live run
CLOSE_S = 10.0  # seconds that the end of a run waits for a store
ENDED = (FINISHED, FAILED, KILLED)
STATE = "mlflow.json"  # how far the mirror has come
_NOT_MIRRORED = {
    STATE,
    "mlflow.lock",
    "lock",
    "alive",
    "checkpoints",
    "model",
    "catalogue.arrow",
    "calibration.json",
}

_warned: set[str] = set()  # stores of which this process has already said that they fail


class Mirror:
    """Keeps one MLflow run like one run folder, from a thread. Nothing here raises into the run, or holds it up.

    Args:
        folder: a run or a sweep; it has its ``run.json``.
        uri: the store (default: ``tracking_uri()``).
        every: seconds between two looks at the folder while the run goes on.
        client: of the store, where it is open already.
    """

    def __init__(
        self,
        folder: RunFolder,
        uri: str | None = None,
        every: float = EVERY_S,
        client: MlflowClient | None = None,
    ):
        self.folder = folder
        self.uri = uri or tracking_uri()
        self._every = every
        self._client = client
        self._open = False  # whether this mirror has seen the store take the whole run
        self._preparing = False  # whether this process is busy itself: loading MLflow, making the file
        self._ending = ""  # the status that the run ended with
        self._stop = threading.Event()
        self._complete = False
        self._thread = threading.Thread(target=self._follow, name=f"mirror {folder.name}", daemon=True)

    # --- the life of a run -------------------------------------------------------------------------

    def start(self) -> None:
        """Create the MLflow run, or open it again, and follow the folder until ``close``: all in a thread."""
        if self._thread.ident is None:
            self._thread.start()

    def close(self, status: str) -> bool:
        """Send the rest, the result and the files, and end the MLflow run. Waits for a store ``CLOSE_S`` at most.

        Args:
            status: ``finished``, ``failed`` or ``killed``.
        Returns:
            whether the mirror is complete; otherwise ``sync`` completes it later.
        """
        assert status in ENDED, status
        self._ending = status
        self._stop.set()
        self.start()
        left = CLOSE_S
        while self._thread.is_alive() and left > 0:
            before = time.monotonic()
            self._thread.join(0.05)
            if not self._preparing:
                left -= time.monotonic() - before
        if self._thread.is_alive():
            _warn(self.uri, f"no response within {CLOSE_S:.0f} s")
        return self._complete

    def __enter__(self) -> Mirror:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close, unless that was done: finished where there is a result, else by how the block was left."""
        if self._stop.is_set():
            return
        if kind is None:
            self.close(FINISHED if (self.folder / "result.json").exists() else FAILED)
        else:
            self.close(FAILED if issubclass(kind, Exception) else KILLED)

    @property
    def run_id(self) -> str | None:
        """The id of the MLflow run, or None while the store has not been reached."""
        return _state(self.folder).get("run_id")

    def _follow(self) -> None:
        # Loading MLflow takes seconds of this process's interpreter, which a run in it would pay for: a short
        # run is over by then, and for a long one they do not count.
        pause = 0.0 if "mlflow" in sys.modules else self._every
        while not self._stop.wait(pause):
            fine = self.try_advance(RUNNING)
            # A failing store is left in peace.
            pause = self._every if fine else min(max(2 * pause, self._every), 60.0)
        self._complete = self.try_advance(self._ending)

    # --- the one step ------------------------------------------------------------------------------

    def try_advance(self, status: str) -> bool:
        """``advance``; where the store fails, False and (once per process and store) a line on stderr."""
        try:
            self.advance(status, only_points=self._open and status == RUNNING)
            if status in ENDED:
                self._bring_children()
            return True
        except DamagedRun as error:
            text = f"{error.message} It is not copied to MLflow until that is fixed. {error.hint}"
            say(text)
        except Exception as error:  # no failure of a tracker is worth a run
            _warn(self.uri, reason_of(error, self.uri))
        self._open = False
        return False

    def advance(self, status: str, only_points: bool = False) -> Change:
        """Bring the MLflow run to the state of the folder, with ``status`` as the folder's.

        Args:
            only_points: leave out everything but curves, which is what changes while a run goes on.
        Raises:
            StoreError, MlflowException, ...: whatever the store does. What was sent is remembered.
        """
        import filelock

        if self._client is None:
            self._preparing = True
            try:
                check_address(self.uri)
                import_mlflow()
                prepare(self.uri)
            finally:
                self._preparing = False
            self._client = open_store(self.uri)
        with filelock.FileLock(self.folder / "mlflow.lock", timeout=60):  # a sync beside a live run
            sending = _Sending(self._client, self.folder, self.uri)
            change = sending.points() if only_points else sending.all(status)
        self._open = True
        return change

    def _bring_children(self) -> None:
        """Tag the trials of this sweep that were mirrored before the store had it."""
        if self.folder.identity["kind"] != "sweep":
            return
        for child in RunFolder.scan(self.folder.path.parent, lambda r: r["parent"] == self.folder.name)[0]:
            state = _state(child)
            if state.get("uri") == shown(self.uri) and state.get("parent") != self.run_id:
                Mirror(child, self.uri, client=self._client).advance(child.status)


def _warn(uri: str, reason: str) -> None:
    if uri not in _warned:
        _warned.add(uri)
        say(
            f"Warning: the tracking store {shown(uri)} cannot be reached ({reason.rstrip('.')}). "
            "The run is not affected; copy it to MLflow later with: reason sync"
        )


@dataclass
class Change:
    """What one step changed in the store."""

    created: bool = False
    points: int = 0
    files: int = 0
    details: list[str] = field(default_factory=list)  # of "description", "result", "dataset", "status"

    def __bool__(self) -> bool:
        return bool(self.created or self.points or self.files or self.details)


class _Sending:
    """One step of one folder. Each part compares with ``mlflow.json``, sends, and writes down that it did."""

    def __init__(self, client: MlflowClient, folder: RunFolder, uri: str):
        self.client, self.folder, self.uri = client, folder, shown(uri)
        self.full_uri = uri
        self.change = Change()
        self.state = _state(folder)

    @functools.cached_property
    def about(self) -> Description:
        return Description(self.folder)

    def all(self, status: str) -> Change:
        if status == INTERRUPTED:  # its result was deleted, and nobody executes it
            status = KILLED
        self._open(status)
        self._describe()
        self.points()
        if status in ENDED:
            self._result()
        self._dataset(ended=status in ENDED)
        self._files(ended=status in ENDED)
        if status in ENDED:
            self._traces()
        self._status(status)
        return self.change

    @property
    def run_id(self) -> str:
        return self.state["run_id"]

    def _keep(self, **news: Any) -> None:
        self.state.update(news)
        write_json(self.folder / STATE, self.state)

    def _open(self, status: str) -> None:
        """Make sure that the store has the run; one that was made elsewhere or lost is made anew."""
        if self.state.get("uri") == self.uri and self._exists(self.run_id):
            return
        experiment = experiment_id(self.client, self.full_uri)
        found = _runs_of(self.client, experiment, self.about.id)
        if found:  # made by a process that was killed before it could write the id down
            run_id = found[0].info.run_id
        else:
            start, tags, name = self.about.start_ms or None, self.tags, self.folder.name
            run = patiently(lambda: self.client.create_run(experiment, start, tags, run_name=name))
            run_id = run.info.run_id
            self.change.created = True
        self.state = {}
        self._keep(uri=self.uri, experiment=experiment, run_id=run_id, offset=0, closed=None)

    def _exists(self, run_id: str) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            self.client.get_run(run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise
        return True

    @functools.cached_property
    def parent(self) -> str | None:
        """The MLflow id of the sweep that this run is a trial of, once this store has that sweep."""
        name = self.about.identity["parent"]
        state = _state(RunFolder(self.folder.path.parent / name)) if name else {}
        return state["run_id"] if state.get("uri") == self.uri else None

    @property
    def tags(self) -> dict[str, str]:
        return self.about.tags() | ({"mlflow.parentRunId": self.parent} if self.parent else {})

    def _describe(self) -> None:
        """Params and tags, whenever the folder has more to say than last time."""
        params, tags = self.about.params(), self.tags
        print_ = _fingerprint([params, tags])
        if self.state.get("described") == print_:
            return
        from mlflow.entities import Param, RunTag

        known: tuple[dict[str, str], dict[str, str]] = ({}, tags)  # a run that was just created has its tags
        if not self.change.created:
            there = patiently(lambda: self.client.get_run(self.run_id)).data
            known = there.params, there.tags
        new_params = [Param(k, v) for k, v in params.items() if k not in known[0]]  # they never change
        new_tags = [RunTag(k, v) for k, v in tags.items() if known[1].get(k) != v]
        for some in _batches(new_params, ENTRY_CAP):
            patiently(lambda some=some: self.client.log_batch(self.run_id, params=some))
        for some in _batches(new_tags, ENTRY_CAP):
            patiently(lambda some=some: self.client.log_batch(self.run_id, tags=some))
        if (new_params or new_tags) and not self.change.created:
            self.change.details.append("description")
        self._keep(described=print_, parent=self.parent)

    def points(self) -> Change:
        """First the range that may have been sent in part, exactly as it was cut; then what is new."""
        while True:
            offset, end = self.state["offset"], self.state.get("sending")
            points, after = self.folder.points(offset, end)
            if after == offset:
                return self.change
            if end is None:
                self._keep(sending=after)
            self._log(thinned(points))
            self._keep(offset=after, sending=None)

    def _log(self, points: list[Point]) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(p.name, p.value, p.time, p.step) for p in points]
        for some in _batches(metrics, BATCH_CAP):
            patiently(lambda some=some: self.client.log_batch(self.run_id, metrics=some))
        self.change.points += len(metrics)

    def _result(self) -> None:
        points = self.about.final_points()
        print_ = _fingerprint([(p.name, p.value, p.step) for p in points])
        if points and self.state.get("result") != print_:
            self._log(points)
            self.change.details.append("result")
            self._keep(result=print_)

    def _dataset(self, ended: bool) -> None:
        """The data and its counts, which are known with the result and cannot be added later."""
        digest, info = self.about.data_digest, self.about.known("info")
        if not digest or self.state.get("dataset") == digest or not (info or ended):
            return
        from mlflow.entities import Dataset, DatasetInput, InputTag

        name = self.about.params().get("dataset", "dataset")
        source = json.dumps({"dataset": name})
        dataset = Dataset(name, digest, source_type="local", source=source, profile=json.dumps(info or {}))
        used = DatasetInput(dataset, [InputTag("mlflow.data.context", "train and eval")])
        patiently(lambda: self.client.log_inputs(self.run_id, datasets=[used]))
        self.change.details.append("dataset")
        self._keep(dataset=digest)

    def _files(self, ended: bool) -> None:
        sent = dict(self.state.get("files", {}))
        new = {name: stamp for name, stamp in self.about.files(ended).items() if sent.get(name) != stamp}
        try:
            for name, stamp in new.items():
                inner = str(Path(name).parent.as_posix())
                self.client.log_artifact(
                    self.run_id, str(self.folder / name), None if inner == "." else inner
                )
                sent[name] = stamp
                self.change.files += 1
        finally:
            if new:  # one that is sent twice is the same file
                self._keep(files=sent)

    def _traces(self) -> None:
        """Those that the store does not have yet. One that was cut off in the middle may be there twice."""
        path = self.folder / traces.FILE
        told = list(read_json_lines(path)) if path.is_file() else []
        for number in range(self.state.get("traces", 0), len(told)):
            start = self.about.start_ms or 0
            traces.send(
                self.client, self.full_uri, self.state["experiment"], self.run_id, start, told[number]
            )
            self._keep(traces=number + 1)

    def _status(self, status: str) -> None:
        closed = status if status in ENDED else None
        if self.state["closed"] == closed:
            return
        if closed is None:  # resumed
            patiently(lambda: self.client.update_run(self.run_id, status="RUNNING"))
        else:
            end = self.about.end_ms or None
            patiently(lambda: self.client.set_terminated(self.run_id, status=closed.upper(), end_time=end))
        self.change.details.append("status")
        self._keep(closed=closed)


# --- all runs of a folder ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Synced:
    """What ``sync`` did for one run. ``error`` is '' where the mirror is complete."""

    name: str
    status: str
    change: Change
    error: str = ""


def sync(root: Path | str, uri: str | None = None, names: Iterable[str] | None = None) -> list[Synced]:
    """Bring every run under ``root`` (or those called ``names``) up to date in the store.

    Runs that were interrupted are closed as killed, in the folder too. Parents come before children.
    A second call changes nothing.

    Raises:
        StoreError: the store cannot be opened at all, or is damaged.
        ConfigError: a name that no run has.
    """
    uri = uri or tracking_uri()
    sweeps, damaged = RunFolder.scan(root, lambda run: run["kind"] == "sweep")
    runs = [*sweeps, *RunFolder.scan(root, lambda run: run["kind"] == "run")[0]]  # parents first
    every = [run.name for run in runs]
    if names is not None:
        wanted = {RunFolder.find(name, root).name for name in names}
        children, _ = RunFolder.scan(root, lambda run: run["parent"] in wanted)
        wanted |= {run.name for run in children}
        runs = [run for run in runs if run.name in wanted]
        damaged = [d for d in damaged if d.run in wanted]
    report = [Synced(d.run, "damaged", Change(), f"{d.file} {d.what}. {d.mend}") for d in damaged]
    if not runs:
        return report
    up_to_date = _UpToDate(root, uri)
    client: MlflowClient | None = None
    for folder in runs:
        status = up_to_date.status(folder)
        if status:
            report.append(Synced(folder.name, status, Change()))
            continue
        if client is None:
            client = open_store(uri)  # fails here, once and clearly, rather than for each run
        try:
            status = folder.settle()
            up_to_date.look_at(folder)
            change = Mirror(folder, uri, client=client).advance(status)
            lost = None if status == RUNNING else folder.log_problem("metrics.jsonl", thorough=bool(change))
            report.append(Synced(folder.name, status, change, lost.message if lost else ""))
            if lost is None:
                up_to_date.note(folder, status)
        except DamagedRun as d:
            report.append(Synced(d.run, "damaged", Change(), f"{d.file} {d.what}. {d.mend}"))
        except Exception as error:  # one bad folder does not hold up the others
            if damaged_store := damage(error, uri):
                raise damaged_store from error
            report.append(Synced(folder.name, status or "unknown", Change(), reason_of(error, uri)))
    up_to_date.save(every)
    return report


class _UpToDate:
    """Which runs the store has whole, so that ``sync`` passes them over. An index, never the truth."""

    def __init__(self, root: Path | str, uri: str):
        self._index, self._uri = Index.of(root, "mirrored"), shown(uri)
        self._there = run_ids(uri)  # where that is not known, every run is looked at
        self._told: dict[tuple[str | None, str], str] = {}  # by parent and method, see ``_described``
        self._before: State | None = None

    def status(self, folder: RunFolder) -> str:
        """The status of a run that has not changed since the store had all of it, else ""."""
        kept = self._index.recall(folder.name, self._now(folder)) if self._there else None
        if (
            kept is None
            or kept["run_id"] not in self._there
            or kept["described"] != self._described(folder, kept)
        ):
            return ""
        # The files of a run say that it is finished, but not that it goes on.
        return kept["status"] if kept["status"] == FINISHED or folder.status == kept["status"] else ""

    def look_at(self, folder: RunFolder) -> None:
        """Called before the folder is read."""
        self._before = self._files(folder)

    def note(self, folder: RunFolder, status: str) -> None:
        """Called when the store has all that was in the folder when it was looked at."""
        identity, after, run_id = folder.identity, self._how_far(folder), _state(folder)["run_id"]
        kept = {
            "status": status,
            "run_id": run_id,
            "method": identity["method"],
            "parent": identity["parent"],
        }
        if status != RUNNING and self._before and after:
            kept["described"] = self._described(folder, kept)
            self._index.keep(folder.name, self._before + after, kept)

    def save(self, names: list[str]) -> None:
        self._index.save(names)

    def _now(self, folder: RunFolder) -> State | None:
        files, after = self._files(folder), self._how_far(folder)
        return files + after if files and after else None

    def _how_far(self, folder: RunFolder) -> State | None:
        """The content of the mirror's own state: it has just been written, too late for its times to tell anything."""
        try:
            with open(f"{folder.path}/{STATE}", "rb", buffering=0) as f:
                return State(f"{zlib.crc32(f.read()):x}", 0.0)
        except OSError:
            return None

    def _files(self, folder: RunFolder) -> State | None:
        """The state of what is mirrored. Of rows and figures that of their folders, as each file is written by rename."""
        try:
            names = sorted({n for n in os.listdir(folder.path) if not n.startswith(".")} - _NOT_MIRRORED)
        except OSError:
            return None
        found = state(str(folder.path), names)
        return found and State(f"{names}{found.text}", found.newest)

    def _described(self, folder: RunFolder, kept: dict[str, Any]) -> str:
        """A fingerprint of what the store is told of a run that does not stand in its folder."""
        parent, method = key = kept["parent"], kept["method"]
        if key not in self._told:  # parents come first, so theirs is known by now
            there = _state(RunFolder(folder.path.parent / parent)) if parent else {}
            run_id = there["run_id"] if there.get("uri") == self._uri else None
            self._told[key] = _fingerprint([self._uri, run_id, surroundings(method)])
        return self._told[key]


def forget(folder: RunFolder) -> bool:
    """Mark the MLflow run of a folder deleted (``mlflow gc`` removes it for good).

    Returns:
        whether that was done; a store that fails is told on stderr, since the folder is what counts.
    """
    if not (folder / STATE).exists():
        return False
    state, uri = _state(folder), tracking_uri()
    if state and shown(uri) != state["uri"]:
        uri = state["uri"]
    try:
        client = open_store(uri)
        if not state:  # its note of the id is damaged; the store knows the run by its name
            id_ = f"{folder.name}@{folder.identity['created']}"
            found = _runs_of(client, experiment_id(client, uri), id_)
            state = {"run_id": found[0].info.run_id} if found else {}
        if not state:
            return False
        client.delete_run(state["run_id"])
    except Exception as error:
        reason = error.message if isinstance(error, ReasonError) else reason_of(error, uri)
        say(f"{folder.name} could not be deleted from the tracking store: {reason}")
        return False
    return True


def _runs_of(client: MlflowClient, experiment: str, id_: str) -> list[Any]:
    """The runs of the store that mirror the run with ``Description.id``: one, or none."""
    wanted = f"tags.`reason.id` = '{id_}'"
    return list(patiently(lambda: client.search_runs([experiment], wanted, max_results=1)))


# --- small helpers ----------------------------------------------------------------------------------


def _state(folder: RunFolder) -> dict[str, Any]:
    """mlflow.json; empty where there is none, or none that can be read: the store knows its runs by their tags."""
    try:
        state = read_json(folder / STATE)
    except (OSError, ValueError):
        return {}
    whole = isinstance(state, dict) and state.keys() >= {"uri", "experiment", "run_id", "offset", "closed"}
    return state if whole else {}


def _fingerprint(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _batches(items: list[Any], size: int) -> list[list[Any]]:
    return [items[i : i + size] for i in range(0, len(items), size)]
