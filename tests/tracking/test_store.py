"""The store: its address, its making under a race, its refusals."""

from __future__ import annotations

import os
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from reason.tracking.mirror import sync
from reason.tracking.store import (
    DamagedStore,
    StoreError,
    _filesystem,
    check_address,
    experiment_id,
    move_aside,
    open_store,
    reason_of,
    shown,
    tracking_uri,
)

RACE = """
import os, sys, time
from reason.tracking.store import experiment_id, import_mlflow, open_store
import_mlflow()
from mlflow.store.tracking import sqlalchemy_store  # loaded once, before the race
uri, start, children = sys.argv[1], time.time() + 0.3, []
for _ in range(6):
    child = os.fork()
    if child == 0:
        time.sleep(max(0.0, start - time.time()))
        client = open_store(uri)
        run = client.create_run(experiment_id(client, uri))
        client.log_metric(run.info.run_id, "x", 1.0)
        os.write(1, f"{run.info.run_id}\\n".encode())
        os._exit(0)
    children.append(child)
sys.exit(sum(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0 for child in children))
"""


LEFT_OPEN = """
import os, signal, sys
from reason.tracking.mirror import sync
sync(sys.argv[1], sys.argv[2])
os.kill(os.getpid(), signal.SIGKILL)
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_the_address_is_mlflows_own_default_made_absolute(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri(tmp_path) == f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.chdir(tmp_path)
    assert tracking_uri() == tracking_uri(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///sub/other.db")
    assert tracking_uri() == f"sqlite:///{tmp_path / 'sub' / 'other.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    assert tracking_uri() == "http://host:5000"


def test_no_password_is_shown():
    assert shown("postgresql://me:secret@db.host:5432/runs?x=y") == "postgresql://db.host:5432/runs"
    assert shown("http://host:5000") == "http://host:5000"
    assert shown("sqlite:////a/mlflow.db") == "sqlite:////a/mlflow.db"
    assert shown("sqlite:////home/a@b/mlflow.db") == "sqlite:////home/a@b/mlflow.db"


@pytest.mark.parametrize(
    "uri",
    [
        "http://me:s3cret@host:5000", "http://me:s3/cret@host:5000", "http://me:s3?c#r3et@host", "https://me:s3@cret@host/a",
        "postgresql+psycopg2://me:s3cret@host/db?password=s3cret", "nonsense://me:s3cret@host", "me:s3cret@host:5000",
        "http://me:s3cret@[host", "http://me:s3cret@host:port", "sqlite://me:s3cret@host/x", "http:/me:s3cret@host",
        "http://host?token=s3cret", "http://me:s3%2Fcret@host",
    ],
)  # fmt: skip
def test_no_password_is_shown_of_any_address(uri):
    texts = [shown(uri), reason_of(ValueError(f"no answer from {uri}/api"), uri)]
    texts.append(reason_of(ValueError(f"no user {uri.partition('://')[2].rpartition('@')[0]} there"), uri))
    try:
        check_address(uri)
    except StoreError as error:
        texts.append(str(error))
    for text in texts:
        assert "s3" not in text and "cret" not in text.replace("secret", "")


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("http://host:99999", "port"), ("http://host:port", "port"), ("http://[::1", "bracket"), ("http://", "has no host name"),
        ("htp://host:5000", "Did you mean http://"), ("localhost:5000", "Did you mean http://localhost:5000"),
        ("sqlite:mlflow.db", "has no file name"), ("sqlite://mlflow.db", "has no file name"), ("sqlite:///", "has no file name"),
        ("http://me:se/cret@host:5000", "%2F"),
    ],
)  # fmt: skip
def test_what_is_no_address_is_told_before_anything_is_opened(uri, words):
    for call in (check_address, open_store):
        with pytest.raises(StoreError) as told:
            call(uri)
        assert words in str(told.value) and told.value.hint


def test_addresses_of_every_kind_are_taken():
    for uri in (
        "http://h:5000/a", "https://h", "sqlite:////a/b.db", "postgresql+psycopg2://u:p@h/db", "file:///a/mlruns", "mlruns",
        "mysql://h/db", "databricks://profile", "http://[::1]:5000",
    ):  # fmt: skip
        check_address(uri)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks its racers")
def test_six_processes_start_on_a_fresh_store(tmp_path):
    uri = f"sqlite:///{tmp_path / 'fresh' / 'mlflow.db'}"
    race = subprocess.run([sys.executable, "-c", RACE, uri], capture_output=True, text=True, timeout=120)
    assert race.returncode == 0, race.stderr
    ids = set(race.stdout.split())
    client = open_store(uri)
    found = client.search_runs([experiment_id(client, uri)])
    assert {run.info.run_id for run in found} == ids and len(ids) == 6
    with sqlite3.connect(tmp_path / "fresh" / "mlflow.db") as db:
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    db.close()
    assert not [p for p in os.listdir(tmp_path / "fresh") if p.endswith(".tmp")]


def test_the_experiment_and_its_artifacts_are_beside_the_store(uri, tmp_path, monkeypatch):
    client = open_store(uri)
    found = client.get_experiment(experiment_id(client, uri))
    assert (found.name, found.artifact_location) == ("reason", (tmp_path / "mlruns" / "reason").as_uri())
    assert experiment_id(client, uri) == found.experiment_id
    client.delete_experiment(found.experiment_id)
    assert experiment_id(client, uri) == found.experiment_id  # restored: names are unique for ever
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    assert client.get_experiment(experiment_id(client, uri)).name == "mine"


def test_telemetry_is_off_before_mlflow_is_there(tmp_path):
    code = (
        "import sys; from reason.tracking.store import import_mlflow; assert 'mlflow' not in sys.modules\n"
        "import_mlflow(); from mlflow.telemetry.utils import is_telemetry_disabled as off; assert off()"
    )
    env = {
        k: v
        for k, v in os.environ.items()
        if k not in ("CI", "PYTEST_CURRENT_TEST", "MLFLOW_DISABLE_TELEMETRY")
    }
    subprocess.run([sys.executable, "-c", code], check=True, env=env, cwd=tmp_path)


def test_a_server_that_is_down_is_told_at_once():
    start = time.perf_counter()
    with pytest.raises(StoreError, match="No tracking server answers") as told:
        open_store(f"http://me:secret@127.0.0.1:{free_port()}")
    assert "secret" not in str(told.value)
    assert time.perf_counter() - start < 3


def test_another_mlflows_schema_is_told(uri, tmp_path):
    copy = tmp_path / "old.db"
    copy.write_bytes((tmp_path / "mlflow.db").read_bytes())
    with sqlite3.connect(copy) as db:
        db.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")
    db.close()
    with pytest.raises(StoreError, match="another version of MLflow"):
        open_store(f"sqlite:///{copy}")


def test_a_file_that_is_no_database_is_told(tmp_path):
    (tmp_path / "mlflow.db").write_text("hello, this is a text file of some length" * 100)
    with pytest.raises(DamagedStore, match="is damaged") as told:
        open_store(f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert "reason sync --rebuild" in told.value.hint


@pytest.mark.parametrize("gone", ["deleted", "emptied"])
def test_what_a_deleted_database_left_beside_it_is_no_part_of_the_new_one(tmp_path, make, root, gone):
    """Killed while it was open, so that -wal and -shm stay; then the database alone is deleted."""
    path = tmp_path / "own" / "mlflow.db"
    uri = f"sqlite:///{path}"
    make()
    killed = subprocess.run(
        [sys.executable, "-c", LEFT_OPEN, str(root), uri], capture_output=True, text=True, timeout=60
    )
    assert killed.returncode == -9, killed.stderr
    assert path.with_name("mlflow.db-wal").stat().st_size > 0
    path.unlink() if gone == "deleted" else path.write_bytes(b"")
    assert [(s.error, s.change.created) for s in sync(root, uri)] == [("", True)]
    assert [(s.error, bool(s.change)) for s in sync(root, uri)] == [("", False)]


def close_all() -> None:
    """From here on the file is read as another process finds it."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    for engine in SqlAlchemyStore._engine_map.values():
        engine.dispose()


