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

from reason.tracking.store import (
    StoreError,
    _filesystem,
    experiment_id,
    open_store,
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
    with pytest.raises(StoreError, match="cannot be opened"):
        open_store(f"sqlite:///{tmp_path / 'mlflow.db'}")


def test_a_place_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be made"):
        open_store(f"sqlite:///{tmp_path / 'file' / 'mlflow.db'}")


@pytest.mark.skipif(not Path("/proc/self/mounts").exists(), reason="no mount table")
def test_the_kind_of_disk_is_known():
    assert _filesystem(Path("/proc")) == "proc"
    assert _filesystem(Path("/proc/self")) == "proc"
