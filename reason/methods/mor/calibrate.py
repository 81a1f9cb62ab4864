"""Calibration: thresholds that spend on held-out text what top-k spent in training, without looking ahead.

theta_r is the value that the share c_r / c_(r-1) of the logits lies above, among the tokens that the steps before
let through: fitted a step at a time, because the tokens that a step lets through shape the states that the next one scores.

Beside them: profiles, thresholds for less and for all of the depth with the loss that each gives, and the reference
of ``monitor``: the health of the router on clean text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from reason.datasets.packing import Cases
from reason.errors import ConfigError, RunError
from reason.methods.base import Context
from reason.methods.mor.config import MorConfig
from reason.methods.mor.monitor import RoutingSample, fit_reference, observe, sample
from reason.methods.mor.network import MixtureOfRecursions
from reason.methods.mor.router import CERTAIN
from reason.methods.mor.token_selection import AboveThreshold, evaluation_route
from reason.metrics.calibration import ALL_ABOVE, threshold_for_share

FIT_TOKENS = 60_000  # tokens of validation text that thresholds are fitted on
OBSERVED_TOKENS = 30_000  # of these, on which profiles are measured and the router is watched
LOOKS_AHEAD = (
    "mor.route=topk looks at the whole text to decide about each token: it shows how good the choices could be, "
    "and cannot be used to generate text."
)
MAX_THRESHOLD = CERTAIN - 1.0  # no threshold is above this: a token whose logit is not finite goes on


def fit(config: Any, ctx: Context, network: MixtureOfRecursions, cases: Cases) -> dict[str, Any] | None:
    """Thresholds of steps 2 to ``depth`` and the capacities they were fitted to, profiles, and the reference of the
    router's health.

    The reference is of the profile that the run is evaluated with. A token-choice router has a reference alone;
    top-k a note that it looks ahead; None where no router decides.
    """
    mor, depth = network.config, min(config.depth, network.recursions)
    if network.recursions == 1 or mor.routing not in ("expert", "token"):
        return None
    if mor.route == "topk":
        return {"notes": [LOOKS_AHEAD]}
    if mor.route not in ("auto", "threshold", "token"):
        return None
    order = np.random.default_rng(0).permutation(len(cases))[: config.eval.limit or None]
    text = sample(cases, order, OBSERVED_TOKENS)

    def observe_under(thresholds: list[float] | None, whole: bool = False) -> RoutingSample:
        def route(tokens: torch.Tensor) -> Any:
            return evaluation_route(mor, network.recursions, tokens, thresholds, config.seed)

        size = config.eval.batch_size
        return observe(network, text, route, depth, size=size, device=ctx.device, whole=whole)

    if mor.routing == "token":
        return {"reference": fit_reference(observe_under(None, whole=True))}
    trained = mor.shares(network.recursions)
    capacities = trained if mor.mean_depth is None else capacities_with_mean(mor.mean_depth, trained[:depth])
    windows = _fit_windows(cases, order)
    thresholds = _thresholds(config, ctx, network, windows, capacities)
    economy_capacities = capacities_with_mean((1 + sum(capacities[:depth])) / 2, trained[:depth])
    economy, no_thresholds = (
        _thresholds(config, ctx, network, text, economy_capacities),
        [ALL_ABOVE] * (depth - 1),
    )
    by_profile = {"economy": economy, "default": thresholds, "max": no_thresholds}
    observed = {name: observe_under(fitted, whole=name == mor.profile) for name, fitted in by_profile.items()}
    profiles = {name: _profile(fitted, observed[name]) for name, fitted in by_profile.items()}
    return {
        "thresholds": thresholds,
        "capacities": capacities,
        "tokens": int(windows["length"].sum()),
        "profiles": profiles,
        "reference": fit_reference(observed[mor.profile]),
    }


def _profile(thresholds: list[float], observed: RoutingSample) -> dict[str, Any]:
    """Thresholds and what they give: mean depth, loss (nats a token), and the share of tokens at each depth."""
    assert observed.nll is not None and observed.is_target is not None
    depth = observed.depth[observed.depth > 0].astype(np.int64)
    shares = np.bincount(depth, minlength=observed.logits.shape[1] + 1)[1:] / len(depth)
    nll = float(observed.nll.sum() / max(observed.is_target.sum(), 1))
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
        threshold = threshold_for_share(scores[scores != CERTAIN], share)  # of tokens whose logit is finite
        thresholds.append(min(threshold, MAX_THRESHOLD))
    return thresholds


def _fit_windows(cases: Cases, order: np.ndarray) -> dict[str, torch.Tensor]:
    """Windows of the first of these documents, ``FIT_TOKENS`` tokens in all."""
    chosen = order[: max(1, int(np.searchsorted(np.cumsum(cases.tokens[order]), FIT_TOKENS)))]
    batch = cases.batch(np.sort(chosen))
    most = max(1, int(np.searchsorted(np.cumsum(batch["length"].numpy()), FIT_TOKENS)))
    return {name: column[:most] for name, column in batch.items()}


@torch.no_grad()
def _scores(
    config: Any,
    ctx: Context,
    network: MixtureOfRecursions,
    windows: dict[str, torch.Tensor],
    thresholds: list[float],
) -> np.ndarray:
    """Logits of the last of these steps, for the tokens that the thresholds before it let through."""
    found, step = [], len(thresholds)
    for a in range(0, len(windows["tokens"]), config.eval.batch_size):
        tokens, lengths = (
            windows[k][a : a + config.eval.batch_size].to(ctx.device) for k in ("tokens", "length")
        )
        route = AboveThreshold([t + network.config.shift for t in thresholds])
        routed = network(tokens, route, lengths=lengths, cap=step + 1, kv_mode=network.config.kv_mode)
        if len(routed.steps) > step:
            found.append(routed.steps[step].deciding.cpu().numpy())
    return np.concatenate(found) if found else np.zeros(0)


# --- thresholds and capacities ------------------------------------------------------------------------


def capacities_with_mean(mean: float, capacities: Sequence[float]) -> list[float]:
    """Capacities whose sum is ``mean``: these, each raised to the same power, so that they stay in order.

    Raises:
        ValueError: a mean outside 1 to the number of recursions.
    """
    if not 1 <= mean <= len(capacities):
        raise ValueError(f"a mean depth of {mean:g} is not possible with {len(capacities)} recursions.")
    shape = [min(c, 1 - 1e-6) for c in capacities[1:]]
    if mean == 1:
        return [1.0] + [0.0] * len(shape)
    low, high = 0.0, math.inf
    for _ in range(200):
        power = (low + high) / 2 if math.isfinite(high) else (low or 0.5) * 2
        if 1 + sum(c**power for c in shape) > mean:
            low = power
        else:
            high = power
    return [1.0, *(c**high for c in shape)]


# --- reading a calibration ----------------------------------------------------------------------------


def profile_thresholds(calibration: Mapping[str, Any] | None, profile: str) -> Sequence[float] | None:
    """Thresholds of a profile, as they were calibrated; None where there are none.

    Raises:
        ConfigError: thresholds were calibrated, but not of this profile.
    """
    if calibration is None or profile == "default":
        return (calibration or {}).get("thresholds")
    try:
        return calibration["profiles"][profile]["thresholds"]
    except KeyError:
        raise ConfigError(
            f"This run has no thresholds for the profile {profile!r}: only expert-choice routers have profiles.",
            "Leave the profile out, or calibrate anew with `reason evaluate RUN`.",
        ) from None


def require_thresholds(config: MorConfig, recursions: int, calibration: Mapping[str, Any] | None) -> None:
    """Without its thresholds an expert-choice model would silently be routed by top-k, which looks ahead.

    Raises:
        RunError: the model is routed by thresholds, and they are gone.
    """
    if config.routing != "expert" or config.route not in ("auto", "threshold") or recursions == 1:
        return
    if "thresholds" not in (calibration or {}):
        raise RunError(
            "The run is routed by calibrated thresholds, and its calibration.json is gone.",
            "Calibrate anew with `reason evaluate RUN`; mor.route=topk or mor.route=fixed needs none.",
        )
