"""What a run costs is read from its events, whatever became of its attempts."""

from __future__ import annotations

import json
import os

import pytest

from reason.engine.cost import hours
from reason.tracking.folder import RunFolder


def folder(tmp_path, events, alive=0.0):
    made = RunFolder.create(tmp_path, "x", "0" * 64)
    lines = [json.dumps({"event": name, "time": time, **data}) for name, time, data in events]
    (made / "events.jsonl").write_text("\n".join(lines) + "\n")
    made.beat()
    os.utime(made / "alive", (alive, alive))
    return made


def attempt(time, devices=1):
    return ("attempt", time, {"devices": devices, "device": "cpu"})


def phase(time, name):
    return ("phase", time, {"phase": name})


def closed(time, status="finished", **data):
    return ("closed", time, {"status": status, **data})


@pytest.mark.parametrize(
    ("events", "alive", "total", "train"),
    [
        (
            [attempt(0), phase(100, "load"), phase(400, "train"), phase(2200, "evaluate"), closed(3600)],
            0,
            1.0,
            0.5,
        ),
        (
            [attempt(0, 2), phase(0, "train"), closed(1800, "failed"), attempt(9000, 2), closed(10800)],
            0,
            2.0,
            1.0,
        ),
        # killed at 1,800 and closed long after, by whoever found it: its last sign of life counts
        ([attempt(0), phase(900, "train"), closed(50_000, "killed", until=1800)], 1800, 0.5, 0.25),
        # killed and not yet closed by anyone; nobody holds the lock
        ([attempt(0), phase(0, "train")], 720, 0.2, 0.2),
        # a sign of life from an earlier attempt cannot make time run backwards
        ([attempt(0), closed(3600), attempt(7200)], 3600, 1.0, 0.0),
    ],
)
def test_hours(tmp_path, events, alive, total, train):
    got = hours(folder(tmp_path, events, alive), 1)
    assert got["total"] == pytest.approx(total) and got["train"] == pytest.approx(train)
