"""The index is never the truth: whatever is done to the runs or to it, the answers are those of reading everything."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import os
import random
import shutil
import sqlite3
import time
from pathlib import Path

import pytest
from tracking_samples import RESULT

from reason.files import write_json
from reason.tracking import folder, index, mirror
from reason.tracking.folder import RunFolder
from reason.tracking.index import Index
from reason.tracking.overview import overviews


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """What was read is kept at once; the edits here see to it that time passes between them."""
    monkeypatch.setattr(index, "SETTLED_S", 0.0)


@pytest.fixture
def runs(make, root) -> list[RunFolder]:
    """Finished, failed, never attempted, a sweep and its trial; all kept in the index."""
    done, failed, idle = make("latent"), make("other"), make("idle")
    sweep = make("grid", config=None, kind="sweep")
    trial = make("trial", parent=sweep.name, config_hash="e" * 64)
    for run in (done, trial):
        run.event("attempt", device="cpu", devices=1)
        run.write_result(RESULT)
        run.event("closed", status="finished")
    failed.event("attempt", device="cpu", devices=1)
    failed.event("closed", status="failed")
    answers(root)
    return [done, failed, idle, sweep, trial]


def answers(root: Path) -> list:
    """All that is asked of many runs: who they are, what is wrong, a search by hash, and the list."""
    sound, damaged = RunFolder.scan(root)
    found, _ = RunFolder.scan(root, lambda run: run["config_hash"] == "e" * 64)
    statuses = [
        "damaged" if run.problem else run.status for run in overviews(root)
    ]  # closes what was interrupted
    lines = [{**dataclasses.asdict(run), "problem": str(run.problem)} for run in overviews(root)]
    return [[r.name for r in sound], [str(d) for d in damaged], [r.name for r in found], statuses, lines]


def plain(root: Path) -> list:
    """The same, from the folders alone."""
    with pytest.MonkeyPatch.context() as without:
        without.setattr(Index, "recall", lambda *_: None)
        without.setattr(Index, "save", lambda *_: None)
        return answers(root)


def new_process() -> None:
    """What this process remembers is forgotten; the file stays."""
    index._opened.cache_clear()


def rewrite(run: RunFolder, **news) -> None:
    write_json(run / "run.json", json.loads((run / "run.json").read_text()) | news)


def replace(run: RunFolder) -> None:
    shutil.copytree(run.path, aside := run.path.with_name("aside"))
    shutil.rmtree(run.path)
    aside.rename(run.path)
    rewrite(run, experiment="replaced")


def again(run: RunFolder) -> None:
    """As after a kill: another attempt, and no result."""
    (run / "result.json").unlink(missing_ok=True)
    run.event("attempt", device="cpu", devices=1)


def touch_back(run: RunFolder) -> None:
    """Another result of the same length, with the old time of change."""
    path = run / "result.json"
    if path.exists():
        before, text = path.stat(), path.read_text()
        path.write_text(text.replace("0.25", "0.75"))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


EDITS = {
    "another hash": lambda run: rewrite(run, config_hash="e" * 64),
    "its hash is lost": lambda run: rewrite(run, config_hash=1),
    "cut off": lambda run: os.truncate(run / "run.json", 20),
    "result cut off": lambda run: (run / "result.json").write_text("{"),
    "result changed, times as before": touch_back,
    "config damaged": lambda run: (run / "config.yaml").write_text("{: no yaml"),
    "calibration damaged": lambda run: (run / "calibration.json").write_text("garbage"),
    "environment is lost": lambda run: (run / "env.json").unlink(missing_ok=True),
    "result is lost": lambda run: (run / "result.json").unlink(missing_ok=True),
    "result comes": lambda run: run.write_result(RESULT),
    "begun again": again,
    "failed": lambda run: run.event("closed", status="failed"),
    "removed": lambda run: shutil.rmtree(run.path),
    "renamed": lambda run: run.path.rename(run.path.with_name(f"renamed-{run.name}")),
    "replaced": replace,
    "no run any more": lambda run: (run / "run.json").unlink(),
    "copied": lambda run: shutil.copytree(run.path, run.path.with_name(f"copy-{run.name}")),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("fresh", [False, True], ids=["same process", "new process"])
def test_a_run_that_is_changed_behind_the_index_is_read_again(edit, fresh, runs, root):
    before = answers(root)
    time.sleep(0.02)
    EDITS[edit](runs[0])
    if fresh:
        new_process()
    now = answers(root)
    assert now == plain(root)
    assert (now != before) == (edit not in ("environment is lost", "failed", "result comes"))


def test_any_sequence_of_edits_gives_the_answers_of_the_folders(runs, make, root):
    dice = random.Random(0)
    for _ in range(60):
        present = RunFolder.all(root)
        if len(present) < 4:
            make(f"more{dice.random():.6f}".replace(".", ""), config_hash=dice.choice(["e" * 64, "f" * 64]))
            continue
        run, edit = dice.choice(present), dice.choice(sorted(EDITS))
        with contextlib.suppress(OSError, ValueError):  # the run may be too damaged for this
            EDITS[edit](run)
        time.sleep(0.01)
        if dice.random() < 0.5:
            new_process()
        assert answers(root) == plain(root), edit


def flip(path: Path, dice: random.Random) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(20):
        content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    path.write_bytes(content)


def to_folder(path: Path, _) -> None:
    path.unlink()
    path.mkdir()


HARMS = {
    "deleted": lambda path, _: path.unlink(),
    "empty": lambda path, _: path.write_bytes(b""),
    "cut off": lambda path, dice: os.truncate(path, dice.randrange(path.stat().st_size)),
    "bits flipped": flip,
    "something else": lambda path, dice: path.write_bytes(dice.randbytes(5000)),
    "lines that are whole but none of ours": lambda path, _: path.write_bytes(
        index._line(["latent"]) + index._line([["deep"], {}, 3]) + index._line([1, 2, 3])
    ),
    "twice": lambda path, _: path.write_bytes(2 * path.read_bytes()),
    "a folder": to_folder,
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_index_is_rebuilt_without_a_word(harm, runs, root, capsys):
    right = plain(root)
    for seed in range(10):
        for path in sorted(root.glob(".index-*")):
            if path.is_file():
                HARMS[harm](path, random.Random(seed))
        new_process()
        assert answers(root) == right
        new_process()
        assert answers(root) == right
    assert capsys.readouterr() == ("", "")


def test_an_index_of_another_version_is_passed_over(runs, root, monkeypatch):
    lines = (root / ".index-identities.jsonl").read_bytes()
    (root / ".index-identities.jsonl").write_bytes(lines.replace(b"latent", b"wrong!"))
    new_process()
    assert answers(root) == plain(root)
    monkeypatch.setattr(index, "VERSION", index.VERSION + 1)
    new_process()
    assert not Index(root, "identities")._kept


def test_what_has_not_changed_is_not_read_again(runs, root, monkeypatch):
    right = answers(root)
    new_process()

    def never(*_):
        raise AssertionError("read again")

    monkeypatch.setattr(RunFolder, "_object", never)
    assert [[r.name for r in RunFolder.scan(root)[0]]] == right[:1]
    assert [run.name for run in overviews(root) if run.accuracy] == [runs[0].name, runs[4].name]


def test_a_file_that_changed_just_now_is_not_trusted(make, root, monkeypatch):
    """Two changes within a tick of the clock leave the same times."""
    monkeypatch.setattr(index, "SETTLED_S", 60.0)
    make()
    RunFolder.scan(root)
    assert not Index.of(root, "identities")._kept


def test_where_no_index_can_be_written_all_works_without(make, root):
    run = make()
    for sort in ("identities", "overviews"):
        (root / f".index-{sort}.jsonl").mkdir()
    first = answers(root)
    assert first[0] == [run.name]
    new_process()
    assert answers(root) == first == plain(root)
    for left in root.glob(".index-*"):
        left.rmdir()
    root.chmod(0o500)
    try:
        new_process()
        assert answers(root) == first
    finally:
        root.chmod(0o700)


def test_a_private_run_of_somebody_else_is_told_and_not_kept(runs, root, monkeypatch):
    stat = os.stat

    def refuse(path, *words, **more):
        if runs[0].name in str(path) and str(path).endswith("json"):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, *words, **more)

    def refuse_to_read(path):
        if runs[0].name in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return json.loads(path.read_text())

    monkeypatch.setattr(os, "stat", refuse)
    monkeypatch.setattr(folder, "read_json", refuse_to_read)
    assert "Permission denied" in answers(root)[1][0]
    assert index.state(str(runs[0].path), ["run.json"]) is None
    assert answers(root) == plain(root)


def test_an_index_does_not_grow_without_end(make, root):
    runs = [make(f"r{n}") for n in range(3)]
    RunFolder.scan(root)
    kept = Index.of(root, "identities")
    for n in range(1200):
        kept.keep(f"gone{n}", index.State("x", 0.0), {})
        kept.save([run.name for run in runs])
    assert len((root / ".index-identities.jsonl").read_bytes().splitlines()) < 500
    new_process()
    assert len(Index.of(root, "identities")._kept) < 250
    assert answers(root) == plain(root)


def work(root: Path, seed: int, errors) -> None:
    dice = random.Random(seed)
    try:
        for n in range(25):
            run = RunFolder.create(root, f"w{seed}", f"{n:08x}")
            names = dict.fromkeys(("experiment", "method", "config_hash", "train_hash"), f"w{seed}")
            identity = {"kind": "run", **names, "created": float(n), "parent": None, "trained_by": None}
            write_json(run / "run.json", identity)
            if dice.random() < 0.3:
                new_process()
            mine = RunFolder.scan(root, lambda told: told["experiment"] == f"w{seed}")[0]
            assert len(mine) == n + 1
            assert sum(line.experiment == f"w{seed}" for line in overviews(root)) == n + 1
    except BaseException as error:
        errors.put(repr(error))
        raise


def test_processes_at_once_disturb_neither_each_other_nor_the_index(runs, root):
    context = multiprocessing.get_context("fork")
    errors = context.Queue()
    workers = [context.Process(target=work, args=(root, seed, errors)) for seed in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert errors.empty() and [w.exitcode for w in workers] == [0, 0, 0]
    new_process()
    assert answers(root) == plain(root)
    assert len(Index.of(root, "identities")._kept) == 80


# --- sync -------------------------------------------------------------------------------------------


@pytest.fixture
def mirrored(runs, root, uri, monkeypatch):
    """All runs are in the store; ``sync(root)`` raises if it opens it again."""
    mirror.sync(root, uri)
    opened = mirror.open_store

    def closed(_):
        raise AssertionError("the store was opened")

    monkeypatch.setattr(mirror, "open_store", closed)

    def reopen() -> None:
        monkeypatch.setattr(mirror, "open_store", opened)

    return reopen


def test_a_sync_of_nothing_opens_no_store(mirrored, runs, root, uri):
    new_process()
    again = mirror.sync(root, uri)
    statuses = ("finished", "failed", "interrupted", "interrupted", "finished")
    assert {s.name: s.status for s in again} == {r.name: s for r, s in zip(runs, statuses, strict=True)}
    assert not any(s.change or s.error for s in again)


@pytest.mark.parametrize(
    ("edit", "what"),
    [
        (lambda run: run.log_points([{"name": "x", "value": 1.0, "step": 1, "time": 1.7e9}]), "points"),
        (lambda run: (run / "env.json").write_text('{"commit": "other"}'), "files"),
        (lambda run: (run / "late.png").write_bytes(b"png"), "files"),
    ],
    ids=["points", "a file in place", "a new file"],
)
def test_what_has_changed_is_sent(edit, what, mirrored, runs, root, uri):
    time.sleep(0.02)
    edit(runs[0])
    mirrored()
    assert [(s.name, getattr(s.change, what)) for s in mirror.sync(root, uri) if s.change] == [
        (runs[0].name, 1)
    ]
    assert not any(s.change for s in mirror.sync(root, uri))


def test_a_run_that_goes_on_is_looked_at(mirrored, runs, root, uri):
    mirrored()
    with runs[1].lock():
        assert {s.name: (s.status, bool(s.change)) for s in mirror.sync(root, uri)}[runs[1].name] == (
            "running",
            True,
        )
    assert not any(s.name != runs[1].name and s.change for s in mirror.sync(root, uri))


def test_a_store_that_lost_its_runs_is_filled_again(mirrored, runs, root, uri):
    with contextlib.closing(sqlite3.connect(uri.removeprefix("sqlite:///"))) as db, db:
        db.execute("DELETE FROM runs")
    mirrored()
    assert all(s.change.created for s in mirror.sync(root, uri))


def test_a_run_without_its_note_of_the_mirror_gets_it_back(mirrored, runs, root, uri):
    for harm in (Path.unlink, lambda path: path.write_text("{")):
        before = mirror._state(runs[0])["run_id"]
        time.sleep(0.02)
        harm(runs[0] / "mlflow.json")
        mirrored()
        assert not any(s.error or s.change.created for s in mirror.sync(root, uri))
        assert mirror._state(runs[0])["run_id"] == before
