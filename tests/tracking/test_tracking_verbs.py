"""`reason sync` and `reason doctor` as a user calls them."""

from __future__ import annotations

import json

import pytest
import typer
from test_store import free_port
from tracking_samples import RESULT
from typer.testing import CliRunner

from reason.cli.doctor import doctor
from reason.cli.sync import sync
from reason.errors import ConfigError
from reason.tracking.folder import RunFolder
from reason.tracking.store import StoreError

app = typer.Typer()
app.command()(sync)
app.command()(doctor)


@pytest.fixture
def call(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REASON_CACHE", str(tmp_path / "cache"))
    return lambda *words: CliRunner().invoke(app, words)


def test_sync(uri, make, call):
    folder = make()
    folder.write_result(RESULT)
    told = json.loads(call("sync", "--json").stdout)
    assert told["store"] == uri
    assert [(r["run"], r["created"], r["error"]) for r in told["runs"]] == [(folder.name, True, None)]
    again = call("sync")
    assert again.exit_code == 0 and folder.name in again.stdout and "up to date" in again.stdout


def test_sync_of_a_bad_folder_fails_and_says_which(uri, make, call):
    folder: RunFolder = make()
    (folder / "config.yaml").write_text("{: not yaml")
    answer = call("sync", "--json")
    assert answer.exit_code == 1 and json.loads(answer.stdout)["runs"][0]["error"]


def test_rebuild_moves_a_damaged_store_aside_and_fills_a_new_one(tmp_path, make, call):
    folder = make()
    folder.write_result(RESULT)
    (tmp_path / "mlflow.db").write_text("no database " * 500)
    refused = call("sync", "--rebuild", folder.name)
    assert isinstance(refused.exception, ConfigError) and not (tmp_path / "mlflow.db.damaged-1").exists()
    told = call("sync", "--rebuild", "--json")
    assert told.exit_code == 0 and "mlflow.db.damaged-1" in "".join(told.stderr.split())
    assert [(r["run"], r["created"]) for r in json.loads(told.stdout)["runs"]] == [(folder.name, True)]
    whole = call("sync", "--rebuild")
    assert isinstance(whole.exception, StoreError) and "not damaged" in str(whole.exception)


def test_doctor(uri, make, call):
    found = json.loads(call("doctor", "--json").stdout)
    assert found["tracking"] == {"store": uri, "reachable": True, "exists": True, "runs": 0}
    assert found["packages"]["mlflow"] and found["devices"]["cores"] >= 1
    assert {"methods", "backbones", "datasets"} == set(found["registered"])
    assert found["default_run"]["device"] in ("cpu", "cuda", "mps")
    assert "mlflow" in call("doctor").stdout


def test_doctor_looks_without_making(tmp_path, call, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    found = json.loads(call("doctor", "--json").stdout)
    assert found["tracking"]["exists"] is False and not (tmp_path / "mlflow.db").exists()


def test_doctor_tells_of_a_store_that_is_down(call, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    answer = call("doctor", "--json")
    assert answer.exit_code == 1
    assert any("No tracking server answers" in p for p in json.loads(answer.stdout)["problems"])
