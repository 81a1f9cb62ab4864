"""The MLflow store: where it is, how it is opened, which experiment the runs go to.

MLflow is imported inside functions only, after its telemetry is switched off. A new SQLite store is
built beside its final name under a lock and takes that name once it is whole: processes that start
together on a fresh folder never race in MLflow's migrations, and a kill leaves no half-made store.
Runs are none of this module's business; see ``reason.tracking.mirror``.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sqlite3
import time
import urllib.parse
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from reason.errors import ReasonError

if TYPE_CHECKING:
    from mlflow import MlflowClient

T = TypeVar("T")

# Databases are memory-mapped in WAL mode, which these file systems do not keep coherent.
NETWORK_DISKS = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "lustre", "beegfs", "gpfs", "ceph", "afs"}


class StoreError(ReasonError):
    """The tracking store cannot be opened. Runs go on without it."""


def tracking_uri(cwd: Path | str | None = None) -> str:
    """``MLFLOW_TRACKING_URI`` if set, else MLflow's own default in ``cwd``, as an absolute address.

    A relative SQLite path in the variable is taken from ``cwd`` too.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI", "").strip() or "sqlite:///mlflow.db"
    path = sqlite_path(uri)
    if path is None:
        return uri
    absolute = (Path.cwd() if cwd is None else Path(cwd)).resolve() / path
    return f"sqlite:///{absolute}"


def sqlite_path(uri: str) -> Path | None:
    """The file behind a SQLite address, or None for any other store."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def shown(uri: str) -> str:
    """The address for people and files: without user name, password or query."""
    parts = urllib.parse.urlsplit(uri)
    if "@" not in parts.netloc and not parts.query:
        return uri
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def import_mlflow() -> Any:
    """MLflow with telemetry, its looks for a git binary and its chatter off, and short HTTP patience."""
    # MLflow reads DO_NOT_TRACK too, but only in the spelling "true".
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")  # seconds; MLflow's own: 120
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # MLflow's own: 7
    import mlflow

    # MLflow's own queries use what SQLAlchemy 2.1 deprecates; nobody here can mend that.
    warnings.filterwarnings("ignore", message="The ``noload`` loader strategy", category=DeprecationWarning)
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return mlflow


def open_store(uri: str) -> MlflowClient:
    """A client of the store at ``uri``; a SQLite store that does not exist yet is made.

    Raises:
        StoreError: nothing answers there, the file cannot be written, or its schema is another MLflow's.
    """
    prepare(uri)
    import_mlflow()
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        patiently(lambda: client.get_experiment_by_name("Default"))
    except MlflowException as error:
        if "out-of-date database schema" in str(error):
            raise StoreError(
                f"The tracking store {shown(uri)} was made by another version of MLflow.",
                f"Copy the file, then bring it up to date: mlflow db upgrade {shown(uri)}",
            ) from error
        raise StoreError(f"The tracking store {shown(uri)} refuses: {_first_line(error)}") from error
    except Exception as error:  # drivers of all kinds of databases raise all kinds of things
        raise StoreError(f"The tracking store {shown(uri)} cannot be opened: {_first_line(error)}") from error
    return client


def prepare(uri: str) -> None:
    """Make a SQLite store that does not exist yet; see that a server answers. Imports MLflow only to make one.

    Raises:
        StoreError: it cannot be made, or nothing answers.
    """
    path = sqlite_path(uri)
    if path is not None:
        _ensure_sqlite(path)
    elif uri.startswith(("http://", "https://")):
        _ensure_answers(uri)


EXPERIMENT_TAGS = {
    "mlflow.experimentKind": "custom_model_development",  # else the interface opens in its view for chat models
    "mlflow.note.content": "Runs of `reason`. One run per execution, trials of a sweep below it; the columns "
    "`accuracy`, `device_hours`, `latency_p50_ms` and `effective_depth` mean the same for every method.",
}


def experiment_id(client: MlflowClient, uri: str) -> str:
    """The id of the experiment that holds our runs (``MLFLOW_EXPERIMENT_NAME``, else ``reason``).

    It is created where it is missing; several processes may do so at once. Beside a SQLite store its
    artifacts get an absolute place, so that they are found from any folder.
    """
    from mlflow.exceptions import MlflowException

    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "").strip() or "reason"
    path = sqlite_path(uri)
    place = None if path is None else (path.parent / "mlruns" / name.replace("/", "_")).as_uri()
    found = patiently(lambda: client.get_experiment_by_name(name))
    if found is None:
        try:
            return patiently(lambda: client.create_experiment(name, place, EXPERIMENT_TAGS))
        except MlflowException:
            found = patiently(lambda: client.get_experiment_by_name(name))  # someone was faster
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return found.experiment_id


def patiently(call: Callable[[], T], tries: int = 2) -> T:
    """``call()``, once more after a pause if a SQLite store is locked beyond MLflow's own 20 s of waiting."""
    for attempt in range(tries):
        try:
            return call()
        except Exception as error:
            if attempt + 1 == tries or "database is locked" not in str(error):
                raise
            time.sleep(0.5)
    raise AssertionError("unreachable")


# --- opening ----------------------------------------------------------------------------------------


def _ensure_sqlite(path: Path) -> None:
    """Make the store once, whoever comes first."""
    if _has_content(path):
        return
    import filelock

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_name(f"{path.name}.lock")
        lock.touch()  # says at once where no file can be made; the lock itself would go on trying
        with filelock.FileLock(lock, timeout=120):
            if not _has_content(path):
                _make_sqlite(path)
    except (OSError, sqlite3.Error) as error:
        raise StoreError(
            f"The tracking store {path} cannot be made: {_first_line(error)}",
            "Choose another place with MLFLOW_TRACKING_URI=sqlite:////path/to/mlflow.db",
        ) from error


def _make_sqlite(path: Path) -> None:
    import_mlflow()
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with _quiet():
            store = SqlAlchemyStore(f"sqlite:///{aside}", (path.parent / "mlruns").as_uri())
        store.engine.dispose()
        if _filesystem(path.parent) not in NETWORK_DISKS:
            with contextlib.closing(sqlite3.connect(aside)) as db:  # readers and one writer at once
                db.execute("PRAGMA journal_mode=WAL")
        os.replace(aside, path)
    finally:
        for left in (aside, *(aside.with_name(aside.name + end) for end in ("-wal", "-shm", "-journal"))):
            left.unlink(missing_ok=True)


def _has_content(path: Path) -> bool:
    with contextlib.suppress(OSError):
        return path.stat().st_size > 0
    return False


def _ensure_answers(uri: str, seconds: float = 3.0) -> None:
    """A server that is down is told in seconds; MLflow's own retries take minutes."""
    parts = urllib.parse.urlsplit(uri)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=seconds).close()
    except OSError as error:
        raise StoreError(
            f"No tracking server answers at {shown(uri)} ({error.strerror or error}).",
            "Start it, or unset MLFLOW_TRACKING_URI to use a file in the working folder.",
        ) from error


def _filesystem(folder: Path) -> str:
    """The type of the file system under ``folder``, or '' where that cannot be told."""
    best, kind = "", ""
    try:
        mounts = Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    place = str(folder.resolve())
    for line in mounts:
        _, mount, fstype, *_ = line.split(" ")
        inside = place == mount or place.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= len(best):
            best, kind = mount, fstype
    return kind


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the lines that MLflow prints for each new store."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(before)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
