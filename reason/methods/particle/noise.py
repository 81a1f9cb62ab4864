"""A noisy channel between the exact judge of steps and a filter: every way in which a reward can be wrong, on its own scale.

    logit r  =  scale * (s a_t + sigma_t z_t) + bias u + bonus f_t

s is +1 where the right answer can still be reached and -1 where it cannot, the wrong way round with probability ``flips``.
z_t is standard normal along every path, with correlation ``rho`` from one step to the next: 0 = independent noise, near 1 =
an error that a lineage keeps. u is standard normal too, one for each problem. f_t is 1 for a step that is long or has
a keyword in it: what a policy could learn to exploit.

All of it is a function of (seed, problem, prefix), so equal prefixes get equal rewards, whoever asks and when.
Particles that write the same therefore share their noise: it does not average out over them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
from scipy.special import ndtri

from reason.backbones.generation import stream, uniforms
from reason.errors import ConfigError
from reason.methods.particle.driver import Prefix
from reason.methods.particle.lineage import Node


@dataclass(frozen=True)
class Noise:
    """How a judge is made worse.

    margin: a at step 1. margin_last: a at step ``margin_steps`` and later; it grows evenly in between.
    sigma: standard deviation of the noise, in logits. half_life: steps in which that falls to a half; 0 = it stays.
    rho: correlation of the noise of a step with that of the step before. scale: above 1 = too sure, below = unsure.
    bias: standard deviation of the bias of a problem. flips: probability that a prefix is judged the wrong way round.
    bonus: added for a step of more than ``long`` tokens (0 = no length counts) or with one of ``keywords``.

    Raises:
        ConfigError: a number out of range.
    """

    sigma: float = 0.0
    rho: float = 0.0
    scale: float = 1.0
    bias: float = 0.0
    bonus: float = 0.0
    long: int = 0
    keywords: tuple[str, ...] = ()
    flips: float = 0.0
    half_life: float = 0.0
    margin: float = 0.5
    margin_last: float = 3.0
    margin_steps: int = 8
    seed: int = 0

    def __post_init__(self):
        for name in ("sigma", "scale", "bias", "half_life", "long", "margin", "margin_last"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name}={getattr(self, name)} of the noise must not be below 0.")
        if not 0 <= self.rho <= 1:
            raise ConfigError(
                f"rho={self.rho} of the noise is a correlation from 0 (independent) to 1 (kept for ever)."
            )
        if not 0 <= self.flips <= 0.5:
            raise ConfigError(f"flips={self.flips} of the noise is a probability from 0 to 0.5.")
        if self.margin_steps < 1:
            raise ConfigError(f"margin_steps={self.margin_steps} of the noise must be at least 1.")

    def margins(self, step: np.ndarray) -> np.ndarray:
        """a at steps (n,), counted from 1."""
        grown = np.minimum((np.asarray(step) - 1) / max(self.margin_steps - 1, 1), 1.0)
        return self.margin + (self.margin_last - self.margin) * grown


class Channel:
    """Noise, applied."""

    def __init__(self, noise: Noise):
        self.noise = noise
        self._paths: WeakKeyDictionary[Node, float] = WeakKeyDictionary()  # z of nodes

    def __call__(self, prefixes: Sequence[Prefix], alive: np.ndarray) -> np.ndarray:
        """(n,) logits of prefixes of which it is known whether they are alive (n,) bool."""
        noise = self.noise
        step = np.array([prefix.node.step for prefix in prefixes])
        signs = np.where(alive, 1.0, -1.0)
        if noise.flips:
            u = self._uniforms([(p.problem.id, p.node.id, "flip") for p in prefixes])
            signs = np.where(u < noise.flips, -signs, signs)
        logits = signs * noise.margins(step)
        if noise.sigma:
            fading = 0.5 ** ((step - 1) / noise.half_life) if noise.half_life else 1.0
            logits = logits + noise.sigma * fading * self._along_paths(prefixes)
        logits = noise.scale * logits
        if noise.bias:
            logits = logits + noise.bias * self._normals([(p.problem.id, "", "bias") for p in prefixes])
        if noise.bonus:
            logits = logits + noise.bonus * np.array([self._tempting(p.node) for p in prefixes])
        return logits

    def _along_paths(self, prefixes: Sequence[Prefix]) -> np.ndarray:
        """(n,) z: an autoregressive process along each path."""
        rho, paths = self.noise.rho, self._paths
        new: dict[Node, str] = {}
        for problem, node, _ in prefixes:
            above: Node | None = node
            while above is not None and above.parent is not None and above not in paths and above not in new:
                new[above] = problem.id
                above = above.parent if rho else None
        own = self._normals([(problem, node.id, "noise") for node, problem in new.items()])
        for node, z in sorted(zip(new, own.tolist(), strict=True), key=lambda pair: pair[0].step):
            above = node.parent
            if rho and above is not None and above.parent is not None:
                z = rho * paths[above] + math.sqrt(1 - rho * rho) * z
            paths[node] = z
        return np.array([paths[prefix.node] for prefix in prefixes])

    def _tempting(self, node: Node) -> bool:
        noise = self.noise
        return bool(noise.long and len(node.tokens) > noise.long) or any(
            word in node.text for word in noise.keywords
        )

    def _normals(self, names: Sequence[tuple[str, str, str]]) -> np.ndarray:
        return ndtri(np.maximum(self._uniforms(names), 2.0**-54))

    def _uniforms(self, names: Sequence[tuple[str, str, str]]) -> np.ndarray:
        """(n,) one number for each (problem, prefix, purpose)."""
        keys = np.array([stream(self.noise.seed, *name) for name in names], np.uint64)
        return uniforms(keys, np.zeros(len(keys), np.int64))
