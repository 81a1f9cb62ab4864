"""The run folder: numbers given once, states told from files and lock, torn lines passed over."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from tracking_samples import RESULT

from reason.errors import ConfigError, DamagedRun, RunError
from reason.files import read_json, write_json
from reason.tracking.folder import FAILED, FINISHED, INTERRUPTED, KILLED, RUNNING, RunFolder

CREATE = """
import sys
from reason.tracking.folder import RunFolder
sys.stdin.readline()
for _ in range(25): print(RunFolder.create(sys.argv[1], "race", "a" * 64).name)
"""
HOLD = """
import sys, time
from reason.tracking.folder import RunFolder
folder = RunFolder(sys.argv[1])
with folder.lock():
    folder.event("attempt"); folder.beat()
    print("held", flush=True); time.sleep(60)
"""


def test_two_processes_never_get_the_same_folder(root):
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", CREATE, str(root)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for racer in racers:  # both have python up before either begins
        assert racer.stdin
        racer.stdin.write("go\n")
        racer.stdin.flush()
    names = [name for racer in racers for name in racer.communicate(timeout=30)[0].split()]
    assert len(names) == 50 and len(set(names)) == 50
    assert set(names) == {f"race-aaaaaaaa-{n}" for n in range(1, 51)}


def test_a_root_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="Cannot create a run folder"):
        RunFolder.create(tmp_path / "file" / "runs", "x", "a" * 8)


def test_a_killed_process_leaves_an_interrupted_run(make):
    folder = make()
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder.path)], stdout=subprocess.PIPE, text=True
    )
    with child:
        assert child.stdout and child.stdout.readline() == "held\n"
        assert folder.status == RUNNING
        with pytest.raises(RunError, match="another process"), folder.lock():
            pass
        assert folder.settle() == RUNNING
        child.send_signal(signal.SIGKILL)
    assert folder.status == INTERRUPTED
    last = folder.last_sign
    with folder.lock():  # a later attempt can still tell when the killed one ended
        assert folder.last_sign == last
    assert folder.settle() == KILLED
    assert folder.settle() == KILLED
    closed = [e for e in folder.events() if e["event"] == "closed"]
    assert len(closed) == 1 and closed[0]["until"] == last.time


def test_states(make):
    folder = make()
    assert folder.status == INTERRUPTED
    with folder.lock():
        folder.event("attempt")
        assert folder.status == RUNNING
    folder.event("closed", status=FAILED)
    assert folder.status == FAILED
    folder.event("attempt")
    assert folder.status == INTERRUPTED
    folder.event("closed", status=KILLED)
    assert folder.status == KILLED
    folder.write_result(RESULT)
    assert folder.status == FINISHED and folder.result == RESULT


def test_the_lock_outlasts_someone_who_only_looks(make):
    import threading

    import filelock

    folder = make()
    probe = filelock.FileLock(folder / "lock", thread_local=False)
    probe.acquire()
    threading.Timer(0.1, probe.release).start()
    with folder.lock():
        assert folder.is_locked() and not probe.is_locked


def test_torn_lines_are_passed_over_and_nothing_else(make):
    folder = make()
    folder.log_points([{"name": "a", "value": 1.0, "step": 0, "time": 1.0}])
    with open(folder / "metrics.jsonl", "ab") as f:
        f.write(b'{"name": "a", "va')  # killed in the middle of a line
    points, offset = folder.points()
    assert [p["value"] for p in points] == [1.0]
    assert folder.points(offset) == ([], offset)
    folder.log_points([{"name": "a", "value": 2.0, "step": 1, "time": 2.0}])
    points, end = folder.points(offset)
    assert [p["value"] for p in points] == [2.0]
    assert end == os.path.getsize(folder / "metrics.jsonl")
    with open(folder / "metrics.jsonl", "ab") as f:
        f.write(b"\xff\x00\xfe\n")  # a block that the disk lost
    assert folder.points(end) == ([], end + 4)
    assert len(folder.points()[0]) == 2


def test_points_of_a_range(make):
    folder = make()
    rows = [{"name": "a", "value": float(i), "step": i, "time": 1.0} for i in range(3)]
    folder.log_points(rows[:1])
    first = folder.points()[1]
    folder.log_points(rows[1:2])
    second = folder.points()[1]
    folder.log_points(rows[2:])
    assert folder.points(first, second) == (rows[1:2], second)
    assert folder.points(first)[0] == rows[1:]


def test_find(make, root):
    a = make("alpha")
    b = make("alpha", created=time.time() + 10)
    c = make("beta")
    (root / "not-a-run").mkdir()
    assert [r.name for r in RunFolder.all(root)] == [a.name, b.name, c.name]
    assert RunFolder.find(a.name, root).path == a.path
    assert RunFolder.find("be", root).path == c.path
    assert RunFolder.find("last", root).path == b.path
    assert RunFolder.find(str(c.path), "elsewhere").path == c.path
    with pytest.raises(ConfigError, match="matches 2 runs"):
        RunFolder.find("alpha", root)
    with pytest.raises(ConfigError, match="Did you mean 'beta-cccccccc-1'"):
        RunFolder.find("btea-cccccccc-1", root)
    assert RunFolder.all(root / "none") == []


def test_a_broken_result_is_told(make):
    folder = make()
    (folder / "result.json").write_text("{")
    with pytest.raises(RunError, match="not valid JSON"):
        _ = folder.result
    with pytest.raises(ValueError, match="Out of range"):  # NaN: honest or absent
        folder.write_result(replace(RESULT, metrics={"accuracy": float("nan")}))
    assert (folder / "result.json").read_text() == "{"
    write_json(folder / "result.json", {})
    assert read_json(folder / "result.json") == {}


def test_run_folders_are_for_their_owner_alone(root):
    folder = RunFolder.create(root, "x", "a" * 8)
    assert folder.path.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is empty"), ("{", "is not valid JSON"), ("null", "is not a JSON object"), ("[]", "is not a JSON object"),
        ("{}", "has no kind"), ('{"kind": "run", "experiment": "x"}', "has no method"), (b"\xff\xfe{}", "is not valid JSON"),
    ],
)  # fmt: skip
def test_a_damaged_identity_is_told_with_its_mend_and_hides_nobody(make, root, content, words):
    bad, good = make("bad"), make("good")
    (bad / "run.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DamagedRun, match=words) as told:
        _ = bad.identity
    assert told.value.file == "run.json" and f"reason rm {bad.name}" in told.value.hint
    sound, damaged = RunFolder.scan(root)
    assert [r.name for r in sound] == [good.name] and [d.run for d in damaged] == [bad.name]
    assert bad.problem is not None and good.problem is None
    assert RunFolder.find("last", root).name == good.name
    assert RunFolder.find(bad.name, root).path == bad.path


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("config.yaml", "{: no", "is not valid YAML"), ("config.yaml", "", "is empty"), ("config.yaml", "method: lat", "is cut off"),
        ("config.yaml", "method: latent\n", "has no seed"), ("result.json", "null", "is not a JSON object"), ("result.json", "{}", "has no schema"),
        ("origin.json", "{", "is not valid JSON"), ("env.json", "", "is empty"), ("calibration.json", "7", "is not a JSON object"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_a_problem_with_a_mend(make, file, content, words):
    folder = make()
    write_json(folder / "origin.json", {"method": "default", "seed": "default"})
    assert folder.problem is None
    (folder / file).write_text(content)
    problem = folder.problem
    assert problem is not None and problem.file == file and words in problem.message and problem.hint


def test_lines_that_are_no_events_are_passed_over(make):
    folder = make()
    folder.event("attempt")
    with open(folder / "events.jsonl", "a") as f:
        f.write('null\n3\n{"event": "closed"}\n{"event": 4, "time": 1}\n{"event": "clo')
    assert [e["event"] for e in folder.events()] == ["attempt"] and folder.status == INTERRUPTED
    folder.event("closed", status=KILLED)
    assert folder.status == KILLED


def test_what_a_kill_left_before_run_json_is_found_after_a_minute(make, root):
    make()
    left, mine, young = (RunFolder.create(root, "x", "a" * 8) for _ in range(3))
    (mine / "rows").rmdir()
    (root / "notes").mkdir()
    for folder in (left, mine):
        os.utime(folder.path, (1.0, 1.0))
    assert [r.name for r in RunFolder.leftovers(root)] == [left.name]
    assert young.looks_ours and not mine.looks_ours


def test_a_folder_that_was_deleted_cannot_be_held(make):
    folder = make()
    (folder / "lock").unlink(missing_ok=True)
    import shutil

    shutil.rmtree(folder.path)
    with pytest.raises(RunError, match="has been deleted"), folder.lock():
        pass
    assert not folder.path.exists()
