"""The command answers at once: seconds over a bare interpreter of the verbs that need no torch.

Claim: over `python -c pass`, `reason --help` and `list` cost at most 0.30 s, `show latent` and `run latent --dry-run`
at most 0.38 s. The rival is `--help` with torch and mlflow imported at its start, as a command line does that is not
careful. `--before PATH` also runs a checkout of another version. All are run in turn; figures are medians of the
pairs, beside the CPU time that was used, which other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

VERBS = {  # words, target in seconds
    "--help": (["--help"], 0.30),
    "list": (["list"], 0.30),
    "show": (["show", "latent"], 0.38),
    "--dry-run": (["run", "latent", "--dry-run"], 0.38),
}
HERE = Path(__file__).resolve().parent.parent
OURS = "import sys; sys.argv[0] = 'reason'; from reason.cli.app import main; main()"
RIVAL = "import torch, mlflow; " + OURS


def cost(code: str, arguments: list[str], cwd: str, version: Path = HERE) -> tuple[float, float]:
    """(wall, user) seconds of one process that imports ``reason`` from a checkout."""
    used, start = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime, time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=cwd, check=True, capture_output=True,
        env={**os.environ, "PYTHONPATH": str(version)},
    )  # fmt: skip
    wall = time.perf_counter() - start
    return wall, resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - used


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer pairs")
    parser.add_argument("--before", type=Path, metavar="PATH", help="a checkout of another version")
    options = parser.parse_args()
    pairs = 7 if options.quick else 21
    versions = {"ours": HERE} | ({"before": options.before.resolve()} if options.before else {})
    over: dict[str, dict[str, list[tuple[float, float]]]] = {
        v: {verb: [] for verb in VERBS} for v in versions
    }
    bare: list[float] = []
    with tempfile.TemporaryDirectory() as cwd:
        for version in versions.values():  # compile and warm the disk cache
            for arguments, _ in VERBS.values():
                cost(OURS, arguments, cwd, version)
        for _ in range(pairs):
            for verb, (arguments, _) in VERBS.items():
                floor = cost("pass", [], cwd)
                bare.append(floor[0])
                for name, version in versions.items():
                    wall, user = cost(OURS, arguments, cwd, version)
                    over[name][verb].append((wall - floor[0], user - floor[1]))
        rival = statistics.median(
            cost(RIVAL, ["--help"], cwd)[0] - cost("pass", [], cwd)[0] for _ in range(2)
        )

    def medians(version: str, of: int) -> dict[str, float]:
        return {verb: statistics.median(pair[of] for pair in found) for verb, found in over[version].items()}

    wall, user = medians("ours", 0), medians("ours", 1)
    quartiles = {
        verb: statistics.quantiles([w for w, _ in found], n=4) for verb, found in over["ours"].items()
    }
    print(f"{'verb':<10} {'over bare, s':>12} {'quartiles':>13} {'target':>7} {'user, s':>8}", end="")
    print(f" {'before, s':>10} {'ratio':>6} {'of user':>8}" if options.before else "")
    for verb, (_, target) in VERBS.items():
        low, _, high = quartiles[verb]
        print(
            f"{verb:<10} {wall[verb]:>12.3f} {low:>7.3f}-{high:.3f} {target:>7.2f} {user[verb]:>8.3f}", end=""
        )
        if options.before:
            earlier, used = medians("before", 0)[verb], medians("before", 1)[verb]
            print(f" {earlier:>10.3f} {wall[verb] / earlier:>6.2f} {user[verb] / used:>8.2f}", end="")
        print()
    print(
        f"bare interpreter {statistics.median(bare):.3f} s; --help with torch and mlflow imported first: {rival:.2f} s over it"
    )
    worst = max(wall, key=lambda verb: wall[verb] / VERBS[verb][1])
    holds = wall[worst] <= VERBS[worst][1]
    verdict = {
        "benchmark": "startup", "ratio": rival / wall[worst], "worst": worst, "target": VERBS[worst][1], "holds": holds,
        "spread": [min(q[0] for q in quartiles.values()), max(q[2] for q in quartiles.values())],
        "verbs": wall, "user": user, "pairs": pairs,
    }  # fmt: skip
    if options.before:
        verdict["before"], verdict["before_user"] = medians("before", 0), medians("before", 1)
    print(json.dumps(verdict))
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
