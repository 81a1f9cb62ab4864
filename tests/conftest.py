"""Every test runs alone in an empty folder, on one thread, without the user's environment."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")

SHORT = ["eval.resamples=100", "eval.latency_samples=4", "hardware.threads=1", "hardware.device=cpu"]
TINY = {
    "sequences": [
        "dataset=synthetic-interactions", "dataset.users=40", "dataset.items=32", "dataset.categories=4", "dataset.mean_length=9",
        "backbone.hidden=16", "backbone.ffn=16", "backbone.max_length=10", "train.batch_size=13", "train.epochs=2", *SHORT,
    ],
    "text": [
        "dataset=mixed-stream", "dataset.train_documents=60", "dataset.valid_documents=8", "dataset.test_documents=12",
        "dataset.symbols=6", "dataset.hops=2", "dataset.length=20", "backbone.hidden=16", "backbone.heads=2",
        "backbone.kv_heads=1", "backbone.ffn=24", "backbone.context=40", "train.batch_size=13", "train.steps=0",
        "train.epochs=2", *SHORT,
    ],
    "problems": [
        "dataset=arithmetic", "dataset.modulus=10", "dataset.least=2", "dataset.most=3", "dataset.train_documents=60",
        "dataset.valid_documents=8", "dataset.test_documents=9", "backbone.source=", "backbone.hidden=16", "backbone.heads=2",
        "backbone.kv_heads=1", "backbone.ffn=24", "backbone.layers=1", "backbone.context=80", "depth=4",
        "particle.reward.kind=exact", "particle.reward.source=", "particle.length=8", "particle.steps=3", "train.batch_size=13",
        "train.steps=0", "train.every=0", "train.epochs=2", *SHORT,
    ],
}  # fmt: skip


@pytest.fixture
def tiny() -> list[str]:
    """Words that make a run of any recommender take about a second."""
    return list(TINY["sequences"])


@pytest.fixture
def tiny_text() -> list[str]:
    """The same for any method that reads texts."""
    return list(TINY["text"])


@pytest.fixture
def tiny_by_view() -> dict[str, list[str]]:
    return {view: list(words) for view, words in TINY.items()}


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """Each test starts in an empty folder of its own; no REASON_* and no MLflow address from outside."""
    outside = [n for n in os.environ if n.startswith("REASON_")]
    for name in [*outside, "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def template(tmp_path_factory) -> Path:
    """An empty MLflow database, made once: making one takes seconds."""
    from reason.tracking.store import open_store

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    open_store(f"sqlite:///{path}")._tracking_client.store._dispose_engine()
    return path


@pytest.fixture
def store(template, tmp_path) -> str:
    """The default store of this test's folder, ready made. Its address."""
    shutil.copy(template, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"
