"""Run folders as the runner leaves them: real rows, intervals computed from them, config and origin.

Users differ in how predictable they are, whichever model is asked, so runs are correlated over users
as real ones are; a depth adds its gain, a seed its luck.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from omegaconf import OmegaConf
from pyarrow import feather

from reason.files import write_json
from reason.methods.figures import HeatMap, Lines, Table, Tokens, Tree
from reason.metrics.ranking import ranking_columns
from reason.metrics.statistics import bootstrap_interval
from reason.tracking.folder import RunFolder
from reason.tracking.result import (
    Judged,
    Measure,
    Outcome,
    Result,
    RunUnits,
    SweepResult,
    SweepTrial,
    Training,
)

USERS = 300
UNITS = RunUnits(
    depth="latent steps",
    zero="no step taken (the base is the train_depth=0 run)",
    example="user",
    latency="one ranked request",
    throughput="users/s",
)
PROBLEM_UNITS = RunUnits(
    depth="particles",
    zero="one plain sample answers",
    example="problem",
    latency="one solved problem",
    throughput="tokens/s",
    least=1,
)
DIGEST = "0123456789abcdef0123456789abcdef"


class RivalOf(NamedTuple):
    """What ``Maker`` makes of a rival, beside its method at the same depth."""

    gain: float  # over the method
    tokens: float = 1.0  # times those of the method
    latency: float | None = 0.8  # times that of the method; None: not timed
    bound: bool = False
    variant_of: str = ""


RIVALS = {
    "self-consistency": RivalOf(-0.5), "best-of-n": RivalOf(-0.3), "weighted best-of-n": RivalOf(-0.2),
    "one sample": RivalOf(-0.9, latency=None), "oracle": RivalOf(0.9, latency=None, bound=True),
    "beam search": RivalOf(-0.1, 1.2, 1.3), "DVTS": RivalOf(-0.15, 1.3, 1.4),
    "self-consistency at equal tokens": RivalOf(-0.4, 1.01, None, variant_of="self-consistency"),
    "best-of-n at equal tokens": RivalOf(-0.25, 1.01, None, variant_of="best-of-n"),
    "weighted best-of-n at equal tokens": RivalOf(-0.15, 1.01, None, variant_of="weighted best-of-n"),
}  # fmt: skip


class Maker:
    """Makes run folders under ``root``; each a little later than the one before."""

    def __init__(self, root: Path):
        self.root = root
        self.clock = 1_700_000_000.0
        self.made = 0

    def run(
        self,
        *,
        depths: tuple[int, ...] = (0, 1, 2),
        train_depth: int = 2,
        seed: int = 0,
        gain: dict[int, float] | None = None,  # rise of each depth's test score
        valid_gain: dict[int, float] | None = None,  # of its validation score; the same if left out
        experiment: str = "latent",
        method: str = "latent",
        parent: str | None = None,
        trained_by: str | None = None,
        users: int = USERS,
        digest: str = DIGEST,
        accuracy: str = "NDCG@10",
        units: RunUnits = UNITS,
        settings: dict[str, Any] | None = None,
        typed: dict[str, Any] | None = None,
        device_name: str = "Test CPU",
        latency: float = 1.0,
        cohorts: bool = False,  # whether the rows have what tells users apart, and the evaluation its overall numbers
        used: np.ndarray | None = None,  # (users,) depth given to each user: a policy, up to depths[-1]
        rivals: dict[str, RivalOf] | None = None,  # of each depth
        spends: bool = False,  # whether tokens grow with depth; else they are a constant of the data
    ) -> RunFolder:
        self.made += 1
        self.clock += 60
        gain = gain if gain is not None else {0: 0.0, 1: 0.15, 2: 0.25, 3: 0.2}
        config = {
            "method": method, "depth": depths[-1], "train_depth": train_depth, "seed": seed,
            "backbone.name": "sasrec", "backbone.dim": 64, "dataset.name": "movielens-100k",
            f"{method}.loss": "prl", "train.lr": 0.001, "eval.limit": 0, "hardware.gpus": self.made, "runs": "runs",
        } | (settings or {}) | (typed or {})  # fmt: skip
        config_hash = f"{abs(hash((tuple(sorted(map(str, config.items()))), depths, digest))):064x}"
        identity = {
            "kind": "run", "experiment": experiment, "method": method, "parent": parent, "trained_by": trained_by,
            "config_hash": config_hash, "train_hash": "", "created": self.clock,
        }  # fmt: skip
        folder = RunFolder.create(self.root, experiment, f"{self.made:08x}")
        write_json(folder / "run.json", identity)
        write_json(
            folder / "origin.json", {k: "command line" if k in (typed or {}) else "default" for k in config}
        )
        write_json(folder / "env.json", {"python": "3.11", "versions": {"torch": "2"}, "commit": "c0ffee"})
        tree = OmegaConf.create()
        for key, value in config.items():
            OmegaConf.update(tree, key, value)
        OmegaConf.save(tree, folder / "config.yaml")

        curve: list[Judged] = []
        valid_of: dict[str, Measure] = {}
        for depth in depths:
            valid: dict[str, Any] = {}
            for split, gains in (("valid", valid_gain if valid_gain is not None else gain), ("test", gain)):
                path = f"rows/{split}-depth{depth}.arrow"
                given = np.full(users, depth) if used is None else used
                at = {
                    d: ranks(split, users, gains.get(d, 0.0), seed, d, train_depth)
                    for d in set(given.tolist())
                }
                rank = np.array([at[d][user] for user, d in enumerate(given.tolist())])
                more = known(users) | {"step_cosine": np.full(users, 0.9)} if cohorts else {}
                for name, rival in (rivals or {}).items():
                    theirs = ranks(split, users, gains.get(depth, 0.0) + rival.gain, seed, depth, train_depth)
                    more[name] = ranking_columns(theirs)["ndcg@10"]
                measures = self._rows(folder, path, rank, given, accuracy, more)
                outcomes = {name: measure(accuracy, more[name], name) for name in rivals or {}}
                if split == "valid":
                    valid = {"valid_accuracy": measures[accuracy], "valid_rows": path}
                    valid_of = outcomes
                    continue
                tokens, p50 = users * 50.0 * (depth if spends else 1), latency * (1 + 0.3 * depth)
                curve.append(Judged(
                    depth=depth, accuracy=measures.pop(accuracy), rows=path, metrics=measures, **valid,
                    latency_p50_ms=p50, latency_p95_ms=latency * (1.6 + 0.4 * depth),
                    latency_n=100, throughput_per_s=5000 / (1 + 0.2 * depth), effective_depth=float(given.mean()),
                    overall={"coverage@10": 0.5 - 0.1 * depth, "gini@10": 0.9} if cohorts else {},
                    cost={"steps": users * depth, "tokens": tokens, "flops": 1e6 * users * (1 + depth)},
                    rivals={name: Outcome(
                        accuracy=outcomes[name], rows=path, valid_accuracy=valid_of[name], valid_rows=f"rows/valid-depth{depth}.arrow",
                        cost={"tokens": rival.tokens * tokens, "flops": rival.tokens * 1e6 * users * (1 + depth)},
                        bound=rival.bound, variant_of=rival.variant_of,
                        latency_p50_ms=rival.latency and rival.latency * p50, latency_n=100 * bool(rival.latency),
                    ) for name, rival in (rivals or {}).items()},
                ))  # fmt: skip
        popular = self._rows(
            folder,
            "rows/test-popularity.arrow",
            ranks("popular", users, -0.6, 0, 0, 0),
            np.zeros(users),
            accuracy,
        )
        hours = 0.002 if trained_by else 0.02 + 0.004 * train_depth
        folder.write_result(Result(
            run=folder.name, experiment=experiment, method=method, backbone="sasrec",
            dataset="movielens-100k", data_digest=digest, split="test", depth=depths[-1],
            train_depth=train_depth, seed=seed, config_hash=config_hash, train_hash="",
            trained_by=trained_by, units=units, curve=curve,
            baselines={"popularity": Outcome(
                accuracy=popular.pop(accuracy), metrics=popular, rows="rows/test-popularity.arrow")},
            metrics={"device_hours": hours, "train_device_hours": 0.018 + 0.004 * train_depth, "gpu_hours": 0.0},
            training=None if trained_by else Training(900, 9.0, 600, 6.0, 0.2, "early", []),
            device="cpu", device_name=device_name, world_size=1, threads=2, gpus=0, params_m=0.2,
            info={"users": users}, created=self.clock,
        ))  # fmt: skip
        return folder

    def sweep(self, depths=(0, 1, 2, 3), seeds=(0, 1, 2), **keys: Any) -> RunFolder:
        """A finished sweep: its folder, and one child for each depth and seed; the deepest trains."""
        self.made += 1
        folder = RunFolder.create(self.root, "latent-sweep", f"{self.made:08x}")
        write_json(folder / "run.json", {
            "kind": "sweep", "experiment": keys.get("experiment", "latent"), "method": "latent", "parent": None,
            "trained_by": None, "config_hash": "", "train_hash": "", "created": self.clock,
        })  # fmt: skip
        trials = []
        for seed in seeds:
            trainer = None
            for depth in sorted(depths, reverse=True):
                child = self.run(
                    depths=(depth,),
                    train_depth=max(depths),
                    seed=seed,
                    parent=folder.name,
                    trained_by=trainer,
                    **keys,
                )
                trainer = trainer or child.name
                trials.append(SweepTrial({"depth": str(depth), "seed": str(seed)}, child.name))
        folder.write_result(SweepResult(run=folder.name, experiment="latent", trials=trials, metrics={}))
        return folder

    def bases(self, seeds=(0, 1, 2), **keys: Any) -> list[RunFolder]:
        return [self.run(depths=(0,), train_depth=0, seed=seed, **keys) for seed in seeds]

    def _rows(
        self, folder: RunFolder, path: str, rank: np.ndarray, depth: np.ndarray, accuracy: str,
        more: dict[str, np.ndarray] | None = None,
    ) -> dict[str, Measure]:  # fmt: skip
        values = ranking_columns(rank)
        table = pa.table({
            "id": [f"user-{i}" for i in range(len(rank))], "depth_used": depth.astype(float), "rank": rank, **values, **(more or {}),
        })  # fmt: skip
        feather.write_feather(table, folder / path, compression="zstd")
        wanted = {accuracy: "ndcg@10", "Recall@10": "recall@10", "MRR": "mrr"}
        return {name: measure(name, values[column], column) for name, column in wanted.items()}


def measure(name: str, values: np.ndarray, column: str) -> Measure:
    low, high = bootstrap_interval(values, resamples=200)
    return Measure(name, float(values.mean()), float(low), float(high), len(values), column)


def ranks(split: str, users: int, gain: float, seed: int, depth: int, train_depth: int) -> np.ndarray:
    """Ranks from 1 on: the user's own difficulty (the same for all models), the gain, and noise."""
    own = np.random.default_rng(sum(map(ord, split)) if split != "popular" else 99).normal(size=users)
    luck = np.random.default_rng([seed, depth, train_depth])
    score = 1.5 * own + gain + 0.02 * luck.normal() + 0.4 * luck.normal(size=users)
    return 1.0 + np.floor(40 * np.exp(-score))


