"""Thresholds that spend on held-out text what top-k spent in training, without looking ahead.

theta_r is the value that the share c_r / c_(r-1) of the logits lies above, among the tokens that the steps before
let through: fitted a step at a time, because whom a step lets through shapes the states that the next one scores.

Beside them: the same for less and for all of the depth, with what each gives (profiles), and what the router's
health looks like on clean text (the reference of ``monitor``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from reason.datasets.packing import Cases
from reason.methods.base import Context
from reason.methods.mor.judge import judging_route, profile_of
from reason.methods.mor.monitor import Watched, refer, sample, watch
from reason.methods.mor.network import CERTAIN
from reason.methods.mor.routes import Above
from reason.metrics.calibration import ALL_ABOVE, quantile_above

if TYPE_CHECKING:
    from reason.methods.mor.network import MixtureOfRecursions

MOST = 60_000  # tokens of validation text that thresholds are fitted on
WATCHED = 30_000  # of these, on which profiles are measured and the router is watched
AHEAD = (
    "mor.route=topk looks at the whole text to decide about each of its tokens: it tells how good choices could be, "
    "and cannot be had where text is written."
)
BEYOND = CERTAIN - 1.0  # no threshold is above this: whom a broken router says nothing of goes on


def fit(config: Any, ctx: Context, network: MixtureOfRecursions, cases: Cases) -> dict[str, Any] | None:
    """Thresholds of steps 2 to ``depth`` and what they spent, profiles, and the reference of the router's health.

    The reference is of the profile that the run is judged with. A token-choice router has a reference alone;
    top-k a note that it looks ahead; None where no router decides.
    """
    mor, depth = network.config, min(config.depth, network.recursions)
    if network.recursions == 1 or mor.routing not in ("expert", "token"):
        return None
    if mor.route == "topk":
        return {"notes": [AHEAD]}
    if mor.route not in ("auto", "threshold", "token"):
        return None
    order = np.random.default_rng(0).permutation(len(cases))[: config.eval.limit or None]
    watched = sample(cases, order, WATCHED)

    def see(thresholds: list[float] | None, whole: bool = False) -> Watched:
        def route(tokens: torch.Tensor) -> Any:
            return judging_route(mor, network, tokens, thresholds, config.seed)

        size = config.eval.batch_size
        return watch(network, watched, route, depth, size=size, device=ctx.device, whole=whole)

    if mor.routing == "token":
        return {"reference": refer(see(None, whole=True))}
    trained = mor.shares(network.recursions)
    capacities = trained if mor.mean_depth is None else profile_of(mor.mean_depth, trained[:depth])
    windows = _some(cases, order)
    thresholds = _thresholds(config, ctx, network, windows, capacities)
    less = profile_of((1 + sum(capacities[:depth])) / 2, trained[:depth])
    economy, all_of_it = _thresholds(config, ctx, network, watched, less), [ALL_ABOVE] * (depth - 1)
    bars = {"economy": economy, "default": thresholds, "max": all_of_it}
    seen = {name: see(bar, whole=name == mor.profile) for name, bar in bars.items()}
    profiles = {name: _profile(bar, seen[name]) for name, bar in bars.items()}
    return {
        "thresholds": thresholds,
        "capacities": capacities,
        "tokens": int(windows["length"].sum()),
        "profiles": profiles,
        "reference": refer(seen[mor.profile]),
    }


def _profile(thresholds: list[float], seen: Watched) -> dict[str, Any]:
    """Thresholds and what they gave: mean depth, loss (nats a token), and the share of tokens at each depth."""
    assert seen.nll is not None and seen.asked is not None
    depth = seen.depth[seen.depth > 0].astype(np.int64)
    shares = np.bincount(depth, minlength=seen.logits.shape[1] + 1)[1:] / len(depth)
    nll = float(seen.nll.sum() / max(seen.asked.sum(), 1))
    return {
        "thresholds": thresholds,
        "mean_depth": float(depth.mean()),
        "nll": nll,
        "shares": shares.tolist(),
    }


def _thresholds(
    config: Any,
    ctx: Context,
    network: MixtureOfRecursions,
    windows: dict[str, torch.Tensor],
    capacities: list[float],
) -> list[float]:
    thresholds: list[float] = []
    for step in range(1, len(capacities)):
        scores = _scores(config, ctx, network, windows, [*thresholds, ALL_ABOVE])
        share = capacities[step] / capacities[step - 1] if capacities[step - 1] else 0.0
        threshold = quantile_above(scores[scores != CERTAIN], share)  # of tokens whose score was a number
        thresholds.append(min(threshold, BEYOND))
    return thresholds


def _some(cases: Cases, order: np.ndarray) -> dict[str, torch.Tensor]:
    """Windows of the first of these documents, MOST tokens of them."""
    chosen = order[: max(1, int(np.searchsorted(np.cumsum(cases.tokens[order]), MOST)))]
    batch = cases.batch(np.sort(chosen))
    most = max(1, int(np.searchsorted(np.cumsum(batch["length"].numpy()), MOST)))
    return {name: column[:most] for name, column in batch.items()}


@torch.no_grad()
def _scores(
    config: Any,
    ctx: Context,
    network: MixtureOfRecursions,
    windows: dict[str, torch.Tensor],
    thresholds: list[float],
) -> np.ndarray:
    """Logits of the last of these steps, over the tokens that the thresholds before it let through."""
    found, step = [], len(thresholds)
    for a in range(0, len(windows["tokens"]), config.eval.batch_size):
        tokens, real = (
            windows[k][a : a + config.eval.batch_size].to(ctx.device) for k in ("tokens", "length")
        )
        route = Above([t + network.config.shift for t in thresholds])
        routed = network(tokens, route, real=real, cap=step + 1, memory=network.config.memory)
        if len(routed.scored) > step:
            scored = routed.scored[step]
            found.append((scored.logits if scored.foreseen is None else scored.foreseen).cpu().numpy())
    return np.concatenate(found) if found else np.zeros(0)
