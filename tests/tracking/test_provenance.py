"""Facts about code and machine; nothing secret; quick; content without git."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time

import pytest

from reason.errors import ConfigError
from reason.tracking import provenance


def git(cwd, *words):
    subprocess.run(
        ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=cwd, check=True, capture_output=True
    )


def checkout(path):
    git(path, "init", "-b", "trunk")
    (path / "a.txt").write_text("one\n")
    git(path, "add", ".")
    git(path, "commit", "-m", "first")
    return subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=path, text=True).strip()


def test_a_checkout(tmp_path):
    commit = checkout(tmp_path)
    facts = provenance.capture(tmp_path)
    assert (facts["commit"], facts["branch"], facts["dirty"]) == (commit, "trunk", False)
    assert provenance.diff(tmp_path) == ""
    (tmp_path / "a.txt").write_text("two\n")
    assert provenance.capture(tmp_path)["dirty"] is True
    assert "-one\n+two\n" in provenance.diff(tmp_path)


def test_a_long_diff_is_cut_with_a_note(tmp_path, monkeypatch):
    checkout(tmp_path)
    (tmp_path / "a.txt").write_text("x" * 500)
    monkeypatch.setattr(provenance, "DIFF_CAP", 300)
    text = provenance.diff(tmp_path)
    assert len(text) < 400 and "[truncated:" in text


def test_no_checkout_and_no_git(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    facts = provenance.capture(tmp_path)
    assert facts["commit"] is None and facts["branch"] is None and facts["dirty"] is None
    assert provenance.diff(tmp_path) == ""
    monkeypatch.setenv("PATH", "")
    assert provenance.capture(tmp_path)["commit"] is None


def test_nothing_secret_and_plain_json(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "s3cret")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    text = json.dumps(provenance.capture(tmp_path), allow_nan=False)
    assert "s3cret" not in text and f'"{socket.gethostname()}"' not in text
    facts = json.loads(text)
    assert facts["environment"]["OMP_NUM_THREADS"] == "3"
    assert set(facts["environment"]) <= set(provenance.VARIABLES)
    assert facts["versions"]["torch"] and facts["cores"] == len(os.sched_getaffinity(0))


def test_quick_and_light():
    code = "import sys; from reason.tracking import provenance as p; p.capture(); print(*sys.modules)"
    loaded = subprocess.check_output(
        ["python", "-c", code], text=True, env=os.environ | {"PATH": _path()}
    ).split()
    assert not {"torch", "numpy", "mlflow", "pandas"} & set(loaded)
    best = min(_timed() for _ in range(3))
    assert best < 0.1


def _path() -> str:
    import sys

    return f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"


def _timed() -> float:
    start = time.perf_counter()
    provenance.capture()
    return time.perf_counter() - start


def test_nothing_that_a_folder_names_is_run(tmp_path):
    """A repository that somebody else made, whose configuration and attributes name programs wherever git runs one."""
    place = tmp_path / "theirs"
    place.mkdir()
    checkout(place)
    (place / "b.bin").write_text("bin\n")
    (place / ".gitattributes").write_text("a.txt diff=spy filter=spy\nb.bin filter=other.one\n")
    inner = place / "inner"
    inner.mkdir()
    checkout(inner)
    git(place, "-c", "advice.addEmbeddedRepo=false", "add", ".")
    git(place, "commit", "-m", "second")
    ran = tmp_path / "ran"
    spy = tmp_path / "spy.sh"
    spy.write_text(f'#!/bin/sh\necho "$0 $*" >> {ran}\ncat\n')
    spy.chmod(0o755)
    for key in (
        "core.fsmonitor", "core.pager", "pager.status", "pager.diff", "diff.external", "diff.spy.command", "diff.spy.textconv",
        "filter.spy.clean", "filter.spy.smudge", "filter.spy.process", "filter.other.one.clean", "core.sshCommand",
    ):  # fmt: skip
        git(place, "config", key, str(spy))
        git(inner, "config", key, str(spy))
    git(place, "config", "filter.spy.required", "true")
    git(place, "config", "diff.submodule", "diff")
    for repository in (place, inner):
        for hook in ("post-index-change", "pre-commit", "reference-transaction"):
            path = repository / ".git" / "hooks" / hook
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(spy.read_bytes())
            path.chmod(0o755)
    time.sleep(0.02)
    (place / "a.txt").write_text("two\n")
    (place / "b.bin").write_text("nib\n")
    (inner / "a.txt").write_text("two\n")
    facts, text = provenance.capture(place), provenance.diff(place)
    assert not ran.exists(), ran.read_text()
    assert facts["branch"] == "trunk" and facts["dirty"] is True and "-one\n+two\n" in text and "+nib" in text
    subprocess.run(["git", "status"], cwd=place, capture_output=True)
    assert ran.exists(), "the programs are named rightly: a plain git runs them"


def test_a_diff_can_be_kept_out(tmp_path, monkeypatch):
    checkout(tmp_path)
    (tmp_path / "a.txt").write_text("password\n")
    assert provenance.capture(tmp_path)["diff_kept"] is True
    monkeypatch.setenv("REASON_DIFF", "off")
    assert provenance.diff(tmp_path) == provenance.NOT_KEPT
    facts = provenance.capture(tmp_path)
    assert facts["dirty"] is True and facts["diff_kept"] is False
    monkeypatch.setenv("REASON_DIFF", "of")  # a slip must not send it
    with pytest.raises(ConfigError, match="neither on nor off"):
        provenance.diff(tmp_path)


def test_what_git_does_not_track_is_not_in_a_diff(tmp_path):
    checkout(tmp_path)
    (tmp_path / ".gitignore").write_text("ignored.env\n")
    (tmp_path / ".env").write_text("TOKEN=s3cret\n")
    (tmp_path / "ignored.env").write_text("TOKEN=s3cret\n")
    (tmp_path / "a.txt").write_text("two\n")
    assert "+two" in provenance.diff(tmp_path) and "s3cret" not in provenance.diff(tmp_path)
