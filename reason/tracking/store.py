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
import re
import socket
import sqlite3
import time
import urllib.parse
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from reason.errors import ReasonError, nearest

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
    return f"sqlite:///{Path(cwd or '.').resolve() / path}"


def sqlite_path(uri: str) -> Path | None:
    """The file behind a SQLite address, or None for any other store."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def shown(uri: str) -> str:
    """The address for people and files: without user name, password or query. Never fails, whatever it is given.

    A password may hold what an address may not (a slash, a question mark), so that everything before
    the last @ goes, unless it is a path of this machine.
    """
    scheme, colon, rest = uri.partition(":")
    if not colon or _is_local(uri):
        return uri.partition("?")[0]
    slashes = rest[: len(rest) - len(rest.lstrip("/"))]
    if "@" in rest:
        rest = slashes + rest.rpartition("@")[2]
        if not slashes:  # "me:secret@host": what stands before the colon is no scheme
            return rest.partition("?")[0].partition("#")[0]
    return f"{scheme}:{rest}".partition("?")[0].partition("#")[0]


def _is_local(uri: str) -> bool:
    """Whether the address is a path of this machine, which may have an @ in it and no password."""
    scheme, _, rest = uri.partition(":")
    return scheme in ("sqlite", "file") and (rest.startswith("///") or not rest.startswith("//"))


def reason_of(error: BaseException, uri: str) -> str:
    """The first line of an error for people, without what ``shown`` leaves out of the address."""
    return without_secrets(str(error).strip().partition("\n")[0] or type(error).__name__, uri)


def without_secrets(text: str, uri: str) -> str:
    """``text`` without what ``shown`` leaves out of the address ``uri``."""
    text = text.replace(uri, shown(uri))
    who, at, _ = uri.partition(":")[2].lstrip("/").rpartition("@")
    if at and not _is_local(uri):
        password = who.partition(":")[2]
        for secret in (f"{who}@", password, urllib.parse.unquote(password)):
            text = text.replace(secret, "***") if secret else text
    return re.sub(r"(\w://)[^\s'\"/]*@", r"\1", text)


DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
SCHEMES = ("http", "https", *DATABASES, "file", "databricks", "databricks-uc", "uc")


def check_address(uri: str) -> None:
    """Refuse what cannot be the address of a tracking store.

    Raises:
        StoreError: a scheme that nothing here knows, a port that is no number, an open bracket, ...
    """
    where = f"The address of the tracking store ({shown(uri)})"
    mend = "Correct MLFLOW_TRACKING_URI, or unset it to use mlflow.db in the working folder."
    try:
        parts = urllib.parse.urlsplit(uri)
    except ValueError:
        raise StoreError(f"{where} has an unclosed bracket, or no IPv6 address in brackets.", mend) from None
    scheme = parts.scheme.partition("+")[0]
    if not scheme:  # a folder, as MLflow takes it
        return
    known = {*SCHEMES, *(e.name for e in metadata.entry_points(group="mlflow.tracking_store"))}
    if scheme not in known:
        close = nearest(scheme, known)
        hint = f"Did you mean {close}://...? " if close else ""
        if parts.path.isdecimal():  # localhost:5000
            hint = f"Did you mean http://{shown(uri)}? "
        known_ = ", ".join(s for s in SCHEMES if s != "uc")
        raise StoreError(f"{where} has the unknown scheme {scheme!r}.", f"{hint}Supported: {known_}. {mend}")
    try:
        _ = parts.port
    except ValueError:  # its text may hold a part of a password
        encoded = " (in a password, write / ? # and @ as %2F %3F %23 and %40)" if "@" in uri else ""
        raise StoreError(f"{where} has a port that is not a number up to 65535{encoded}.", mend) from None
    if scheme in ("http", "https") and not parts.hostname:
        raise StoreError(f"{where} has no host name.", mend)
    path = sqlite_path(uri)
    if scheme == "sqlite" and (path is None or not path.name):
        raise StoreError(
            f"{where} has no file name.", "Write sqlite:///mlflow.db, or sqlite:////path/to/mlflow.db."
        )


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
    # It logs the traceback of each error that it then raises, and those we tell in a sentence.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
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
        return client
    except Exception as error:  # drivers of all kinds of databases raise all kinds of things
        answered = isinstance(error, MlflowException)
        if answered and "out-of-date database schema" in str(error):
            raise StoreError(
                f"The tracking store {shown(uri)} was created by another version of MLflow.",
                f"Back up the file, then upgrade it with: mlflow db upgrade {shown(uri)}",
            ) from error
        what = "reports an error" if answered else "cannot be opened"
        failed = StoreError(f"The tracking store {shown(uri)} {what}: {reason_of(error, uri)}")
        raise (damage(error, uri) or failed) from error


class DamagedStore(StoreError):
    """The file of a SQLite store is damaged. The run folders have everything that was in it of theirs."""


_DAMAGE = ("malformed", "not a database", "disk i/o error", "no such table", "unsupported file format")


def damage(error: BaseException, uri: str) -> DamagedStore | None:
    """What an error of a SQLite store says if its file is damaged, else None."""
    path = sqlite_path(uri)
    if path is None or not any(sign in str(error).lower() for sign in _DAMAGE):
        return None
    return DamagedStore(
        f"The tracking store {path} is damaged: {reason_of(error, uri)}.",
        "`reason sync --rebuild` moves the file aside and rebuilds the store from the run folders.",
    )


def move_aside(uri: str) -> Path | None:
    """Move a damaged SQLite store out of the way, to ``<name>.damaged-<n>``.

    Returns:
        where it is now; None if there was no file.
    Raises:
        StoreError: the store is no SQLite file, or it is whole.
    """
    path = sqlite_path(uri)
    if path is None:
        raise StoreError(
            f"The tracking store {shown(uri)} is not a SQLite file and cannot be rebuilt by reason.",
            "`reason sync` adds what is missing in it.",
        )
    with _locked(path):
        if not _has_content(path):
            return None
        if _is_whole(path, uri):
            raise StoreError(
                f"The tracking store {path} is not damaged, so there is nothing to rebuild.",
                "`reason sync` adds what is missing in it.",
            )
        number = 1
        while (aside := path.with_name(f"{path.name}.damaged-{number}")).exists():
            number += 1
        for end in ("-wal", "-shm", ""):
            with contextlib.suppress(FileNotFoundError):
                os.replace(f"{path}{end}", f"{aside}{end}")
    return aside


def _is_whole(path: Path, uri: str) -> bool:
    try:
        with contextlib.closing(sqlite3.connect(path)) as db:
            for table in ("alembic_version", "experiments", "runs"):
                db.execute(f"SELECT 1 FROM {table} LIMIT 1").fetchone()
            return db.execute("PRAGMA quick_check(1)").fetchone() == ("ok",)
    except sqlite3.DatabaseError as error:
        return damage(error, uri) is None  # locked, or not ours to read


def prepare(uri: str) -> None:
    """Make a SQLite store that does not exist yet; see that a server answers. Imports MLflow only to make one.

    Raises:
        StoreError: the address is none, the store cannot be made, or nothing answers.
    """
    check_address(uri)
    path = sqlite_path(uri)
    if path is not None and not _has_content(path):
        with _locked(path):
            if not _has_content(path):  # whoever comes first makes it
                _make_sqlite(path)
    elif uri.startswith(("http://", "https://")):
        _ensure_answers(uri)


EXPERIMENT_TAGS = {
    "mlflow.experimentKind": "custom_model_development",  # else the interface opens in its view for chat models
    "mlflow.note.content": "Runs of `reason`. One run per execution, trials are nested under their sweep; the columns "
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


def run_ids(uri: str) -> set[str] | None:
    """The ids of all runs in a SQLite store, without MLflow, whose import takes seconds. None where that cannot be told."""
    path = sqlite_path(uri)
    if path is None or not _has_content(path):
        return None
    try:
        with contextlib.closing(sqlite3.connect(path)) as db:
            return {run_id for (run_id,) in db.execute("SELECT run_uuid FROM runs")}
    except sqlite3.Error:
        return None


def patiently(call: Callable[[], T]) -> T:
    """``call()``, once more after a pause if a SQLite store is locked beyond MLflow's own 20 s of waiting."""
    try:
        return call()
    except Exception as error:
        if "database is locked" not in str(error):
            raise
    time.sleep(0.5)
    return call()


