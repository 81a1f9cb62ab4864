"""A folder of many runs answers as fast as a folder of few.

Claims, with 10,000 finished runs beside each other: `list runs` takes 1 s, `compare` of one method (of which there
are 100 runs) 3 s, `sync` with nothing to do 2 s, and a sweep of four trials costs at most 1.5 s more than in an empty
folder, as it does when all of its trials are finished already. --quick has 1,000 runs and asks the same of them.

The runs are two tiny real ones, of latent and of mor, copied under other identities: ten seeds to an experiment. What
never differs (rows, models) are links. Each command is a process of its own, and the machine's disk cache is warm.
"first" is the first call ever in that folder, which has no index; "again" the best of the calls after it. The rival
of the sweep is the same command in an empty folder.

    python benchmarks/store.py [--quick] [--runs N] [--no-sync]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
COMMAND = "import sys; sys.argv[0] = 'reason'; from reason.cli.app import main; main()"
SHORT = ["eval.resamples=100", "eval.latency_samples=4", "hardware.threads=1", "hardware.device=cpu", "train.batch_size=13"]  # fmt: skip
LATENT = [
    "dataset=synthetic-interactions", "dataset.users=40", "dataset.items=32", "dataset.categories=4", "dataset.mean_length=9",
    "backbone.hidden=16", "backbone.ffn=16", "backbone.max_length=10", "train.epochs=2", *SHORT,
]  # fmt: skip
MOR = [
    "dataset=mixed-stream", "dataset.train_documents=60", "dataset.valid_documents=8", "dataset.test_documents=12",
    "dataset.symbols=6", "dataset.hops=2", "dataset.length=20", "backbone.hidden=16", "backbone.heads=2", "backbone.kv_heads=1",
    "backbone.ffn=24", "backbone.context=40", "train.steps=0", "train.epochs=2", *SHORT,
]  # fmt: skip
SWEEP = ["sweep", "latent", "depth=0,1", "seed=100,101", *LATENT]
SEEDS = 10  # runs of an experiment
TARGETS = {"list runs": 1.0, "compare mor": 3.0, "sync": 2.0}  # seconds, of the calls after the first
SWEEP_TARGET = 1.5  # seconds over an empty folder


def call(cwd: Path, *words: str) -> float:
    """Seconds of one command in ``cwd``."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *words], cwd=cwd, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"reason {' '.join(words)} failed:\n{done.stderr}")
    return seconds


def copy(run: Path, root: Path, number: int) -> None:
    """A run like ``run`` under another identity."""
    method, seed = run.name.partition("-")[0], number % SEEDS
    experiment, fresh = f"{method}-{number // SEEDS:04d}", hashlib.sha256(f"{number}".encode()).hexdigest()
    name = f"{experiment}-{fresh[:8]}-1"
    new = {
        "experiment": experiment,
        "run": name,
        "config_hash": fresh,
        "train_hash": fresh[::-1],
        "created": 1.7e9 + number,
    }
    skipped = ("mlflow.json", "mlflow.lock", "lock")
    (root / name).mkdir()
    for path in sorted(run.rglob("*")):
        there = root / name / path.relative_to(run)
        if path.is_dir():
            there.mkdir(parents=True, exist_ok=True)
        elif path.name in ("run.json", "result.json"):
            told = json.loads(path.read_text())
            told |= {k: v for k, v in new.items() if k in told} | ({"seed": seed} if "seed" in told else {})
            there.write_text(json.dumps(told, indent=2) + "\n")
        elif path.name == "config.yaml":
            there.write_text(re.sub(r"(?m)^seed: .*$", f"seed: {seed}", path.read_text()))
        elif path.parent != run and path.suffix:  # rows, models
            os.link(path, there)
        elif path.name not in skipped:
            there.write_bytes(path.read_bytes())


def fill(cwd: Path, runs: int, samples: Path) -> None:
    """``runs`` runs under ``cwd``/runs, one in a hundred of them of mor."""
    latent, mor = sorted(samples.glob("runs/*-*"))
    (cwd / "runs").mkdir(parents=True)
    few = max(runs // 100, SEEDS)
    for number in range(runs):
        copy(mor if number < few else latent, cwd / "runs", number)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="under a minute: 1,000 runs")
    parser.add_argument("--runs", type=int, help="how many (default: 10,000)")
    parser.add_argument(
        "--no-sync", action="store_true", help="leave out sync, whose first call takes minutes"
    )
    options = parser.parse_args()
    runs = options.runs or (1_000 if options.quick else 10_000)
    times: dict[str, tuple[float, float]] = {}  # first, again
    with tempfile.TemporaryDirectory() as scratch:
        samples, empty, full = (Path(scratch) / name for name in ("samples", "empty", "full"))
        samples.mkdir()
        call(samples, "run", "latent", *LATENT)
        call(samples, "run", "mor", *MOR)
        fill(full, runs, samples)
        empty.mkdir()

        def measure(name: str, *words: str, again: int = 2) -> None:
            first = call(full, *words)
            times[name] = (first, min(call(full, *words) for _ in range(again)))
            print(f"{name:24}{times[name][0]:>10.2f}{times[name][1]:>10.2f}", flush=True)

        print(f"{runs} runs; seconds    {'first':>10}{'again':>10}")
        measure("list runs", "list", "runs")
        measure("compare mor", "compare", "mor")
        if not options.no_sync:
            measure("sync", "sync")
        sweeps = {}
        for where in (empty, full):
            sweeps[where.name] = call(where, *SWEEP), min(call(where, *SWEEP) for _ in range(2))
            name = f"sweep, {where.name} folder"
            print(f"{name:24}{sweeps[where.name][0]:>10.2f}{sweeps[where.name][1]:>10.2f}", flush=True)
    over = [ours - rival for ours, rival in zip(sweeps["full"], sweeps["empty"], strict=True)]
    shares = [times[name][1] / TARGETS[name] for name in times] + [s / SWEEP_TARGET for s in over]
    print(f"{'  of its neighbours':24}{over[0]:>10.2f}{over[1]:>10.2f}")
    told = {
        "benchmark": "store", "ratio": round(max(shares), 3), "target": 1.0, "holds": max(shares) <= 1.0, "runs": runs,
        "first": {name: round(t[0], 2) for name, t in times.items()},
        "again": {name: round(t[1], 2) for name, t in times.items()},
        "sweep_over_empty": [round(s, 2) for s in over],
    }  # fmt: skip
    print(json.dumps(told))
    return 0 if told["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())
