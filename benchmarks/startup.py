"""The command answers at once: seconds over a bare interpreter of the verbs that need no torch.

Claim: `reason --help`, `list`, `show latent` and `run latent --dry-run` cost at most 0.3 s more than
`python -c pass`. The rival is the same command with torch and mlflow imported at its start, as a
command line does that is not careful. Runs are interleaved; the figure is the median of the pairs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time

TARGET_S = 0.3
VERBS = {
    "--help": ["--help"],
    "list": ["list"],
    "show": ["show", "latent"],
    "--dry-run": ["run", "latent", "--dry-run"],
}
OURS = "import sys; sys.argv[0] = 'reason'; from reason.cli.app import main; main()"
RIVAL = "import torch, mlflow; " + OURS


def seconds(code: str, arguments: list[str], cwd: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code, *arguments], cwd=cwd, check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer pairs")
    pairs = 7 if parser.parse_args().quick else 21
    over: dict[str, list[float]] = {verb: [] for verb in VERBS}
    bare: list[float] = []
    with tempfile.TemporaryDirectory() as cwd:
        for arguments in VERBS.values():  # compile and warm the disk cache
            seconds(OURS, arguments, cwd)
        for _ in range(pairs):
            for verb, arguments in VERBS.items():
                floor = seconds("pass", [], cwd)
                bare.append(floor)
                over[verb].append(seconds(OURS, arguments, cwd) - floor)
        rival = statistics.median(
            seconds(RIVAL, ["--help"], cwd) - seconds("pass", [], cwd) for _ in range(2)
        )
    print(f"{'verb':<10} {'over bare, s':>12} {'quartiles':>15}")
    medians = {}
    for verb, values in over.items():
        low, mid, high = statistics.quantiles(values, n=4)
        medians[verb] = mid
        print(f"{verb:<10} {mid:>12.3f} {low:>7.3f}-{high:.3f}")
    print(
        f"bare interpreter {statistics.median(bare):.3f} s; --help with torch and mlflow imported first: {rival:.2f} s over it"
    )
    worst = max(medians.values())
    spread = [statistics.quantiles(v, n=4) for v in over.values()]
    verdict = {
        "benchmark": "startup", "ratio": rival / worst, "worst_s": worst, "target": TARGET_S, "holds": worst <= TARGET_S,
        "spread": [min(q[0] for q in spread), max(q[2] for q in spread)], "verbs": medians, "pairs": pairs,
    }  # fmt: skip
    print(json.dumps(verdict))
    return 0 if worst <= TARGET_S else 1


if __name__ == "__main__":
    sys.exit(main())
