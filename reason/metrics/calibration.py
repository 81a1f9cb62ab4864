"""Confidence that means what it says, and thresholds that spend what they were given.

Temperatures scale scores so that probabilities predict best; the expected calibration error says how far
confidence then lies from accuracy. Thresholds are placed so that a share of scores lies above them, or so
that examples that stop at one take so many steps on average. Knows scores and labels; knows no model.

Sources: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017 (temperature scaling, and the
calibration error over bins of equal width); Nixon et al., "Measuring Calibration in Deep Learning", CVPR
Workshops 2019 (bins of equal mass).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

EXCLUDED = -1e9  # score of an item that is no candidate: no mass at any temperature, and no NaN in 0 log 0
ALL_ABOVE = -1e30  # a threshold that every score lies above


# --- probabilities ----------------------------------------------------------------------------------


def fit_temperature(scores: Tensor, label: Tensor) -> float:
    """argmin over t of the mean NLL of ``softmax(scores / t)`` (Guo et al.): bisection, as it is convex in 1 / t.

    Args:
        scores: (n, N), ``EXCLUDED`` where an item is no candidate.
        label: (n,) the true item, a candidate.
    Returns:
        a temperature between 1e-3 and 1e3 times the standard deviation of the scores.
    """
    own = scores.gather(1, label[:, None]).squeeze(1)
    spread = float(scores[scores > EXCLUDED].std()) or 1.0
    low, high = 1e-3 / spread, 1e3 / spread  # of 1 / t
    for _ in range(20):  # to a part in 10^5 of 1 / t
        beta = (low * high) ** 0.5
        expected = ((beta * scores).softmax(-1) * scores).sum(-1)
        if float((expected - own).mean()) > 0:  # the slope of the NLL
            high = beta
        else:
            low = beta
    return (low * high) ** -0.5


def expected_calibration_error(
    confidence: np.ndarray, correct: np.ndarray, bins: int = 15, *, equal_mass: bool = False
) -> float:
    """The gap between confidence and accuracy, averaged over bins of confidence by their share of examples.

        ECE = sum over bins of (examples in it / n) * |accuracy - mean confidence|

    Args:
        confidence: (n,) probability of each answer, in [0, 1].
        correct: (n,) bool, whether the answer was right.
        equal_mass: bins of as many examples each, by rank of confidence (Nixon et al.; ties stay in the
            order given); else bins of equal width, open on the left and closed on the right (Guo et al.).

    Raises:
        ValueError: no example, shapes that differ, a confidence outside of [0, 1], or no bin.
    """
    confidence, correct = np.asarray(confidence, np.float64), np.asarray(correct, np.float64)
    if confidence.ndim != 1 or confidence.shape != correct.shape or not len(confidence):
        raise ValueError(f"ECE needs two columns of one length, not {confidence.shape} and {correct.shape}.")
    if not ((confidence >= 0) & (confidence <= 1)).all():
        raise ValueError("A confidence is a probability: it must be a number from 0 to 1.")
    if bins < 1:
        raise ValueError(f"ECE needs at least 1 bin, not {bins}.")
    n = len(confidence)
    if equal_mass:
        place = np.empty(n, np.int64)
        place[np.argsort(confidence, kind="stable")] = np.arange(n) * bins // n
    else:
        place = np.searchsorted(np.linspace(0, 1, bins + 1)[1:], confidence)
    return float(np.abs(np.bincount(place, correct - confidence)).sum() / n)


# --- thresholds -------------------------------------------------------------------------------------


def threshold_for_share(scores: np.ndarray, share: float) -> float:
    """The threshold that ``share`` of the scores (n,) lie above: between the two that it has to part."""
    if share >= 1:
        return ALL_ABOVE  # also of scores that are lower than any of these
    ordered = np.sort(scores.astype(np.float32))[::-1]  # as scores are compared where thresholds are used
    k = round(share * len(ordered))
    if k <= 0:
        return float(np.nextafter(ordered[0], np.float32(np.inf))) if len(ordered) else 0.0
    if k >= len(ordered):
        return float(np.nextafter(ordered[-1], np.float32(-np.inf)))
    middle = (ordered[k - 1] + ordered[k]) / 2
    return float(middle if middle < ordered[k - 1] else ordered[k])


def steps_taken(measures: Tensor, threshold: float, min_steps: int) -> Tensor:
    """(n, K) measures after step 0..K-1 -> (n,) int64 steps that each example takes.

    It stops after the first step from ``min_steps`` on whose measure reaches the threshold; K where none does.
    """
    import torch

    K = measures.shape[1]
    if not K:
        return torch.zeros(len(measures), dtype=torch.int64)
    reached = measures >= threshold
    reached[:, :min_steps] = False
    return torch.where(reached.any(1), reached.float().argmax(1), K)


def threshold_for_mean_steps(measures: Tensor, target: float, min_steps: int) -> float:
    """The threshold at which examples take ``target`` steps on average, as nearly as they can.

    Mean steps do not fall as the threshold rises, so it is found by bisection over the measured values.

    measures, min_steps: see ``steps_taken``.
    """
    import torch

    values = measures[:, min_steps:].flatten().unique()  # ascending
    if not len(values):
        return 0.0  # there is nothing to decide
    values = torch.cat([values, values[-1:] + 1])  # the last one is never reached
    low, high = 0, len(values) - 1  # the first threshold that spends at least the target lies in low..high

    def spent(i: int) -> float:
        return float(steps_taken(measures, float(values[i]), min_steps).float().mean())

    while low < high:
        middle = (low + high) // 2
        if spent(middle) < target:
            low = middle + 1
        else:
            high = middle
    if low and abs(spent(low - 1) - target) <= abs(spent(low) - target):
        low -= 1
    if low == 0:
        return float(values[0])
    return float((values[low - 1] + values[low]) / 2)  # between two examples, so that none lies on it