def known(users: int) -> dict[str, np.ndarray]:
    """What the card of ``latent`` tells users apart by: the same for all runs."""
    rng = np.random.default_rng(5)
    count = rng.geometric(0.02, size=users)
    return {
        "history": rng.geometric(0.08, size=users) + 2,
        "target_count": count,
        "target_head": (count > np.quantile(count, 0.7)).astype(float),
    }


FIGURES = [
    Table("Top items", ["item", "rank", "score"], [["Fargo [1996]", 1, 0.51234], ["Heat", None, 0.1]], "Of 1,682."),
    Lines("States", [0, 1, 2, 3], {"cosine": [0.6, 0.8, 0.9, 0.95], "KL": [1.0, 0.5, None, 0.1]}, "step", "value"),
    HeatMap("Attention", [[0.0, 0.5], [0.75, 1.0]], ["step 0", "step 1"], ["item a", "item b"], "Heads averaged."),
    Tokens("Depths", ["the ", "cat\n", "[sat]"], [1.0, 2.0, 3.0], 1, 3, "recursions"),
    Tree("Lineage", [-1, 0, 1, 0, 3, 3, -1], ["2+3+4", "2+3=5", "5+4=9", "2+3=6", "6+4=10", "6+[4]", "other"],
         [None, 0.9, 0.95, 0.4, 0.3, None, 0.0], [2, 2, 2, 0, 0, 0, 1], ["", "2 copies", "9 right", "", "dropped", "", ""],
         0.0, 1.0, "reward", "Of 2 particles."),
]  # fmt: skip
