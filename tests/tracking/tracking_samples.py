"""A configuration, a result and points, as the runner writes them."""

from __future__ import annotations

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
         "metrics": {"Recall@5": {"value": a / 2}}, "latency_p50_ms": 1.0 + d}
        for d, a in enumerate((0.1, 0.2, 0.25))
    ],
    "device": "cpu", "world_size": 1, "threads": 2, "params_m": 0.5, "info": {"users": 10},
}  # fmt: skip


def curve(name: str, n: int, start: float = 1_700_000_000.0, gap: float = 0.5) -> list[dict]:
    return [{"name": name, "value": float(i), "step": i, "time": start + gap * i} for i in range(n)]
