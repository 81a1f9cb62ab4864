"""Kill it anywhere: what was finished stays, what was not goes on."""

from __future__ import annotations

import json
import os
import signal
import time

import numpy as np
import pyarrow as pa
import pytest
from command import mlflow_runs, runs, timeless, until
from pyarrow import feather

from reason.engine.launcher import Terminated
from reason.tracking import mirror
from reason.tracking.clock import device_hours
from reason.tracking.folder import RunFolder
from reason.tracking.result import to_json


def slow(tiny):
    """Long enough to be caught in the middle."""
    return [*tiny, "train.epochs=40", "train.patience=0", "dataset.users=200", "train.every=4"]


def trained(steps: int):
    """A run whose checkpoint of at least ``steps`` is written."""
    return lambda: next(
        (r for r in runs() for c in (r / "checkpoints").glob("step-*") if int(c.name.split("-")[1]) >= steps),
        None,
    )


def test_kill_9_and_resume_gives_the_same_metrics(spawn, reason, tiny, store):
    process = spawn("run", "latent", *slow(tiny))
    folder = until(trained(8))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert folder.result is None
    assert reason("list", "runs").code == 0
    assert folder.status == "killed"
    assert reason("resume", folder.name).code == 0
    assert mlflow_runs(store)[folder.name].info.status == "FINISHED" and len(mlflow_runs(store)) == 1
    attempts = [e for e in folder.events() if e["event"] == "attempt"]
    assert len(attempts) == 2
    assert reason("run", "latent", *slow(tiny)).code == 0
    whole = next(r for r in runs() if r.name != folder.name)
    assert timeless(to_json(folder.result)) == timeless(to_json(whole.result))


