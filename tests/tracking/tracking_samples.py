"""A configuration, a result and points, as the runner writes them."""

from __future__ import annotations

from reason.tracking.result import Judged, Measure, Result, RunUnits

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


def measure(name: str, value: float, column: str = "hit") -> Measure:
    return Measure(name, value, low=0.0, high=1.0, n=10, column=column)


RESULT = Result(
    run="latent-aaaaaaaa-1", experiment="latent", method="latent", backbone="sasrec", dataset="movielens-100k",
    data_digest="d" * 32, split="test", depth=2, train_depth=2, seed=7, config_hash="a" * 64, train_hash="b" * 64,
    units=RunUnits("latent steps", "no step taken", "user", "one ranked request", "users/s"),
    metrics={
        "accuracy": 0.25,
        "valid_accuracy": 0.26,
        "device_hours": 0.01,
        "gpu_hours": 0.0,
        "latency_p50_ms": 1.5,
        "eval/NDCG@10": 0.25,
        "eval/recall@5": 0.4,
    },
    curve=[
        Judged(depth=d, accuracy=measure("NDCG@10", a), rows="rows/x.arrow",
               metrics={"Recall@5": measure("Recall@5", a / 2)}, latency_p50_ms=1.0 + d)
        for d, a in enumerate((0.1, 0.2, 0.25))
    ],
    device="cpu", world_size=1, threads=2, params_m=0.5, info={"users": 10},
)  # fmt: skip


def curve(name: str, n: int, start: float = 1_700_000_000.0, gap: float = 0.5) -> list[dict]:
    return [{"name": name, "value": float(i), "step": i, "time": start + gap * i} for i in range(n)]
