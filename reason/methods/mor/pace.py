"""When tokens leave that come one at a time: what a route says while nothing of the future is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from reason.errors import ConfigError
from reason.methods.mor.network import CERTAIN, deepest_where_broken
from reason.methods.mor.routes import Above, Known, Route
from reason.methods.mor.taken import Taken

if TYPE_CHECKING:
    from reason.methods.mor.network import MixtureOfRecursions


class Pace:
    """A route for one sequence, read token by token.

    A token takes the next step as long as its limit is not reached and the router's logit is above the step's bar.
    Thresholds are bars; depths that are known, or that a token-choice router says at entry, are limits.

    Args:
        route: ``Above`` or ``Known`` (of one number, or of one for each position of the text); None: what a
            token-choice router says, else all recursions.
        cap: recursions at most; None: all.

    Raises:
        ConfigError: a route that looks ahead, or one that cannot be read token by token.
    """

    def __init__(self, model: MixtureOfRecursions, route: Route | None = None, cap: int | None = None):
        self.cap = model.recursions if cap is None else min(cap, model.recursions)
        if self.cap < 1:
            raise ConfigError(f"A cap of {cap} recursions; every token takes the first.", "Use 1 or more.")
        if route is not None and route.looks_ahead:
            raise ConfigError(
                "Top-k looks ahead: whom it chooses depends on the tokens that are still to be written.",
                "Decode with thresholds (mor.route=threshold), with known depths, or with a token-choice router.",
            )
        self.bars = [-np.inf] * self.cap
        self.known: int | Tensor = self.cap
        self.asks = route is None and model.by_token is not None  # the router says a token's depth at entry
        if isinstance(route, Above):
            bars = [float(np.float32(bar)) for bar in route.thresholds]  # as ``router.above`` compares
            if len(bars) < self.cap - 1:
                raise ConfigError(
                    f"{len(bars)} thresholds for {self.cap - 1} decisions.",
                    f"Cap the depth at {len(bars) + 1}.",
                )
            self.bars[1:] = bars[: self.cap - 1]
        elif isinstance(route, Known):
            self.known = route.depth
        elif route is not None:
            raise ConfigError(
                f"{type(route).__name__} cannot be read token by token.",
                "Decode with thresholds, known depths, or a token-choice router.",
            )

    def limits(self, at: np.ndarray, chosen: np.ndarray | None = None) -> np.ndarray:
        """(m,) recursions that the tokens at positions ``at`` take at most; chosen: (m,) what the router says.

        Raises:
            ConfigError: depths are known of fewer positions.
        """
        if self.asks and chosen is not None:
            return np.minimum(chosen, self.cap)
        if isinstance(self.known, int):
            return np.full(len(at), min(self.known, self.cap))
        if at[-1] >= len(self.known):
            raise ConfigError(
                f"Depths are known of {len(self.known)} tokens, and the text has another.",
                "Replay no more tokens than were recorded.",
            )
        return np.minimum(self.known[torch.from_numpy(at)].cpu().numpy(), self.cap)


def chosen(model: MixtureOfRecursions, x: Tensor) -> tuple[Tensor | None, np.ndarray | None]:
    """What a token-choice router says at entry to the loop of states (n, D): its logits (n, N_r) and the depths
    (n,) they mean; None without one."""
    if model.by_token is None:
        return None, None
    entry = deepest_where_broken(model.by_token(x))
    model.broken += int((entry[:, -1] == CERTAIN).sum())
    return entry, model.chosen_depth(
        entry, Taken(torch.arange(len(x), device=x.device), 1, len(x))
    ).cpu().numpy()


def score(model: MixtureOfRecursions, step: int, u: Tensor) -> tuple[Tensor, np.ndarray]:
    """What the router of a step says of states (n, D): logits (n,) for the gate, and on the host those that
    decide. Zeros where none is asked."""
    if not model.by_step:
        return u.new_zeros(len(u), dtype=torch.float32), np.zeros(len(u), np.float32)
    logits, heard = _sound(model, model.by_step[step](u))
    if model.foreseers:
        heard = _sound(model, model.foreseers[step](u))[1]
    return logits, heard


def _sound(model: MixtureOfRecursions, logits: Tensor) -> tuple[Tensor, np.ndarray]:
    """(n, 1) -> (n,) twice, on the device and on the host, where it is also seen whether a router is broken."""
    host = logits.cpu().numpy()
    if not (sound := np.isfinite(host)).all():
        model.broken += int((~sound).sum())
        logits = deepest_where_broken(logits)
        host = logits.cpu().numpy()
    return logits[:, 0], host[:, 0]


def after(
    model: MixtureOfRecursions, x: Tensor, h: Tensor, entry: Tensor | None, depth: Callable[[], np.ndarray]
) -> Tensor:  # fmt: skip
    """States (n, D) after the loop, of tokens that entered with x, stand at h, and took ``depth()`` (n,) recursions."""
    if entry is None:
        return h
    entered = Taken(torch.arange(len(x), device=x.device), 1, len(x))
    return model.leave(x, h, torch.from_numpy(depth()).long().to(x.device), entry, entered)