@pytest.mark.parametrize(("sign", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_close_the_run(spawn, tiny, store, sign, code):
    process = spawn("run", "latent", *slow(tiny))
    folder = until(trained(4))
    process.send_signal(sign)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert folder.status == "killed" and "Traceback" not in err
    assert mlflow_runs(store)[folder.name].info.status == "KILLED"


@pytest.mark.parametrize("stop", [KeyboardInterrupt, Terminated])
def test_stopped_after_its_last_act_a_run_is_finished(reason, tiny, store, monkeypatch, stop):
    write = RunFolder.write_result

    def then_stopped(self, result):
        write(self, result)
        raise stop

    monkeypatch.setattr(RunFolder, "write_result", then_stopped)
    said = reason("run", "latent", *tiny)
    assert said.code == 0 and "NDCG@10" in said.out, said.err
    assert runs()[0].status == "finished" and mlflow_runs(store)[runs()[0].name].info.status == "FINISHED"


def test_a_sweep_killed_half_way_finishes_what_is_missing(spawn, reason, tiny, store):
    words = [*tiny, "depth=0,1", "seed=0,1,2"]
    process = spawn("sweep", "latent", *words)
    until(lambda: sum(r.status == "finished" for r in runs()) >= 3)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = {r.name: (r / "result.json").stat().st_mtime_ns for r in runs() if (r / "result.json").exists()}
    assert 3 <= len(done) < 6
    (sweep,) = runs("sweep")
    assert reason("resume", sweep.name).code == 0
    assert len(runs()) == 6 and all(r.status == "finished" for r in runs())
    assert {
        n: t for n, t in ((r.name, (r / "result.json").stat().st_mtime_ns) for r in runs()) if n in done
    } == done
    assert sum(not r.identity["trained_by"] for r in runs()) == 3
    assert len(mlflow_runs(store)) == 7
    assert sweep.status == "finished"


def test_two_runs_at_once_in_an_empty_folder(spawn, tiny, tmp_path):
    both = [spawn("run", "latent", *tiny) for _ in range(2)]
    for process in both:
        _, err = process.communicate(timeout=200)
        assert process.returncode == 0, err
    assert len(runs()) == 2 and len(mlflow_runs(f"sqlite:///{tmp_path / 'mlflow.db'}")) == 2


def test_a_rank_that_dies_fails_the_run(reason, tiny, store, monkeypatch):
    """Two ranks; the loss is not finite: exit 1, one sentence, no children left."""
    told = reason(
        "run", "latent", *tiny, "hardware.gpus=2", "train.lr=1e30", "train.clip=0", "train.epochs=4"
    )
    assert told.code == 1 and "not finite" in told.err
    assert runs()[0].status == "failed"


def test_two_ranks_judge_a_model_as_one_does(reason, tiny, store):
    assert reason("run", "latent", *tiny).code == 0
    (trained,) = runs()
    assert reason("evaluate", trained.name).code == 0
    assert reason("evaluate", trained.name, "hardware.gpus=2").code == 0
    one, two = sorted((r for r in runs() if r.name != trained.name), key=lambda r: r.result.world_size)
    assert (one.result.world_size, two.result.world_size) == (1, 2)
    files = sorted(p.name for p in (one / "rows").iterdir())
    assert files == sorted(p.name for p in (two / "rows").iterdir()) and "test-depth2.arrow" in files
    for name in files:
        mine, theirs = (feather.read_table(r / "rows" / name) for r in (one, two))
        assert mine.schema == theirs.schema and mine.num_rows == (32 if name.startswith("valid") else 40)
        for column in mine.column_names:
            if pa.types.is_floating(mine.schema.field(column).type):
                np.testing.assert_allclose(theirs.column(column), mine.column(column), rtol=1e-5, atol=1e-6)
            else:
                assert theirs.column(column) == mine.column(column), column


@pytest.mark.parametrize(
    ("old", "new"), [("lr: 0.001", "lr: 0.01"), ("\nseed: 0", "\nseed: 1"), ("epochs: 2", "epochs: 3")]
)
def test_a_configuration_that_was_edited_is_not_resumed(reason, tiny, store, old, new):
    """Another model under the old hash would be a wrong number in silence."""
    assert reason("run", "latent", *tiny).code == 0
    (folder,) = runs()
    (folder / "result.json").unlink()
    text = (folder / "config.yaml").read_text()
    assert old in text
    (folder / "config.yaml").write_text(text.replace(old, new))
    said = reason("resume", folder.name)
    assert said.code == 1 and "config.yaml" in said.err and "Traceback" not in said.err
    (folder / "config.yaml").write_text(text)
    assert reason("resume", folder.name, "--device", "cpu").code == 0


def test_what_was_written_is_shown_beside_what_it_stood_for(reason, tiny, store):
    assert reason("run", "latent", *tiny, "train.patience=${train.epochs}").code == 0
    shown = reason("show", "last")
    assert "= ${train.epochs}" in shown.out
    assert runs()[0].config["train"]["patience"] == 2


def test_a_deleted_result_is_made_again(reason, tiny, store):
    assert reason("run", "latent", *tiny).code == 0
    (folder,) = runs()
    before = timeless(to_json(folder.result))
    (folder / "result.json").write_text("{")
    assert "damaged" in reason("list", "runs").out
    (folder / "result.json").unlink()
    assert folder.status == "interrupted"
    assert reason("resume", "last").code == 0
    assert timeless(to_json(folder.result)) == before


def test_a_run_can_be_read_from_anywhere(reason, tiny, store, tmp_path, monkeypatch):
    assert reason("run", "latent", *tiny).code == 0
    (folder,) = runs()
    assert reason("evaluate", "last", "eval.limit=5", "eval.curve=false").code == 0
    second = next(r for r in runs() if r.name != folder.name)
    (tmp_path / "moved").mkdir()
    monkeypatch.chdir(folder.path)
    assert reason("evaluate", ".", "eval.limit=6", "eval.curve=false").code == 0
    assert all(
        r.identity["trained_by"] in (None, folder.name) for r in folder.all(folder.path.parent.resolve())
    )
    monkeypatch.chdir(tmp_path)
    (second.path).rename(tmp_path / "moved" / second.name)
    told = reason("predict", str(tmp_path / "moved" / second.name))
    assert told.code in (1, 2) and "Traceback" not in told.err
    told = reason("evaluate", str(tmp_path / "moved" / second.name), "eval.limit=4")
    assert told.code == 1 and "not in the same folder" in told.err


@pytest.mark.parametrize(
    "address", ["http://me:s3cret@host:port", "htp://me:s3cret@host", "http://me:s3cret@[host"]
)
def test_an_address_that_is_none_is_told_and_the_run_goes_on(reason, tiny, monkeypatch, address):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    told = reason("run", "latent", *tiny)
    assert told.code == 0 and "NDCG@10" in told.out
    assert "The address of the tracking store" in told.err
    synced = reason("sync")
    assert synced.code == 1 and "The address of the tracking store" in synced.err
    shown = reason("ui")
    assert shown.code == 1 and "The address of the tracking store" in shown.err
    for said in (told, synced, shown):
        assert "s3cret" not in said.err + said.out and "Traceback" not in said.err


def test_a_slow_store_is_not_paid_for(reason, tiny, store, monkeypatch):
    whole = mirror.open_store
    monkeypatch.setattr(mirror, "open_store", lambda uri: (time.sleep(5), whole(uri))[1])
    begun = time.monotonic()
    assert reason("run", "latent", *tiny).code == 0
    assert time.monotonic() - begun > 5  # it is waited for at the end, after the run
    (folder,) = runs()
    assert folder.result.metrics["device_hours"] * 3600 < 4
    assert device_hours(folder, 1)["total"] * 3600 < 4
    assert mlflow_runs(store)[folder.name].info.status == "FINISHED"


def test_list_names_what_a_kill_left_before_it_was_a_run(reason, tiny, store):
    assert reason("run", "latent", *tiny).code == 0
    (folder,) = runs()
    left = RunFolder.create("runs", "latent", "a" * 64)
    young = reason("list", "runs", "--json")
    assert left.name not in young.out + young.err
    os.utime(left.path, (1.0, 1.0))
    told = reason("list", "runs", "--json")
    states = {r["run"]: r["status"] for r in json.loads(told.out)["runs"]}
    assert states == {folder.name: "finished", left.name: "never started"}
    assert f"reason rm {left.name}" in " ".join(told.err.split())
    assert reason("rm", "-y", left.name).code == 0 and not left.path.exists()
