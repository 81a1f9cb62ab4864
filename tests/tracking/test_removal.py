"""`reason rm` deletes runs of ours, all of them it is asked for, and never anything else."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import typer

from reason.cli import rm as verb
from reason.cli.rm import rm
from reason.errors import ConfigError, ReasonError, RunError
from reason.files import write_json
from reason.tracking import removal
from reason.tracking.folder import RunFolder
from reason.tracking.removal import deletable


@pytest.fixture
def own(tmp_path) -> Path:
    """A folder of the user's, under the root of runs, with a file run.json of theirs."""
    folder = tmp_path / "runs" / "thesis"
    folder.mkdir(parents=True)
    (folder / "chapter.txt").write_text("years of work")
    (folder / "run.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    "content", ["{}", "", "null", '{"kind": "run"}', '{"distance_km": 10, "created": 5}']
)
@pytest.mark.parametrize("name", ["thesis", "runs/thesis"])
def test_a_folder_that_is_no_run_is_left_alone(own, make, content, name):
    make()
    (own / "run.json").write_text(content)
    for inner in ("checkpoints", "rows"):
        (own / inner).mkdir()  # its name still is not one of ours
    with pytest.raises(ConfigError, match="not a valid run"):
        rm([name], yes=True)
    assert (own / "chapter.txt").exists()


@pytest.mark.parametrize("name", ["", " ", ".", "..", "./", "runs/..", "/"])
def test_no_name_is_refused(make, monkeypatch, name):
    folder = make()
    with pytest.raises(ConfigError, match="is not the name of a run"):
        rm([name], yes=True)
    monkeypatch.chdir(folder.path)
    with pytest.raises(ConfigError, match="is not the name of a run"):
        rm([name], yes=True)
    assert folder.identity


def test_the_beginning_of_a_name_is_refused_and_the_whole_one_told(make, root):
    folder = make()
    for name in ("lat", folder.name[:-1], "last"):
        with pytest.raises(ConfigError, match="full name") as told:
            rm([name], yes=True)
        assert folder.name in told.value.hint or name == "last"
    assert folder.path.exists()
    rm([folder.name], yes=True)
    assert not folder.path.exists()


def test_a_path_of_a_run_is_taken(make, root, tmp_path, monkeypatch):
    a, b = make(), make()
    rm([str(a.path)], yes=True, runs=tmp_path / "elsewhere")
    monkeypatch.chdir(root)
    rm([f"./{b.name}/"], yes=True, runs=tmp_path / "elsewhere")
    assert RunFolder.all(root) == []


@pytest.mark.parametrize("content", ["", "{", "null", "{}"])
def test_a_damaged_run_goes_by_its_full_name_alone(make, root, content):
    folder = make()
    (folder / "run.json").write_text(content)
    for name in (str(folder.path), folder.name[:-1]):
        with pytest.raises(ConfigError):
            rm([name], yes=True)
    rm([folder.name], yes=True)
    assert not folder.path.exists()


@pytest.mark.parametrize("lacks", ["rows", "checkpoints"])
def test_a_damaged_run_must_look_like_one(make, lacks):
    folder = make()
    (folder / "run.json").write_text("{")
    (folder / lacks).rmdir()
    with pytest.raises(ConfigError, match="not a valid run"):
        rm([folder.name], yes=True)
    assert folder.path.exists()


def test_what_a_kill_left_before_run_json_goes_once_it_is_no_start(root):
    folder = RunFolder.create(root, "x", "a" * 8)
    with pytest.raises(RunError, match="just be starting"):
        rm([folder.name], yes=True)
    os.utime(folder.path, (1.0, 1.0))
    rm([folder.name], yes=True)
    assert not folder.path.exists()


def test_of_a_link_the_link_goes_and_its_target_stays(make, root, tmp_path):
    folder = make()
    kept = tmp_path / "kept"
    folder.path.rename(kept)
    (root / folder.name).symlink_to(kept)
    inside = make("other")
    (inside / "rows").rmdir()
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "x.arrow").write_text("")
    (inside / "rows").symlink_to(tmp_path / "rows")
    rm([folder.name, inside.name], yes=True)
    assert not (root / folder.name).is_symlink() and (kept / "run.json").exists()
    assert not inside.path.exists() and (tmp_path / "rows" / "x.arrow").exists()


def test_a_run_that_is_resumed_while_it_asks_is_kept(make, monkeypatch):
    folder, other = make(), make()
    entered, leave = threading.Event(), threading.Event()

    def executes():
        with folder.lock():
            entered.set()
            leave.wait(20)

    thread = threading.Thread(target=executes)

    def asked(*_, **__):
        thread.start()
        entered.wait(20)

    monkeypatch.setattr(verb.typer, "confirm", asked)
    monkeypatch.setattr(verb.sys.stdin, "isatty", lambda: True, raising=False)
    try:
        with pytest.raises(RunError, match="another process"):
            rm([other.name, folder.name])
    finally:
        leave.set()
        thread.join()
    assert folder.identity and other.identity


def test_a_model_in_use_is_kept_beside_damaged_runs(make):
    owner = make()
    user, broken = make(trained_by=owner.name), make()
    (broken / "run.json").write_text("")
    with pytest.raises(ConfigError, match=f"used by {user.name}"):
        rm([owner.name], yes=True)
    rm([owner.name, user.name], yes=True)
    assert broken.path.exists() and not owner.path.exists()


def test_a_deletion_that_is_interrupted_can_be_repeated(make, root, monkeypatch):
    folder = make()
    whole = removal.shutil.rmtree

    def fails(path):
        if Path(path).name == "checkpoints":
            raise PermissionError(13, "Permission denied", str(path))
        whole(path)

    monkeypatch.setattr(removal.shutil, "rmtree", fails)
    with pytest.raises(RunError, match="cannot be deleted: Permission denied"):
        rm([folder.name], yes=True)
    monkeypatch.setattr(removal.shutil, "rmtree", whole)
    assert deletable(folder.name, root).identity
    rm([folder.name], yes=True)
    assert not folder.path.exists()


def test_it_asks_where_there_is_somebody_to_ask(make, monkeypatch):
    folder = make()
    monkeypatch.setattr(verb.sys.stdin, "isatty", lambda: False, raising=False)
    with pytest.raises(ConfigError, match="confirmation"):
        rm([folder.name])
    monkeypatch.setattr(verb.sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(verb.typer, "confirm", lambda *_, **__: (_ for _ in ()).throw(typer.Abort()))
    with pytest.raises(typer.Abort):
        rm([folder.name])
    write_json(folder / "x.json", {})
    assert folder.path.exists() and issubclass(ConfigError, ReasonError)
