"""Looking at what the command left behind."""

from __future__ import annotations

import time

from reason.tracking.folder import RunFolder


def until(condition, seconds: float = 90.0):
    """The first true value of ``condition()``."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError("waited in vain")


def runs(kind: str = "run") -> list[RunFolder]:
    return [r for r in RunFolder.scan("runs")[0] if r.identity["kind"] == kind]


def timeless(value):
    """A result without times, names of folders and machine, and without what logs hold, which is of attempts."""
    told = ("latency", "throughput", "memory", "hours", "created", "run", "trained_by", "threads", ".jsonl")
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if not any(word in k for word in told)}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def mlflow_runs(address: str):
    """All runs of a store, by name of their folder."""
    from reason.tracking.store import open_store

    client = open_store(address)
    experiment = client.get_experiment_by_name("reason")
    assert experiment is not None
    return {r.info.run_name: r for r in client.search_runs([experiment.experiment_id], max_results=100)}
