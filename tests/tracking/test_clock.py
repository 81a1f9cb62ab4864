"""What a run costs is read from its events, whatever became of its attempts."""

from __future__ import annotations

import json
import os

import pytest

from reason.tracking import clock
from reason.tracking.clock import Instant, device_hours
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
def test_hours_by_the_time_of_day(tmp_path, events, alive, total, train):
    """Folders without readings of the monotonic clock."""
    made = folder(tmp_path, events, alive)
    got = device_hours(made, 1)
    assert got["total"] == pytest.approx(total) and got["train"] == pytest.approx(train)


class Clocks:
    """The time of day and the monotonic clock, moved by hand."""

    def __init__(self, monkeypatch):
        self.day, self.monotonic = 1_700_000_000.0, 5_000.0
        monkeypatch.setattr(clock.time, "time", lambda: self.day)
        monkeypatch.setattr(clock.time, "monotonic", lambda: self.monotonic)

    def wait(self, seconds):
        self.day += seconds
        self.monotonic += seconds

    def set_back(self, seconds):
        self.day -= seconds


@pytest.fixture
def clocks(monkeypatch):
    return Clocks(monkeypatch)


@pytest.mark.parametrize("step", [36_000, -36_000])
def test_a_time_of_day_that_is_set_does_not_change_hours(tmp_path, clocks, step):
    made = RunFolder.create(tmp_path, "x", "0" * 64)
    made.event("attempt", device="cpu", devices=2)
    clocks.wait(900)
    made.event("phase", phase="train")
    clocks.set_back(step)
    clocks.wait(900)
    made.event("closed", status="finished")
    assert device_hours(made, 1) == {"total": 1.0, "train": 0.5}


def test_a_killed_attempt_ends_at_its_last_sign_of_life_by_the_monotonic_clock(tmp_path, clocks):
    made = RunFolder.create(tmp_path, "x", "0" * 64)
    made.event("attempt", device="cpu", devices=1)
    made.event("phase", phase="train")
    clocks.set_back(-7_200)
    clocks.wait(1_800)
    made.beat()
    clocks.wait(50_000)  # nobody looks
    assert device_hours(made, 1) == {"total": 0.5, "train": 0.5}
    assert made.settle() == "killed"
    assert device_hours(made, 1) == {"total": 0.5, "train": 0.5}


def test_readings_of_two_boots_are_not_compared(tmp_path, clocks, monkeypatch):
    made = RunFolder.create(tmp_path, "x", "0" * 64)
    made.event("attempt", device="cpu", devices=1)
    clocks.day += 3_600
    clocks.monotonic = 10.0  # the machine was started anew
    monkeypatch.setattr(clock, "boot", lambda: "another")
    made.event("closed", status="killed")
    assert device_hours(made, 1)["total"] == pytest.approx(1.0)


def test_a_sign_of_life_is_never_read_in_part(tmp_path):
    made = RunFolder.create(tmp_path, "x", "0" * 64)
    assert made.last_sign == Instant(0.0)
    made.beat()
    size = (made / "alive").stat().st_size
    made.beat()
    assert (made / "alive").stat().st_size == size and made.last_sign.boot == clock.boot()
    (made / "alive").write_text("")  # as older versions left it
    assert made.last_sign.clock is None and made.last_sign.time > 0


def test_without_a_boot_the_process_is_what_readings_share(monkeypatch):
    monkeypatch.setattr(clock, "_boot_id", lambda: "")
    assert str(os.getpid()) in clock.boot()
    assert Instant(10.0, 5.0, "process 1").since(Instant(3.0, 4.0, "process 2")) == 7.0