def damage_file(path: Path, how: str) -> None:
    close_all()
    data = path.read_bytes()
    if how == "half":
        path.write_bytes(data[: len(data) // 2])
    elif how == "overwritten":
        path.write_bytes(data[:4096] + b"\x55" * (len(data) - 4096))
    else:
        path.write_bytes(b"no database at all" * 400)


@pytest.mark.parametrize("how", ["half", "overwritten", "text"])
def test_a_damaged_database_is_told_moved_aside_and_rebuilt(uri, tmp_path, make, root, how):
    folder = make()
    sync(root, uri)
    path = tmp_path / "mlflow.db"
    with pytest.raises(StoreError, match="is not damaged"):
        move_aside(uri)
    damage_file(path, how)
    content = path.read_bytes()
    with pytest.raises(DamagedStore, match="is damaged"):
        sync(root, uri)
    close_all()
    aside = move_aside(uri)
    assert aside == tmp_path / "mlflow.db.damaged-1" and aside.read_bytes() == content
    assert [(s.name, s.error, s.change.created) for s in sync(root, uri)] == [(folder.name, "", True)]
    damage_file(path, how)
    assert move_aside(uri) == tmp_path / "mlflow.db.damaged-2"
    assert move_aside(uri) is None  # there is none now: the next sync makes one


def test_only_a_file_is_rebuilt():
    with pytest.raises(StoreError, match="cannot be rebuilt by reason"):
        move_aside("http://host:5000")


def test_a_place_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be created"):
        open_store(f"sqlite:///{tmp_path / 'file' / 'mlflow.db'}")


@pytest.mark.skipif(not Path("/proc/self/mounts").exists(), reason="no mount table")
def test_the_kind_of_disk_is_known():
    assert _filesystem(Path("/proc")) == "proc"
    assert _filesystem(Path("/proc/self")) == "proc"
