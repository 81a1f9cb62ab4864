"""What a model says of text: the loss of every token, whether it was foreseen, and the depth it was given."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from reason.backbones.losses import IGNORED
from reason.errors import ConfigError
from reason.methods.mor.config import MorConfig
from reason.methods.mor.flops import Shape, executed
from reason.methods.mor.routes import Above, Known, Route, TopK
from reason.methods.mor.trace import fallen

if TYPE_CHECKING:
    from reason.methods.mor.network import MixtureOfRecursions, Routed

ROWS = 4096  # tokens whose logits are alive at a time


@dataclass
class Told:
    """Of a batch of windows (B, T), on CPU; where a position is no target, nll and hit are 0."""

    nll: np.ndarray  # (B, T) float64, nats
    hit: np.ndarray  # (B, T) bool, the most probable token was the right one
    depth: np.ndarray  # (B, T) int64, recursions; 0 at padding
    broken: np.ndarray  # (B, T) bool, a router said no number of it

    @classmethod
    def of(cls, batch: int, length: int) -> Told:
        """Of windows in which there is nothing."""
        empty = (batch, length)
        return cls(np.zeros(empty), np.zeros(empty, bool), np.zeros(empty, np.int64), np.zeros(empty, bool))

    def pick(self, rows: np.ndarray) -> Told:
        """These windows."""
        return Told(*(getattr(self, f.name)[rows] for f in fields(self)))


@torch.no_grad()
def tell(model: MixtureOfRecursions, routed: Routed, targets: Tensor) -> Told:
    """Judge every target of a forward pass. targets: (B, T) with -100 where there is none."""
    nll, hit = _judged(model, routed.states, targets)
    return Told(*(x.cpu().numpy() for x in (nll, hit, routed.depth, fallen(routed))))


@torch.no_grad()
def _judged(model: MixtureOfRecursions, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    hidden, flat = model.read(states).flatten(0, 1), targets.flatten()
    where = (flat != IGNORED).nonzero().flatten()
    nll = torch.zeros(len(flat), dtype=torch.float64, device=flat.device)
    hit = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
    for part in where.split(ROWS):
        logits = model.decoder.logits(hidden[part]).float()
        right = flat[part]
        nll[part] = (logits.logsumexp(-1) - logits.gather(1, right[:, None])[:, 0]).double()
        hit[part] = logits.argmax(-1) == right
    return nll.view(targets.shape), hit.view(targets.shape)


def nll_of(model: MixtureOfRecursions, states: Tensor, targets: Tensor) -> np.ndarray:
    """(B, T) float64, nats: what ``tell`` says of states (B, T, D) after the loop."""
    return _judged(model, states, targets)[0].cpu().numpy()


# --- who decides depth when a model is judged ---------------------------------------------------------


def judging_route(
    config: MorConfig,
    model: MixtureOfRecursions,
    tokens: Tensor,
    thresholds: Sequence[float] | None,
    seed: int,
) -> Route | None:
    """The route by which a model is judged; None: what a token-choice router says.

    thresholds: of steps 2 to N_r, calibrated; None: there are none yet. While a model is trained, validation then goes by
        top-k: what it compares are weights, and they are to spend the same depth.
    """
    if config.routing == "none" or config.route == "fixed" or model.recursions == 1:
        return Known(model.recursions)
    if config.routing == "token":
        return None
    capacities = config.shares(model.recursions)
    if config.routing == "random":
        return Known(dice(tokens, capacities, seed))
    if config.route == "topk" or thresholds is None:
        return TopK(capacities)
    return Above([t + config.shift for t in thresholds])


def thresholds_of(calibration: Mapping[str, Any] | None, profile: str) -> Sequence[float] | None:
    """Of a profile, as they were calibrated; None where no thresholds were.

    Raises:
        ConfigError: thresholds, and none of this profile.
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


def dice(tokens: Tensor, capacities: Sequence[float], seed: int) -> Tensor:
    """(B T,) int64 depths that are random, and yet the same whenever the same token stands at the same place.

    So that random routing can be judged and replayed; a text that is being written has depths by the places of
    its new tokens alone. A step is reached with probability ``capacities``.
    """
    place = torch.arange(tokens.shape[1], device=tokens.device)
    before = torch.nn.functional.pad(tokens, (1, 0))[:, :-1]
    mixed = tokens
    for part in (before, place, place.new_tensor(seed)):  # an avalanche of 32 bits after each
        mixed = (mixed ^ (part + 0x9E3779B9)) * 0x85EBCA6B & 0xFFFFFFFF
        mixed = (mixed ^ (mixed >> 15)) * 0xC2B2AE35 & 0xFFFFFFFF
        mixed = mixed ^ (mixed >> 13)
    drawn = mixed.double() / 2**32  # (B, T)
    return sum((drawn < c).long() for c in capacities).flatten()  # type: ignore[union-attr]


def profile_of(mean: float, capacities: Sequence[float]) -> list[float]:
    """Capacities of the same shape whose sum is ``mean``: each to the power that gives it, so they stay in order.

    Raises:
        ValueError: a mean outside 1 to the number of recursions.
    """
    if not 1 <= mean <= len(capacities):
        raise ValueError(f"a mean depth of {mean:g} cannot be had from {len(capacities)} recursions.")
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


# --- what it cost -------------------------------------------------------------------------------------


def cost(model: MixtureOfRecursions, shape: Shape, depth: np.ndarray) -> float:
    """Operations of a forward pass, sequence by sequence, by the recursions (B, T) that each token really took; 0 at
    padding."""
    scored = sum(routers[0].flops for routers in (model.by_step, model.foreseers) if routers)
    total = 0.0
    for row in depth:
        real = int((row > 0).sum())
        if real:
            counts = [int((row > r).sum()) for r in range(int(row.max()))]
            total += executed(shape, real, counts, memory=model.config.memory, router=scored)
            if model.by_token is not None:
                total += real * model.by_token.flops
    return total


def joined(parts: Sequence[Told]) -> Told:
    """Windows of one batch that were judged apart."""
    return Told(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(Told)))
