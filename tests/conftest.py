"""Every test runs alone in an empty folder, on one thread, without the user's environment."""

from __future__ import annotations

import os
import warnings

import pytest

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """Each test starts in an empty folder of its own; no REASON_* and no MLflow address from outside."""
    for name in [n for n in os.environ if n.startswith("REASON_")] + ["MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        yield