# --- opening ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold what keeps others from making or moving the SQLite store at ``path``.

    Raises:
        StoreError: the place cannot be written, or somebody holds the lock for minutes.
    """
    import filelock

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_name(f"{path.name}.lock")
        lock.touch()  # says at once where no file can be made; the lock itself would go on trying
        with filelock.FileLock(lock, timeout=120):
            yield
    except (OSError, sqlite3.Error) as error:
        raise StoreError(
            f"The tracking store {path} cannot be created: {getattr(error, 'strerror', None) or error}",
            "Choose another location with MLFLOW_TRACKING_URI=sqlite:////path/to/mlflow.db",
        ) from error


def _make_sqlite(path: Path) -> None:
    import_mlflow()
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    before = logging.root.manager.disable
    logging.disable(logging.INFO)  # MLflow says some lines about each new store
    try:
        SqlAlchemyStore(f"sqlite:///{aside}", (path.parent / "mlruns").as_uri()).engine.dispose()
        if _filesystem(path.parent) not in NETWORK_DISKS:
            with contextlib.closing(sqlite3.connect(aside)) as db:  # readers and one writer at once
                db.execute("PRAGMA journal_mode=WAL")
        for left in _beside(path):  # of a file that was deleted: SQLite would take them for the new one's
            left.unlink(missing_ok=True)
        os.replace(aside, path)
    finally:
        logging.disable(before)
        for left in (aside, *_beside(aside)):
            left.unlink(missing_ok=True)


def _beside(path: Path) -> list[Path]:
    """What SQLite keeps beside a database."""
    return [path.with_name(path.name + end) for end in ("-wal", "-shm", "-journal")]


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
            "Start the server, or unset MLFLOW_TRACKING_URI to use mlflow.db in the working folder.",
        ) from error


def _filesystem(folder: Path) -> str:
    """The type of the file system under ``folder``, or '' where that cannot be told."""
    try:
        mounts = Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    place, best = folder.resolve(), ("", "")
    for mount, kind in (line.split(" ")[1:3] for line in mounts):
        if place.is_relative_to(mount) and len(mount) >= len(best[0]):
            best = (mount, kind)
    return best[1]
