"""Resampling: which particles are copied and which are dropped, by weight.

All schemes give particle i on average N W_i offspring, which is what keeps the estimate of the evidence unbiased.
The conditional forms, which particle Gibbs needs, keep one particle: their outcome is distributed as that of
the scheme, its slots shuffled, given that the last slot holds a copy of this particle. (Conditional forms of systematic
and residual resampling: Chopin & Singh, arXiv 1304.1887; here by drawing the kept copy first.)

Douc & Cappé, arXiv cs/0507025, compare the schemes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from reason.errors import unknown
from reason.methods.particle.requests import Uniforms

Ancestors = np.ndarray  # (n,) int64, for each offspring the index of its parent


def normalized(log_weights: np.ndarray) -> np.ndarray:
    """(N,) -> (N,) that sum to 1; all zero where every weight is."""
    top = log_weights.max()
    if top == -np.inf:
        return np.zeros(len(log_weights))
    weights = np.exp(log_weights - top)
    return weights / weights.sum()


def log_mean(log_weights: np.ndarray) -> float:
    """Log of the mean of the weights."""
    top = log_weights.max()
    return float(top) if top == -np.inf else float(top + np.log(np.exp(log_weights - top).mean()))


def effective_size(weights: np.ndarray) -> float:
    """Effective sample size of normalised weights, 1 to N; 0 where all are zero."""
    total = float((weights**2).sum())
    return 1 / total if total else 0.0


def normalized_entropy(weights: np.ndarray) -> float:
    """Entropy of normalised weights as a share of its largest value, log N; 1 for a single particle."""
    if len(weights) == 1:
        return 1.0
    some = weights[weights > 0]
    return float(-(some * np.log(some)).sum() / np.log(len(weights)))


def _at(weights: np.ndarray, places: np.ndarray) -> Ancestors:
    """The particles in whose share of [0, n) the ``places`` lie. weights: (N,), summing to 1."""
    ends = weights.cumsum()
    ends *= 1 / ends[-1]
    found = ends.searchsorted(places, side="right")
    return np.minimum(found, weights.nonzero()[0][-1])  # rounding must not choose a particle without weight


def _share(weights: np.ndarray, keep: int, n: int, u: Uniforms) -> float:
    """A place in [0, n), drawn evenly from the share of ``keep``."""
    start = weights[:keep].sum()
    return min(float(n * (start + u.random()[0] * weights[keep])), np.nextafter(n, 0))


def _multinomial(w: np.ndarray, n: int, u: Uniforms, keep: int | None) -> Ancestors:
    if keep is None:
        return _at(w, u.random(n))
    return np.append(_at(w, u.random(n - 1)), keep)


def _systematic(w: np.ndarray, n: int, u: Uniforms, keep: int | None) -> Ancestors:
    if keep is None:
        return _at(w, (np.arange(n) + u.random()) / n)
    stratum, offset = divmod(_share(w, keep, n, u), 1)
    return _keep_last(_at(w, (np.arange(n) + offset) / n), int(stratum), keep, u)


def _stratified(w: np.ndarray, n: int, u: Uniforms, keep: int | None) -> Ancestors:
    if keep is None:
        return _at(w, (np.arange(n) + u.random(n)) / n)
    stratum = int(_share(w, keep, n, u))
    return _keep_last(_at(w, (np.arange(n) + u.random(n)) / n), stratum, keep, u)


def _residual(w: np.ndarray, n: int, u: Uniforms, keep: int | None) -> Ancestors:
    """N W_i rounded down for sure, what remains by multinomial draws."""
    expected = n * w
    sure = np.floor(expected + 1e-12).astype(np.int64)
    left = np.maximum(expected - sure, 0.0)
    draws = n - int(sure.sum())
    certain = np.repeat(np.arange(len(w)), sure)
    if not draws:
        return certain if keep is None else _keep_last(certain, int(sure[:keep].sum()), keep, u)
    if keep is None:
        return np.concatenate([certain, _at(left / left.sum(), u.random(draws))])
    by_draw = u.random()[0] * expected[keep] >= sure[keep]  # whether the kept copy is one of those drawn
    found = np.concatenate([certain, _at(left / left.sum(), u.random(draws))])
    return _keep_last(found, len(certain) if by_draw else int(sure[:keep].sum()), keep, u)


def _keep_last(found: Ancestors, place: int, keep: int, u: Uniforms) -> Ancestors:
    """Put a copy of ``keep`` last, in exchange for the offspring at ``place``, and shuffle the others."""
    others = np.delete(found, place)
    return np.append(others[u.random(len(others)).argsort()], keep)


Scheme = Callable[[np.ndarray, int, Uniforms, "int | None"], Ancestors]
SCHEMES: dict[str, Scheme] = {
    "multinomial": _multinomial,
    "systematic": _systematic,
    "stratified": _stratified,
    "residual": _residual,
}


def resample(
    weights: np.ndarray, n: int, u: Uniforms, scheme: str = "systematic", keep: int | None = None
) -> Ancestors:
    """Draw the parents of ``n`` offspring.

    Args:
        weights: (N,), normalised.
        u: where the scheme draws its uniform numbers from.
        scheme: one of ``SCHEMES``.
        keep: the conditional form: the last offspring is a copy of this particle.

    Raises:
        ConfigError: an unknown scheme.
    """
    if scheme not in SCHEMES:
        raise unknown("resampling scheme", scheme, tuple(SCHEMES))
    return SCHEMES[scheme](weights, n, u, keep)
