"""The command as people use it: in this process where that is enough, in one of its own where it is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass

import pytest

from reason.cli.app import main


@dataclass
class Said:
    code: int
    out: str
    err: str


@pytest.fixture
def reason(capsys, monkeypatch):
    """``reason(*words) -> Said``: the command in this process."""

    def call(*words: str) -> Said:
        monkeypatch.setattr(sys, "argv", ["reason", *words])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        text = capsys.readouterr()
        return Said(code, text.out, text.err)

    return call


@pytest.fixture
def spawn():
    """``spawn(*words) -> Popen``: the command in a process of its own, which can be killed."""
    started = []

    def start(*words: str, **environment: str) -> subprocess.Popen:
        code = "from reason.cli.app import main; main()"
        process = subprocess.Popen(
            [sys.executable, "-c", code, *words],
            env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            # A shell's background job ignores Ctrl-C and so would we, who are started from one.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()
