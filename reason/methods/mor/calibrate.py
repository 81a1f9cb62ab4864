"""Thresholds that spend on held-out text what top-k spent in training, without looking ahead.

theta_r is the value that the share c_r / c_(r-1) of the logits lies above, among the tokens that the steps before
let through: fitted a step at a time, because whom a step lets through shapes the states that the next one scores.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from reason.datasets.packing import Cases
from reason.methods.base import Context
from reason.methods.mor.judge import profile_of, quantile_above
from reason.methods.mor.routes import Above

if TYPE_CHECKING:
    from reason.methods.mor.network import MixtureOfRecursions

MOST = 60_000  # tokens of validation text that thresholds are fitted on
OPEN = -1e30  # a threshold that every logit is above


def fit(config: Any, ctx: Context, network: MixtureOfRecursions, cases: Cases) -> dict[str, Any] | None:
    """Thresholds of steps 2 to ``depth``, and what they spent; None where nothing is decided by thresholds."""
    mor, depth = network.config, min(config.depth, network.recursions)
    if mor.routing != "expert" or mor.route not in ("auto", "threshold") or network.recursions == 1:
        return None
    capacities = mor.profile(network.recursions)
    if mor.mean_depth is not None:
        capacities = profile_of(mor.mean_depth, capacities[:depth])
    windows = _some(cases)
    thresholds: list[float] = []
    for step in range(1, len(capacities)):
        scores = _scores(config, ctx, network, windows, [*thresholds, OPEN])
        share = capacities[step] / capacities[step - 1] if capacities[step - 1] else 0.0
        thresholds.append(quantile_above(scores, share))
    return {
        "thresholds": thresholds,
        "capacities": capacities,
        "tokens": int(windows["length"].sum()),
    }


def _some(cases: Cases) -> dict[str, torch.Tensor]:
    """Windows of documents spread over the split, MOST tokens of them."""
    order = np.random.default_rng(0).permutation(len(cases))
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
