"""A store that is made once per session and copied for each test, and folders as the runner leaves them."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest
import yaml

from reason.files import write_json
from reason.tracking.folder import RunFolder
from reason.tracking.store import open_store

CONFIG = {
    "method": "latent",
    "depth": 2,
    "train_depth": 2,
    "seed": 7,
    "backbone": {"name": "sasrec", "dim": 64},
    "dataset": {"name": "movielens-100k"},
    "latent": {"loss": "prl", "tau": 0.1},
    "train": {"lr": 0.001, "batch_size": 64},
    "hardware": {"device": "cpu", "gpus": 0},
    "runs": "runs",
    "offline": False,
}
RESULT = {
    "accuracy": {"name": "NDCG@10", "value": 0.25, "low": 0.2, "high": 0.3, "n": 10},
    "metrics": {
        "accuracy": 0.25,
        "valid_accuracy": 0.26,
        "device_hours": 0.01,
        "gpu_hours": 0.0,
        "latency_p50_ms": 1.5,
        "eval/NDCG@10": 0.25,
        "eval/recall@5": 0.4,
    },
    "curve": [
        {"depth": d, "accuracy": {"value": a, "low": 0.0, "high": 1.0, "n": 10}, "rows": "rows/x.arrow",
         "metrics": {"recall@5": {"value": a / 2}}, "latency_p50_ms": 1.0 + d}
        for d, a in enumerate((0.1, 0.2, 0.25))
    ],
    "device": "cpu", "world_size": 1, "threads": 2, "params_m": 0.5, "info": {"users": 10},
}  # fmt: skip


@pytest.fixture(scope="session")
def template(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    open_store(f"sqlite:///{path}")._tracking_client.store._dispose_engine()
    return path


@pytest.fixture
def uri(template, tmp_path, monkeypatch) -> str:
    """A store of this test's own, with the right schema and no runs."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    shutil.copy(template, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path / "runs"


@pytest.fixture
def make(root):
    """``make(name, **identity)``: a run folder before its first attempt."""

    def make_(name: str = "latent", config: dict | None = CONFIG, **identity) -> RunFolder:
        folder = RunFolder.create(root, name, "c" * 64)
        if config is not None:
            (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        write_json(folder / "env.json", {"commit": "abc", "dirty": True, "versions": {"torch": "2"}})
        (folder / "git.diff").write_text("+1\n", encoding="utf-8")
        write_json(
            folder / "run.json",
            {"kind": "run", "experiment": name, "method": "latent", "config_hash": "c" * 64, "train_hash": "t" * 64,
             "data_digest": "d" * 32, "parent": None, "trained_by": None, "created": time.time(),
             "argv": ["reason", "run", name], **identity},
        )  # fmt: skip
        return folder

    return make_


def curve(name: str, n: int, start: float = 1_700_000_000.0, gap: float = 0.5) -> list[dict]:
    return [{"name": name, "value": float(i), "step": i, "time": start + gap * i} for i in range(n)]
