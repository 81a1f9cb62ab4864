"""A sweep comes to a trial that another process is just executing."""

from __future__ import annotations

import os
import signal

import pytest
from command import runs, until

TRIAL = ["depth=1", "train_depth=1", "seed=0", "eval.curve=false"]


@pytest.fixture
def waiting(spawn, tiny, store):
    """A run that stands still, and a sweep that has come to it."""
    other = spawn("run", "latent", *tiny, *TRIAL)
    until(lambda: runs() and runs()[0].status == "running")
    os.kill(other.pid, signal.SIGSTOP)
    sweep = spawn("sweep", "latent", *tiny, *TRIAL[:2], "seed=0,1", "eval.curve=false")
    heard = []
    while not heard or "waiting for its result" not in heard[-1]:
        heard.append(sweep.stderr.readline())
        assert heard[-1], "".join(heard)
    (first,) = runs()
    assert first.name in heard[-1]
    return other, sweep, first


def test_it_waits_for_the_result_and_takes_it(waiting):
    other, sweep, first = waiting
    os.kill(other.pid, signal.SIGCONT)
    _, err = sweep.communicate(timeout=200)
    assert sweep.returncode == other.wait() == 0, err
    assert f"already finished: {first.name}" in err
    assert len(runs()) == 2 and all(r.status == "finished" for r in runs())
    (folder,) = runs("sweep")
    result = folder.sweep_result
    assert result and first.name in {t.run for t in result.trials}


def test_if_that_run_dies_the_sweep_executes_the_trial(waiting):
    other, sweep, first = waiting
    os.kill(other.pid, signal.SIGKILL)
    _, err = sweep.communicate(timeout=200)
    assert sweep.returncode == 0, err
    assert f"{first.name} ended without a result" in err
    (folder,) = runs("sweep")
    result = folder.sweep_result
    assert result
    trials = {t.run for t in result.trials}
    assert len(trials) == 2 and first.name not in trials
    assert first.status != "finished" and len(runs()) == 3


def test_a_sweep_that_waits_can_be_interrupted(waiting, reason):
    other, sweep, first = waiting
    sweep.send_signal(signal.SIGINT)
    sweep.communicate(timeout=60)
    (folder,) = runs("sweep")
    assert sweep.returncode == 130 and folder.status == "killed" and first.status == "running"
    os.kill(other.pid, signal.SIGCONT)
    assert other.wait() == 0
    assert reason("resume", folder.name).code == 0
    assert len(runs()) == 2
