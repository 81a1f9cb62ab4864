"""Claim: of injected faults of a router at least 90 % are found, and clean text alarms at most 5 % of the time.

Windows of some 4,096 tokens are drawn from the test split, document by document; the limits were calibrated on
the validation split, which shares no document with it. Each fault is put into the network or its thresholds, the text
is run, and a window counts as found when at least one statistic of ``monitor.health`` lies beyond its limit. The rate
of clean windows is over all statistics together. The rival is the fixed list of limits that is commonly used
(PSI 0.2, a step's share off by 0.05, entropy 0.3, AUROC 0.8, dead positions 20 %, RMS 20, any fallback).

    zeroed         the routers' weights are 0
    flipped        the sign of their weights
    raised         thresholds are higher by two standard deviations of the scores
    lowered        and lower by as much
    position       scores drawn by the position alone, from those the step gave to clean text: the shares stay right
    stuck          every score is far above its threshold
    no number      NaN

A shift of thresholds by a quarter of a standard deviation is shown beside them, and not judged. Windows are drawn from the
same documents again and again: how many of them do not overlap is printed.

    python benchmarks/mor_audit.py [--quick] [--run FOLDER]

Without a run a small model is trained on the standard library for a minute or two.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from reason.engine import runner
from reason.engine.config import resolve
from reason.engine.session import LoadedRun, load_dataset, open_run
from reason.engine.worker import work
from reason.methods.mor.active import ActiveTokens
from reason.methods.mor.monitor import RoutingSample, alerts, draw_windows, health, observe, sample
from reason.methods.mor.network import MixtureOfRecursions
from reason.methods.mor.token_selection import AboveThreshold, evaluation_route
from reason.tracking.folder import RunFolder

FOUND, CLEAN = 0.9, 0.05  # targets
FAULTS = ("zeroed", "flipped", "raised", "lowered", "position", "stuck", "no number")
SLIGHT = {"raised, slightly": 0.25, "lowered, slightly": -0.25}  # standard deviations; not judged
USUAL = {
    "PSI": (None, 0.2),
    "entropy of depths": (0.3, None),
    "dead positions": (None, 0.2),
    "fallbacks": (None, 0.0),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a smaller model, less text, fewer windows")
    parser.add_argument("--run", metavar="FOLDER", help="a finished run of mor by thresholds")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        loaded = open_run(RunFolder(Path(args.run) if args.run else trained(Path(folder), args.quick)))
        return report(loaded, 8_000 if args.quick else 50_000, 100 if args.quick else 400)


def trained(folder: Path, quick: bool) -> Path:
    """A small run of mor without a tracker."""
    words = [
        "backbone.hidden=96", "backbone.heads=4", "backbone.ffn=256", "backbone.context=128", "backbone.vocab=1024",
        f"train.steps={60 if quick else 300}", "dataset.documents=100", "eval.curve=false", "eval.latency_samples=1",
        "eval.resamples=100", "hardware.threads=1", "hardware.device=cpu", f"runs={folder}",
    ]  # fmt: skip
    plan = resolve("mor", words, environ={})
    made = runner.prepare(plan, load_dataset(plan).digest)
    work({"folder": str(made.path), "device": "cpu", "quiet": True})
    return made.path


def report(loaded: LoadedRun, tokens: int, draws: int) -> int:
    session = loaded.session
    model, config = cast(MixtureOfRecursions, session.network.eval()), session.plan.config
    fitted: Any = session.ctx.calibration or {}
    reference = fitted.get("reference")
    if reference is None or "thresholds" not in fitted:
        raise SystemExit("This run has no calibrated thresholds; use one of mor.routing=expert.")
    test = session.ctx.data.test
    text = sample(test, np.random.default_rng(1).permutation(len(test)), tokens)
    cap = min(config.depth, model.recursions)

    def see(thresholds: list[float], route: Callable[[Tensor], Any] | None = None) -> RoutingSample:
        way = route or (
            lambda t: evaluation_route(model.config, model.recursions, t, thresholds, config.seed)
        )
        return observe(model, text, way, cap, size=config.eval.batch_size, device=session.ctx.device)

    clean = see(fitted["thresholds"])
    seen = {"clean": clean} | {
        name: broken(name, model, fitted["thresholds"], clean, see) for name in (*FAULTS, *SLIGHT)
    }
    length = text["length"].numpy()
    rng = np.random.default_rng(2)
    rows = [draw_windows(text["case"].numpy(), length, reference["tokens"], rng) for _ in range(draws)]
    apart = int(length.sum()) // reference["tokens"]
    fixed = {"limits": USUAL | usual(reference, fitted["capacities"], model.recursions)}
    print(
        f"{loaded.folder.name}: {int(length.sum()):,} tokens of {len(np.unique(text['case']))} test documents, "
        f"{draws} windows of {reference['tokens']:,} tokens each, {apart} of which do not overlap; limits from {fitted['tokens']:,} validation tokens"
    )
    print(f"{'':18}{'alarms':>9}{'by fixed limits':>17}   what alarms most often")
    rates, rivals = {}, {}
    for name, one in seen.items():
        told = [health(one.select(r), reference["shares"]) for r in rows]
        found = [alerts(h, reference) for h in told]
        rates[name] = float(np.mean([bool(f) for f in found]))
        rivals[name] = float(np.mean([bool(alerts(h, fixed)) for h in told]))
        names = [alert.name for f in found for alert in f]
        most = sorted(set(names), key=lambda n: -names.count(n))[:4]
        print(f"{name:18}{rates[name]:9.1%}{rivals[name]:17.1%}   {', '.join(most)}")
    worst = min(rates[name] for name in FAULTS)
    holds = worst >= FOUND and rates["clean"] <= CLEAN
    at_half = [np.mean([rates[n] for n in FAULTS]), np.mean([rivals[n] for n in FAULTS])]
    print(f"mean over the faults {at_half[0]:.1%}, by fixed limits {at_half[1]:.1%}")
    result = {
        "benchmark": "mor_audit", "ratio": round(worst, 4), "target": FOUND, "clean": round(rates["clean"], 4),
        "slight": {n: round(rates[n], 4) for n in SLIGHT}, "windows_apart": apart,
        "target_clean": CLEAN, "holds": bool(holds),
        "spread": [round(min(rates[n] for n in FAULTS), 4), round(max(rates[n] for n in FAULTS), 4)],
        "found": {n: round(rates[n], 4) for n in FAULTS}, "fixed_limits": {n: round(r, 4) for n, r in rivals.items()},
    }  # fmt: skip
    print(json.dumps(result))
    return 0 if holds else 1


def usual(reference: Mapping[str, Any], capacities: list[float], recursions: int) -> dict[str, Any]:
    """Fixed limits of the statistics that every step has."""
    found: dict[str, Any] = {}
    for r in range(1, recursions + 1):
        found[f"logit RMS {r}"] = (None, 20.0)
        found[f"AUROC {r}"] = (0.8, None)
        if r > 1:
            found[f"kept {r}"] = (capacities[r - 1] - 0.05, capacities[r - 1] + 0.05)
    return found


# --- faults -------------------------------------------------------------------------------------------


def broken(
    fault: str,
    model: MixtureOfRecursions,
    thresholds: list[float],
    clean: RoutingSample,
    see: Callable[..., RoutingSample],
) -> RoutingSample:
    """The text as it is seen with a fault."""
    scores = [
        clean.logits[:, r][np.isfinite(clean.logits[:, r])].astype(np.float32)
        for r in range(model.recursions)
    ]
    shift = {"raised": 2.0, "lowered": -2.0, **SLIGHT}.get(fault)
    if shift is not None:
        by = [shift * float(scores[r].std()) for r in range(1, model.recursions)]
        return see([t + b for t, b in zip(thresholds, by, strict=True)])
    if fault == "position":
        return see(thresholds, lambda _: ByPosition(thresholds, scores))
    change = {
        "zeroed": lambda w: w * 0, "flipped": lambda w: -w, "no number": lambda w: w * torch.nan, "stuck": lambda w: w,
    }[fault]  # fmt: skip
    with changed(model, change):
        return see(thresholds, (lambda _: Stuck(thresholds)) if fault == "stuck" else None)


@contextmanager
def changed(model: MixtureOfRecursions, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    weights = [p for router in model.by_step for p in router.parameters()]
    weights += [p for router in model.foreseers for p in router.parameters()]
    kept = [w.detach().clone() for w in weights]
    with torch.no_grad():
        for w in weights:
            w.copy_(change(w))
    try:
        yield
    finally:
        with torch.no_grad():
            for w, was in zip(weights, kept, strict=True):
                w.copy_(was)


class Stuck(AboveThreshold):
    """Scores far above any threshold, in the place of the router's own: the gate hears them too."""

    def __call__(self, step: int, logits: Tensor, candidates: ActiveTokens) -> Any:
        return super().__call__(step, logits.fill_(50.0), candidates)


class ByPosition(AboveThreshold):
    """Scores that the position alone decides, of those that clean text was given."""

    def __init__(self, thresholds: list[float], scores: list[np.ndarray]):
        super().__init__(thresholds)
        rng = np.random.default_rng(3)
        self.scores = [torch.from_numpy(rng.choice(s, 4096)) for s in scores]

    def __call__(self, step: int, logits: Tensor, candidates: ActiveTokens) -> Any:
        return super().__call__(step, logits.copy_(self.scores[step][candidates.position]), candidates)


if __name__ == "__main__":
    sys.exit(main())
