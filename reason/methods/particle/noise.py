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
from weakref import WeakKeyDictionary

import numpy as np
from scipy.special import ndtri

from reason.backbones.generation import stream, uniforms
from reason.methods.particle.config import Noise
from reason.methods.particle.driver import Prefix
from reason.methods.particle.lineage import Node


def margins(noise: Noise, step: np.ndarray) -> np.ndarray:
    """a at steps (n,), counted from 1: ``margin`` at the first, ``margin_last`` from ``margin_steps`` on, even in between."""
    grown = np.minimum((np.asarray(step) - 1) / max(noise.margin_steps - 1, 1), 1.0)
    return noise.margin + (noise.margin_last - noise.margin) * grown


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
        logits = signs * margins(noise, step)
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
