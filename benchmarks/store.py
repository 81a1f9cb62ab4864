"""A folder of many runs answers as fast as a folder of few.

Claims, with 10,000 finished runs beside each other: `list runs` takes 1 s, `compare` of one method (of which there
are 100 runs) 3 s, `sync` with nothing to do 2 s, and a sweep of four trials 1.5 s more than in an empty folder, also
when all of its trials are finished already. With fewer runs the targets are lower, by the runs' share of them.

The runs are two tiny real ones, of latent and of mor, copied under other identities: ten seeds to an experiment. What
never differs (rows, models) are links. Each command is a process of its own. "first" is the first call ever in that
folder, which has no index; "again" the best of two calls after it. Judged are CPU seconds, which other work on the
machine disturbs less; wall seconds stand beside them. The rival of the sweep is the same one in an empty folder;
its first call is the better of two, of two sweeps.

    python benchmarks/store.py [--quick] [--runs N] [--no-sync]

--quick has 1,000 runs, and 50 in the folder that is synced.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import resource
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
SWEEPS = [["sweep", "latent", "depth=0,1", f"seed={seeds}", *LATENT] for seeds in ("100,101", "102,103")]
SEEDS = 10  # runs of an experiment
TARGETS = {  # CPU seconds that a command may take, and those that 10,000 runs may add
    "list runs": (0.4, 0.6), "compare mor": (2.0, 1.0), "sync": (0.8, 1.2), "sweep over empty": (1.0, 0.5),
}  # fmt: skip
Times = tuple[float, float]  # wall and CPU seconds


def call(cwd: Path, *words: str) -> Times:
    """What one command in ``cwd`` takes."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *words], cwd=cwd, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"reason {' '.join(words)} failed:\n{done.stderr}")
    return wall, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


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
    parser.add_argument("--quick", action="store_true", help="about a minute")
    parser.add_argument("--runs", type=int, help="how many (default: 10,000)")
    parser.add_argument(
        "--no-sync", action="store_true", help="leave out sync, whose first call takes minutes"
    )
    options = parser.parse_args()
    runs = options.runs or (1_000 if options.quick else 10_000)
    synced = min(runs, 50) if options.quick else runs
    times: dict[str, tuple[Times, Times]] = {}  # first, again

    def measure(where: Path, name: str, *commands: list[str]) -> None:
        first = min((call(where, *words) for words in commands), key=lambda t: t[1])
        times[name] = first, min((call(where, *commands[0]) for _ in range(2)), key=lambda t: t[1])
        (wall, cpu), (wall_again, cpu_again) = times[name]
        print(f"{name:26}{cpu:>10.2f}{cpu_again:>10.2f}{wall:>12.2f}{wall_again:>10.2f}", flush=True)

    with tempfile.TemporaryDirectory() as scratch:
        samples, empty, full = (Path(scratch) / name for name in ("samples", "empty", "full"))
        for folder in (samples, empty):
            folder.mkdir()
        call(samples, "run", "latent", *LATENT)
        call(samples, "run", "mor", *MOR)
        fill(full, runs, samples)
        to_sync = full if synced == runs else full.with_name("to-sync")
        if to_sync != full:
            fill(to_sync, synced, samples)
        print(f"{f'{runs} runs; seconds':26}{'CPU: first':>10}{'again':>10}{'wall: first':>12}{'again':>10}")
        measure(full, "list runs", ["list", "runs"])
        measure(full, "compare mor", ["compare", "mor"])
        measure(empty, "sweep, empty folder", *SWEEPS)
        measure(full, "sweep, full folder", *SWEEPS)
        if not options.no_sync:
            measure(to_sync, "sync", ["sync"])
    rival, ours = times["sweep, empty folder"], times["sweep, full folder"]
    over = max(mine[1] - theirs[1] for mine, theirs in zip(ours, rival, strict=True))
    seen = {name: times[name][1][1] for name in TARGETS if name in times} | {"sweep over empty": over}
    targets = {
        name: a + b * (synced if name == "sync" else runs) / 10_000 for name, (a, b) in TARGETS.items()
    }
    shares = {name: seen[name] / targets[name] for name in seen}
    print(f"{'of the target':26}" + ", ".join(f"{name} {share:.0%}" for name, share in shares.items()))
    told = {
        "benchmark": "store", "ratio": round(max(shares.values()), 3), "target": 1.0, "holds": max(shares.values()) <= 1.0,
        "runs": runs, "synced": 0 if options.no_sync else synced,
        "cpu_s": {name: [round(t[1], 2) for t in both] for name, both in times.items()},
        "wall_s": {name: [round(t[0], 2) for t in both] for name, both in times.items()},
    }  # fmt: skip
    print(json.dumps(told))
    return 0 if told["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())
