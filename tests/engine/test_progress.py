"""What a run says without a terminal: plain lines, now and then, with the time left."""

from __future__ import annotations

from reason.engine import progress
from reason.engine.progress import RunLog


def test_lines_and_the_time_left_of_a_resumed_run(tmp_path, capsys, monkeypatch):
    clock = iter([0.0, 5.0, 10.0, 12.0, 21.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    log = RunLog(tmp_path, 0)
    for done in (100, 105, 110, 112, 120):  # 1 a second, from 100 on
        log.progress("training", done, 200, "loss 1")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "  training 110/200  loss 1  1 min 30 s left",
        "  training 120/200  loss 1  1 min 24 s left",
    ]


def test_every_rank_keeps_a_log_and_only_the_first_speaks(tmp_path, capsys):
    for rank in (0, 1):
        RunLog(tmp_path, rank).say(f"hello {rank}")
    assert capsys.readouterr().err == "hello 0\n"
    assert (tmp_path / "log.txt").read_text().endswith("hello 0\n")
    assert (tmp_path / "log-rank1.txt").read_text().endswith("hello 1\n")


def test_a_disk_that_is_full_does_not_end_a_run(tmp_path):
    RunLog(tmp_path / "absent", 0, quiet=True).say("nobody hears")
