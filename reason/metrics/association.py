"""How strongly two quantities go together: rank correlation, AUROC, and the shift of a distribution."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SMALLEST_SHARE = 1e-3  # what a bin with less counts as in the PSI, whose logarithm would diverge


def ranks(values: np.ndarray) -> np.ndarray:
    """(n,) ranks from 1; equal values share the mean of theirs."""
    from scipy.stats import rankdata  # here: it takes half a second to import, and few commands rank anything

    return rankdata(values)


def spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    """Spearman's rank correlation of two (n,), ties sharing their mean rank; None where one of them does not vary."""
    if len(a) < 2:
        return None
    x, y = (ranks(v) - (len(v) + 1) / 2 for v in (a, b))
    size = np.sqrt(np.square(x).sum() * np.square(y).sum())
    return float((x * y).sum() / size) if size else None


def auroc(scores: np.ndarray, positive: np.ndarray) -> float:
    """The probability that a positive example scores above a negative one, ties counting half (Mann and Whitney's U).

    scores: (n,); positive: (n,) bool. NaN where there are only examples of one kind.
    """
    p, n = int(positive.sum()), int((~positive).sum())
    if not p or not n:
        return float("nan")
    return float((ranks(scores)[positive].sum() - p * (p + 1) / 2) / (p * n))


def auroc_of_counts(positive: np.ndarray, negative: np.ndarray) -> float:
    """``auroc`` of discrete scores: how many examples of each kind have the lowest score, the next one, ... (k,) each."""
    if not positive.sum() or not negative.sum():
        return float("nan")
    below = np.cumsum(negative) - negative
    return float((positive * (below + negative / 2)).sum() / (negative.sum() * positive.sum()))


def population_stability_index(counts: np.ndarray | Sequence[float], shares: Sequence[float]) -> float:
    """PSI of a histogram against reference shares: the sum of (p - q) ln(p / q) over bins; 0 where they are equal."""
    p = np.maximum(np.asarray(counts, np.float64) / max(float(np.sum(counts)), 1), SMALLEST_SHARE)
    q = np.maximum(np.asarray(shares, np.float64), SMALLEST_SHARE)
    return float(((p - q) * np.log(p / q)).sum())
