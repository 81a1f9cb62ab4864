"""The mirror is complete, exactly once, whatever the store does meanwhile."""

from __future__ import annotations

import contextlib
import http.server
import math
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
from test_store import free_port
from tracking_samples import CONFIG, RESULT, curve

from reason.files import append_json_lines, read_json, write_json
from reason.tracking import mirror as mirror_module
from reason.tracking.folder import FINISHED, INTERRUPTED, KILLED, RunFolder
from reason.tracking.mirror import Mirror, forget, sync
from reason.tracking.result import SweepResult
from reason.tracking.store import StoreError, open_store


def stored(uri, folder, name):
    """(step, value, time in ms) of a curve in the store."""
    run_id = read_json(folder / "mlflow.json")["run_id"]
    return sorted((m.step, m.value, m.timestamp) for m in open_store(uri).get_metric_history(run_id, name))


def run_of(uri, folder):
    return open_store(uri).get_run(read_json(folder / "mlflow.json")["run_id"])


def all_runs(uri):
    client = open_store(uri)
    return client.search_runs([e.experiment_id for e in client.search_experiments()])


def everything(uri, tmp_path):
    """The whole content of the store, for asking whether anything changed."""
    open_store(uri)
    with sqlite3.connect(tmp_path / "mlflow.db") as db:
        tables = [
            t for (t,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")
        ]
        content = {t: sorted(map(repr, db.execute(f'SELECT * FROM "{t}"'))) for t in tables}
    db.close()
    return content


def wait_for(condition, seconds: float = 30.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(FileNotFoundError):
            if condition():
                return
        time.sleep(0.05)
    raise AssertionError("waited in vain")


def test_a_run_from_start_to_end(uri, make):
    folder = make()
    with folder.lock(), Mirror(folder, uri, every=0.05) as mirror:
        folder.event("attempt", device="cpu", devices=1)
        wait_for(lambda: read_json(folder / "mlflow.json").get("described"))
        run = run_of(uri, folder)
        assert run.info.status == "RUNNING" and run.data.params["method"] == "latent"
        assert run.info.start_time == round(folder.identity["created"] * 1000)
        folder.log_points(curve("train/loss", 20))
        wait_for(lambda: len(stored(uri, folder, "train/loss")) == 20)  # live, with nobody asking
        folder.log_points(curve("valid/NDCG@10", 3))
        (folder / "log.txt").write_text("said\n")
        (folder / "rows" / "test.arrow").write_bytes(b"rows")
        folder.write_result(RESULT)
        assert mirror.close("finished")
    run = run_of(uri, folder)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["accuracy"] == 0.25 and run.data.metrics["eval/NDCG_at_10"] == 0.25
    assert [(s, v) for s, v, _ in stored(uri, folder, "depth/accuracy")] == [(0, 0.1), (1, 0.2), (2, 0.25)]
    wanted = [(p["step"], p["value"], round(p["time"] * 1000)) for p in curve("valid/NDCG@10", 3)]
    assert stored(uri, folder, "valid/NDCG_at_10") == wanted
    assert run.data.params["gpus"] == "0" and run.data.params["params_m"] == "0.5"
    used = run.inputs.dataset_inputs[0].dataset
    assert (used.name, used.digest, used.profile) == ("movielens-100k", "d" * 32, '{"users": 10}')
    client = open_store(uri)
    names = {f.path for f in client.list_artifacts(run.info.run_id)}
    assert names == {"config.yaml", "env.json", "git.diff", "run.json", "result.json", "log.txt", "rows"}
    assert [f.path for f in client.list_artifacts(run.info.run_id, "rows")] == ["rows/test.arrow"]
    assert not [t for t in threading.enumerate() if t.name.startswith("mirror")]


@pytest.mark.parametrize(("error", "status"), [(RuntimeError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_a_block_left_by_an_error_closes_the_run(uri, make, error, status):
    folder = make()
    with pytest.raises(error), Mirror(folder, uri):
        raise error
    assert run_of(uri, folder).info.status == status


def test_thousands_of_points_of_odd_names(uri, make):
    folder = make()
    folder.log_points(curve("a@1", 2500) + curve("b c+d/é", 10))
    folder.log_points([{"name": "loss", "value": None, "kind": "nan", "step": 1, "time": 1_700_000_000.0}])
    change = Mirror(folder, uri).advance("running")
    assert change.points == 2511
    assert len(stored(uri, folder, "a_at_1")) == 2500 and len(stored(uri, folder, "b c_d/_")) == 10
    assert math.isnan(stored(uri, folder, "loss")[0][1])


def test_many_and_long_params(uri, make):
    folder = make(config={**CONFIG, "latent": {f"key{i}": "x" * 7000 if i == 0 else i for i in range(230)}})
    Mirror(folder, uri).advance("running")
    params = run_of(uri, folder).data.params
    assert len([k for k in params if k.startswith("latent.")]) == 230
    assert len(params["latent.key0"]) == 6000


def test_a_second_sync_changes_nothing(uri, make, root, tmp_path):
    done, running, broken = make("done"), make("running"), make("broken")
    sweep = make("plan", kind="sweep", config=None)
    sweep.event("attempt")
    child = make("child", parent=sweep.name)
    for folder in (done, child):
        folder.log_points(curve("train/loss", 30))
        folder.write_result(RESULT)
    broken.event("attempt")
    broken.log_points(curve("train/loss", 5))
    with running.lock():
        running.event("attempt")
        first = sync(root, uri)
        assert [s.error for s in first] == [""] * 5 and all(s.change.created for s in first)
        assert first[0].name == sweep.name  # parents first
        before = everything(uri, tmp_path)
        second = sync(root, uri)
        assert not any(s.change for s in second), second
        assert everything(uri, tmp_path) == before
    assert {s.name: s.status for s in second} == {
        done.name: "finished", child.name: "finished", running.name: "running",
        broken.name: "killed", sweep.name: "killed",
    }  # fmt: skip


def test_an_interrupted_run_is_closed_in_folder_and_store(uri, make, root):
    folder = make()
    folder.event("attempt")
    folder.beat()
    sync(root, uri)
    run = run_of(uri, folder)
    assert folder.status == KILLED and run.info.status == "KILLED"
    assert abs(run.info.end_time - folder.last_sign.time * 1000) <= 1
    sync(root, uri)
    assert len([e for e in folder.events() if e["event"] == "closed"]) == 1


def test_a_run_whose_result_was_deleted_does_not_run_for_ever_in_the_store(uri, make, root):
    folder = make()
    folder.event("attempt")
    folder.event("closed", status=FINISHED)
    sync(root, uri)
    assert folder.status == INTERRUPTED and run_of(uri, folder).info.status == "KILLED"


def test_children_are_found_by_their_parent(uri, make, root):
    sweep = make("plan", kind="sweep", config=None)
    metrics = {"trials": 2, "device_hours": 0.5, "valid_accuracy": 0.3}
    sweep.write_result(SweepResult(run=sweep.name, experiment="plan", trials=[], metrics=metrics))
    (sweep / "trials.csv").write_text("a,b\n")
    children = [make("child", parent=sweep.name) for _ in range(2)]
    make("other")
    sync(root, uri)
    parent = run_of(uri, sweep)
    client = open_store(uri)
    found = client.search_runs(
        [parent.info.experiment_id], f"tags.mlflow.parentRunId = '{parent.info.run_id}'"
    )
    assert {r.info.run_name for r in found} == {c.name for c in children}
    for run in found:
        assert run.data.tags["reason.sweep"] == sweep.name and run.data.tags["reason.method"] == "latent"
        assert run.data.params["method"] == "latent" and run.data.params["depth"] == "2"
    assert parent.data.metrics["trials"] == 2 and parent.data.tags["reason.kind"] == "sweep"
    assert parent.data.tags["mlflow.note.content"].endswith("of 2 trials.")
    assert "trials.csv" in {f.path for f in client.list_artifacts(parent.info.run_id)}


def test_a_parent_that_comes_later_is_tagged_then(uri, make, root):
    sweep = make("plan", kind="sweep", config=None)
    child = make("child", parent=sweep.name)
    child.write_result(RESULT)
    assert Mirror(child, uri).close("finished")
    assert "mlflow.parentRunId" not in run_of(uri, child).data.tags
    sync(root, uri)
    assert run_of(uri, child).data.tags["mlflow.parentRunId"] == read_json(sweep / "mlflow.json")["run_id"]


def test_names_choose_and_a_sweep_brings_its_children(uri, make, root):
    sweep = make("plan", kind="sweep", config=None)
    child, other = make("child", parent=sweep.name), make("other")
    assert [s.name for s in sync(root, uri, [other.name])] == [other.name]
    assert [s.name for s in sync(root, uri, [sweep.name])] == [sweep.name, child.name]


def test_resuming_opens_the_same_run(uri, make):
    folder = make()
    folder.log_points(curve("train/loss", 5))
    first = Mirror(folder, uri)
    first.start()
    assert first.close("killed")
    ended = run_of(uri, folder)
    folder.log_points(curve("train/loss", 5, start=1_700_000_100.0))
    second = Mirror(folder, uri)
    second.start()
    wait_for(lambda: read_json(folder / "mlflow.json")["closed"] is None)
    again = run_of(uri, folder)
    assert (ended.info.status, again.info.status) == ("KILLED", "RUNNING")
    folder.write_result(RESULT)
    assert second.close("finished")
    assert first.run_id == second.run_id and len(all_runs(uri)) == 1
    assert run_of(uri, folder).info.status == "FINISHED"
    assert len(stored(uri, folder, "train/loss")) == 10


def test_a_store_that_is_down_costs_one_line_and_loses_nothing(uri, make, root, capsys, monkeypatch):
    down = f"http://127.0.0.1:{free_port()}"
    folder, another = make(), make()
    for f in (folder, another):
        with f.lock(), Mirror(f, down, every=0.02) as mirror:
            f.event("attempt")
            f.log_points(curve("train/loss", 50))
            assert not mirror.try_advance("running")
            time.sleep(0.1)
            f.write_result(RESULT)
            assert not mirror.close("finished")
        assert mirror.run_id is None
    told = capsys.readouterr().err
    assert told.count("cannot be reached") == 1 and "reason sync" in told
    assert [s.error for s in sync(root, uri)] == ["", ""]
    for f in (folder, another):
        assert len(stored(uri, f, "train/loss")) == 50
        assert run_of(uri, f).info.status == "FINISHED"


def test_a_store_that_is_locked_for_a_while_is_waited_for(uri, make, tmp_path):
    folder = make()
    Mirror(folder, uri).advance("running")
    folder.log_points(curve("train/loss", 50))
    blocker = sqlite3.connect(tmp_path / "mlflow.db", check_same_thread=False, isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    threading.Timer(0.7, lambda: blocker.execute("COMMIT")).start()
    assert Mirror(folder, uri).close("failed")
    assert len(stored(uri, folder, "train/loss")) == 50
    blocker.close()


def test_a_failure_after_partial_success_duplicates_nothing(uri, make):
    """The second of three batches fails; meanwhile the run goes on inside the same second."""
    folder = make()
    folder.log_points(curve("a", 2500, gap=0.01))  # 100 a second: thinned
    folder.log_points(curve("b", 2200))
    mirror = Mirror(folder, uri)
    client = mirror._client = open_store(uri)
    whole, calls = client.log_batch, []

    def fragile(run_id, metrics=(), **rest):
        if metrics:
            calls.append(len(metrics))
            if len(calls) == 2:
                raise OSError("the network is gone")
        return whole(run_id, metrics=metrics, **rest)

    client.log_batch = fragile
    mirror_module._warned.add(uri)
    assert not mirror.try_advance("running")
    assert read_json(folder / "mlflow.json")["offset"] == 0
    folder.log_points(curve("a", 40, start=1_700_000_024.995, gap=0.001))  # the last second goes on
    assert mirror.try_advance("running")
    # What one undisturbed mirror of the same two reads has:
    other = RunFolder.create(folder.path.parent / "elsewhere", "calm", "c" * 8)
    for name in ("run.json", "config.yaml"):
        (other / name).write_bytes((folder / name).read_bytes())
    calm = Mirror(other, uri)
    other.log_points(curve("a", 2500, gap=0.01))
    other.log_points(curve("b", 2200))
    calm.advance("running")
    other.log_points(curve("a", 40, start=1_700_000_024.995, gap=0.001))
    calm.advance("running")
    for name in "ab":
        assert stored(uri, folder, name) == stored(uri, other, name)
    assert len(stored(uri, folder, "b")) == 2200 and len(calls) > 3


def test_a_lost_answer_makes_no_second_run(uri, make):
    """The process died between MLflow's creation of the run and the note of its id."""
    folder = make()
    folder.log_points(curve("train/loss", 5))
    first = Mirror(folder, uri)
    first.advance("running")
    (folder / "mlflow.json").unlink()
    second = Mirror(folder, uri)
    assert not second.advance("running").created
    assert len(all_runs(uri)) == 1 and len(stored(uri, folder, "train/loss")) == 5


def test_another_store_gets_everything_anew(uri, make, root, template, tmp_path):
    folder = make()
    folder.log_points(curve("train/loss", 5))
    folder.write_result(RESULT)
    sync(root, uri)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mlflow.db").write_bytes(template.read_bytes())
    other = f"sqlite:///{tmp_path / 'other' / 'mlflow.db'}"
    assert [s.change.created for s in sync(root, other)] == [True]
    assert len(stored(other, folder, "train/loss")) == 5
    assert run_of(other, folder).data.metrics["accuracy"] == 0.25


def test_one_bad_folder_does_not_hold_up_the_others(uri, make, root):
    bad, good = make("bad"), make("good")
    (bad / "config.yaml").write_text("{: not yaml")
    report = {s.name: s.error for s in sync(root, uri)}
    assert report[bad.name] and not report[good.name]


def test_a_result_written_anew_is_sent_anew(uri, make, root):
    folder = make()
    folder.write_result(RESULT)
    sync(root, uri)
    time.sleep(0.01)
    folder.write_result(replace(RESULT, metrics={"accuracy": 0.5}))
    (change,) = [s.change for s in sync(root, uri)]
    assert "result" in change.details and run_of(uri, folder).data.metrics["accuracy"] == 0.5


def test_forget(uri, make, capsys, monkeypatch):
    folder = make()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert not forget(folder)
    Mirror(folder, uri).advance("running")
    assert forget(folder)
    assert all_runs(uri) == []
    elsewhere = read_json(folder / "mlflow.json") | {"uri": f"http://127.0.0.1:{free_port()}"}
    write_json(folder / "mlflow.json", elsewhere)
    assert not forget(folder)
    assert "could not be deleted from the tracking store" in capsys.readouterr().err


def test_a_damaged_note_of_the_id_is_made_again(uri, make, root, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    folder = make()
    folder.log_points(curve("train/loss", 5))
    folder.write_result(RESULT)
    sync(root, uri)
    for content in ("", "{", "null", '{"uri": "x"}'):
        (folder / "mlflow.json").write_text(content)
        assert [s.error for s in sync(root, uri)] == [""]
        assert len(all_runs(uri)) == 1 and len(stored(uri, folder, "train/loss")) == 5
    (folder / "mlflow.json").write_text("{")
    assert forget(folder) and all_runs(uri) == []


def test_opening_a_store_costs_a_run_nothing(uri, make, monkeypatch):
    """However long MLflow takes to start, and however long the store is silent."""
    released = threading.Event()
    whole = mirror_module.open_store

    def slow(uri):
        assert released.wait(60)
        return whole(uri)

    monkeypatch.setattr(mirror_module, "open_store", slow)
    folder = make()
    start = time.perf_counter()
    mirror = Mirror(folder, uri)
    mirror.start()
    assert time.perf_counter() - start < 0.5 and mirror.run_id is None
    folder.write_result(RESULT)
    threading.Timer(0.5, released.set).start()
    assert mirror.close("finished")
    assert run_of(uri, folder).info.status == "FINISHED"


LOADED = """
import sys, time
from reason.tracking.folder import RunFolder
from reason.tracking.mirror import Mirror
mirror = Mirror(RunFolder(sys.argv[1]), sys.argv[2], every=1.0)
mirror.start()
time.sleep(0.7)
assert "mlflow" not in sys.modules
assert mirror.close("failed") and "mlflow" in sys.modules
"""


def test_a_short_run_does_not_share_its_time_with_the_loading_of_mlflow(uri, make):
    folder = make()
    subprocess.run([sys.executable, "-c", LOADED, str(folder.path), uri], check=True, timeout=60)
    assert run_of(uri, folder).info.status == "FAILED"


def test_making_a_store_of_our_own_is_waited_for(uri, make, monkeypatch):
    """The first run of a newcomer, on a slow disk."""
    monkeypatch.setattr(mirror_module, "CLOSE_S", 0.2)
    whole = mirror_module.prepare
    monkeypatch.setattr(mirror_module, "prepare", lambda uri: (time.sleep(1.0), whole(uri)))
    monkeypatch.setattr(mirror_module, "_warned", {uri})
    folder = make()
    mirror = Mirror(folder, uri)
    start = time.perf_counter()
    mirror.close("failed")
    assert time.perf_counter() - start > 1.0
    wait_for(lambda: read_json(folder / "mlflow.json")["closed"] == "failed")  # it goes on by itself


MUTE = """
import sys
from reason.tracking import mirror
from reason.tracking.folder import RunFolder
mirror.CLOSE_S = 1.0
m = mirror.Mirror(RunFolder(sys.argv[1]), sys.argv[2])
m.start()
sys.exit(m.close("failed"))
"""


def test_a_server_that_accepts_and_never_answers_does_not_hold_up_a_run(make):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        folder = make()
        start = time.perf_counter()
        told = subprocess.run(
            [sys.executable, "-c", MUTE, str(folder.path), address],
            capture_output=True,
            text=True,
            timeout=60,
        )
        took = time.perf_counter() - start
    assert told.returncode == 0 and "Traceback" not in told.stderr
    assert "no response within 1 s" in told.stderr and "reason sync" in told.stderr
    assert took < 28  # of which loading MLflow is most; its own patience is over 30 s


def test_a_locked_store_does_not_hold_up_a_run(uri, make, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(mirror_module, "CLOSE_S", 1.0)
    monkeypatch.setattr(mirror_module, "_warned", set())
    folder = make()
    mirror = Mirror(folder, uri)
    mirror.advance("running")
    folder.log_points(curve("train/loss", 50))
    blocker = sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    start = time.perf_counter()
    assert not mirror.close("failed")
    assert time.perf_counter() - start < 3
    assert "no response within 1 s" in capsys.readouterr().err
    blocker.execute("COMMIT")
    blocker.close()
    wait_for(lambda: read_json(folder / "mlflow.json")["closed"] == "failed")
    assert len(stored(uri, folder, "train/loss")) == 50


def test_a_child_gets_its_parent_at_its_own_close(uri, make):
    sweep = make("plan", kind="sweep", config=None)
    child = make("child", parent=sweep.name)
    mirror = Mirror(child, uri)
    mirror.advance("running")
    assert "mlflow.parentRunId" not in run_of(uri, child).data.tags
    Mirror(sweep, uri).advance("running")
    child.write_result(RESULT)
    assert mirror.close("finished")
    assert run_of(uri, child).data.tags["mlflow.parentRunId"] == read_json(sweep / "mlflow.json")["run_id"]


def test_a_child_that_was_closed_before_its_parent_was_there_gets_it_at_the_parents_close(uri, make, root):
    sweep = make("plan", kind="sweep", config=None)
    child, other = make("child", parent=sweep.name), make("other")
    for folder in (child, other):
        folder.write_result(RESULT)
        assert Mirror(folder, uri).close("finished")
    assert Mirror(sweep, uri).close("finished")
    tags = run_of(uri, child).data.tags
    assert tags["mlflow.parentRunId"] == read_json(sweep / "mlflow.json")["run_id"]
    assert run_of(uri, child).info.status == "FINISHED"
    assert "mlflow.parentRunId" not in run_of(uri, other).data.tags
    sync(root, uri)
    assert not any(s.change for s in sync(root, uri))


def test_a_damaged_run_is_told_and_the_others_go_on(uri, make, root, capsys):
    bad, worse, good = make("bad"), make("worse"), make("good")
    (bad / "run.json").write_text("null")
    (worse / "env.json").write_text("{")
    report = {s.name: s for s in sync(root, uri)}
    assert report[bad.name].status == report[worse.name].status == "damaged" and not report[good.name].error
    assert f"reason rm {bad.name}" in report[bad.name].error and "Delete the file" in report[worse.name].error
    assert [s.name for s in sync(root, uri, [good.name])] == [good.name]
    assert not Mirror(worse, uri).close("failed")
    assert "env.json is not valid JSON" in capsys.readouterr().err


def test_a_password_is_nowhere(make, root, capsys, monkeypatch):
    monkeypatch.setattr(mirror_module, "_warned", set())
    folder = make()
    assert not Mirror(folder, "nonsense://me:se/cret@host:5000").close("failed")
    assert not Mirror(folder, f"http://me:se%2Fcret@127.0.0.1:{free_port()}").close("failed")
    told = capsys.readouterr().err
    assert told.count("cannot be reached") == 2 and "cret" not in told and "unknown scheme" in told


class Refusing(http.server.BaseHTTPRequestHandler):
    """A server that answers every request with 500, and says what it was asked."""

    def do_GET(self):
        self.send_response(500)
        self.end_headers()
        self.wfile.write(f"no: {self.headers} {self.path} http://me:s3cret@there".encode())

    do_POST = do_GET

    def log_message(self, *_):
        pass


def test_a_server_that_fails_does_not_tell_the_password(make, root, capsys, monkeypatch):
    monkeypatch.setattr(mirror_module, "_warned", set())
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    folder = make()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://me:s3cret@127.0.0.1:{server.server_port}"
        assert not Mirror(folder, address).close("failed")
        told = capsys.readouterr().err
        with pytest.raises(StoreError) as refused:
            sync(root, address)
        server.shutdown()
    assert "cannot be reached" in told and "500" in told
    assert "s3cret" not in told + str(refused.value)


def test_traces_of_a_method_become_traces_of_the_run(uri, make):
    import mlflow

    folder = make()
    (folder / "result.json").unlink(missing_ok=True)
    spans = [
        {"name": "7+5=1", "parent": -1, "start": 0, "end": 6, "text": "7+5=1\n", "attributes": {"step": 1, "reward": 0.5}},
        {"name": "answer 1", "parent": 0, "start": 6, "end": 14, "text": "answer 1", "attributes": {"step": 2, "reward": None}},
    ]  # fmt: skip
    told = {
        "name": "test-1", "inputs": {"problem": "(7+5) mod 11"}, "outputs": {"answer": "1"},
        "attributes": {"particles": 2, "right_answer": None}, "tokens": 14, "spans": spans,
    }  # fmt: skip
    append_json_lines(folder / "traces.jsonl", [told, {**told, "name": "test-2"}])
    before = mlflow.get_tracking_uri()
    for _ in range(2):  # a second time there is nothing to send
        mirror = Mirror(folder, uri)
        mirror.advance(KILLED)
        run_id = read_json(folder / "mlflow.json")["run_id"]
        client = open_store(uri)
        found = client.search_traces(locations=[e.experiment_id for e in client.search_experiments()])
        assert sorted(t.info.tags["mlflow.traceName"] for t in found) == ["test-1", "test-2"]
    assert mlflow.get_tracking_uri() == before
    one = client.get_trace(found[0].info.trace_id)
    assert one.info.trace_metadata["mlflow.sourceRun"] == run_id and one.info.execution_duration == 14
    root, first, second = one.data.spans
    assert (first.parent_id, second.parent_id) == (root.span_id, first.span_id)
    assert second.outputs == "answer 1" and first.attributes["reward"] == 0.5
