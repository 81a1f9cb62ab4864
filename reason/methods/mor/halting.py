"""Halting while decoding: when a token exits the loop, decided without looking at the tokens after it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from reason.errors import ConfigError
from reason.methods.mor.active import ActiveTokens
from reason.methods.mor.network import MixtureOfRecursions
from reason.methods.mor.router import CERTAIN, deepest_if_nonfinite
from reason.methods.mor.token_selection import AboveThreshold, KnownDepths, Route


class HaltingRule:
    """A route for one sequence, applied token by token.

    A token takes the next recursion while it is below its maximum depth and the router's logit is above the
    threshold of that recursion. ``AboveThreshold`` sets the thresholds; known depths, or those that a token-choice
    router chooses at entry, set the maximum.

    Args:
        route: ``AboveThreshold`` or ``KnownDepths`` (one number, or one for each position of the text); None: what a
            token-choice router chooses, else all recursions.
        cap: recursions at most; None: all.

    Raises:
        ConfigError: a route that looks ahead, or one that cannot be applied token by token.
    """

    def __init__(self, model: MixtureOfRecursions, route: Route | None = None, cap: int | None = None):
        self.cap = model.recursions if cap is None else min(cap, model.recursions)
        if self.cap < 1:
            raise ConfigError(f"The cap is {cap} recursions; every token takes the first.", "Use 1 or more.")
        if route is not None and route.looks_ahead:
            raise ConfigError(
                "Top-k looks ahead: which tokens it chooses depends on tokens that are not written yet.",
                "Decode with thresholds (mor.route=threshold), with known depths, or with a token-choice router.",
            )
        self.thresholds = [-np.inf] * self.cap
        self.known: int | Tensor = self.cap
        self.token_choice = route is None and model.by_token is not None
        if isinstance(route, AboveThreshold):
            thresholds = [float(np.float32(t)) for t in route.thresholds]  # as ``router.above_threshold``
            if len(thresholds) < self.cap - 1:
                raise ConfigError(
                    f"There are {len(thresholds)} thresholds for {self.cap - 1} decisions.",
                    f"Cap the depth at {len(thresholds) + 1}.",
                )
            self.thresholds[1:] = thresholds[: self.cap - 1]
        elif isinstance(route, KnownDepths):
            self.known = route.depth
        elif route is not None:
            raise ConfigError(
                f"{type(route).__name__} cannot be applied token by token.",
                "Decode with thresholds, known depths, or a token-choice router.",
            )

    def max_depths(self, positions: np.ndarray, chosen: np.ndarray | None = None) -> np.ndarray:
        """(m,) the maximum depth of the tokens at ``positions``; chosen: (m,) depths that a token-choice router chose.

        Raises:
            ConfigError: depths are known of fewer positions.
        """
        if self.token_choice and chosen is not None:
            return np.minimum(chosen, self.cap)
        if isinstance(self.known, int):
            return np.full(len(positions), min(self.known, self.cap))
        if positions[-1] >= len(self.known):
            raise ConfigError(
                f"Depths are known for {len(self.known)} tokens, and the text has more.",
                "Replay no more tokens than were recorded.",
            )
        return np.minimum(self.known[torch.from_numpy(positions)].cpu().numpy(), self.cap)


def choose_depths(model: MixtureOfRecursions, x: Tensor) -> tuple[Tensor | None, np.ndarray | None]:
    """The choice of a token-choice router at entry to the loop, of states (n, D): its logits (n, N_r) and the depths
    (n,) that they mean; None without such a router."""
    if model.by_token is None:
        return None, None
    entry = deepest_if_nonfinite(model.by_token(x))
    model.fallbacks += int((entry[:, -1] == CERTAIN).sum())
    return entry, model.chosen_depth(entry, _one_sequence(x)).cpu().numpy()


def router_logits(model: MixtureOfRecursions, step: int, u: Tensor) -> tuple[Tensor, np.ndarray]:
    """Logits of a step's router for states (n, D): (n,) for the gate, and on the host the ones that decide (those of
    the auxiliary router where there is one). Zeros without a router."""
    if not model.by_step:
        return u.new_zeros(len(u), dtype=torch.float32), np.zeros(len(u), np.float32)
    logits, deciding = _finite(model, model.by_step[step](u))
    if model.foreseers:
        deciding = _finite(model, model.foreseers[step](u))[1]
    return logits, deciding


def _finite(model: MixtureOfRecursions, logits: Tensor) -> tuple[Tensor, np.ndarray]:
    """(n, 1) -> (n,) twice, on the device and on the host, where those that are not finite are counted and replaced."""
    host = logits.cpu().numpy()
    if not (finite := np.isfinite(host)).all():
        model.fallbacks += int((~finite).sum())
        logits = deepest_if_nonfinite(logits)
        host = logits.cpu().numpy()
    return logits[:, 0], host[:, 0]


def exit_states(
    model: MixtureOfRecursions, x: Tensor, h: Tensor, entry: Tensor | None, depth: Callable[[], np.ndarray]
) -> Tensor:  # fmt: skip
    """States (n, D) after the loop, of tokens whose state was x at entry, is h now, and which took ``depth()`` (n,)
    recursions. entry: (n, N_r) logits of a token-choice router."""
    if entry is None:
        return h
    return model.exit_states(x, h, torch.from_numpy(depth()).long().to(x.device), entry, _one_sequence(x))


def _one_sequence(x: Tensor) -> ActiveTokens:
    """The rows (n, D) as the tokens of one sequence."""
    return ActiveTokens(torch.arange(len(x), device=x.device), 1, len(x))
