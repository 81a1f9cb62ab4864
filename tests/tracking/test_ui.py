"""`reason ui` and a plain `mlflow ui` both show the runs, artifacts included, and leave nothing behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from tracking_samples import RESULT

from reason.cli.ui import _free_port, _tail, ui
from reason.errors import ConfigError
from reason.tracking.mirror import Mirror
from reason.tracking.result import to_json
from reason.tracking.store import StoreError

CALL = "import sys; from reason.cli.ui import ui; ui(port=int(sys.argv[1]))"


def get(url: str, **headers: str) -> bytes:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
        return answer.read()


def group_of(child: int) -> list[int]:
    """Living processes whose parent is ``child``, and theirs."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == child and fields[0] != "Z":
            pid = int(stat.parent.name)
            found += [pid, *group_of(pid)]
    return found


def heed_interrupts():
    """A suite that runs in a shell's background inherits that Ctrl-C is ignored; who types it does not."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_pages_answer_when_told_so_and_nothing_is_left(uri, make, tmp_path):
    folder = make()
    folder.write_result(RESULT)
    mirror = Mirror(folder, uri)
    mirror.advance("finished")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        child = subprocess.Popen(
            [sys.executable, "-c", CALL, str(port)],
            cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            preexec_fn=heed_interrupts,
        )  # fmt: skip
        assert child.stdout and child.stderr
        address = child.stdout.readline().strip()
    try:
        assert address.startswith("http://127.0.0.1:") and not address.endswith(f":{port}")
        run = json.loads(get(f"{address}/api/2.0/mlflow/runs/get?run_id={mirror.run_id}"))["run"]
        assert {m["key"]: m["value"] for m in run["data"]["metrics"]}["accuracy"] == 0.25
        kept = get(f"{address}/get-artifact?path=result.json&run_uuid={mirror.run_id}")
        assert to_json(RESULT).items() <= json.loads(kept).items()
        with pytest.raises(urllib.error.HTTPError) as refused:
            get(f"{address}/api/2.0/mlflow/runs/get?run_id={mirror.run_id}", Host="evil.example")
        assert refused.value.code == 403
        refused.value.close()
        members = group_of(child.pid)
        assert members
    finally:
        child.send_signal(signal.SIGINT)
        _, talk = child.communicate(timeout=20)
    assert child.returncode == 0
    assert f"Port {port} is in use" in talk
    assert not [pid for pid in members if Path(f"/proc/{pid}").exists()]


def test_another_host_needs_names(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ConfigError, match="opens the web interface to other machines"):
        ui(host="0.0.0.0")


def test_a_free_port_is_kept():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert _free_port("127.0.0.1", port) == port


def test_a_server_is_named_not_started(monkeypatch, capsys):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.getsockname()[1]}")
        ui()
    assert capsys.readouterr().out.strip() == os.environ["MLFLOW_TRACKING_URI"]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_server_ends_with_a_command_that_is_killed(uri, tmp_path):
    child = subprocess.Popen(
        [sys.executable, "-c", CALL, "0"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout
    address = child.stdout.readline().strip()
    members = group_of(child.pid)
    assert len(members) >= 2 and get(f"{address}/health")
    assert not any(uri.encode() in Path(f"/proc/{pid}/cmdline").read_bytes() for pid in members[:1])
    child.send_signal(signal.SIGKILL)
    child.communicate()
    end = time.monotonic() + 10
    while time.monotonic() < end and any(map(alive, members)):
        time.sleep(0.1)
    assert not [pid for pid in members if alive(pid)]
    with pytest.raises(OSError):
        get(f"{address}/health")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    "uri", ["http://me:s3cret@host:port", "htp://me:s3cret@host", "http://me:s3cret@[host"]
)
def test_what_is_no_address_is_told(monkeypatch, uri):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(StoreError) as told:
        ui()
    assert "s3cret" not in str(told.value)


def test_last_words_hold_no_password(tmp_path):
    with open(tmp_path / "said", "w+b") as output:
        output.write(b"connecting to postgresql://me:s3cret@host/db\nno password s3cret for me\n")
        assert "s3cret" not in _tail(output, "postgresql://me:s3cret@host/db")
