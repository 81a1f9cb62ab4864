"""Rewards that mean what they say: what a reward predicts against how solutions ended, depth by depth.

A reward that was right on the scale of log-odds but too sure by some factor (noise of standard deviation sigma on
log-odds of +-a is, by sigma^2 / 2a) prunes right prefixes; it is divided by that factor. It differs with the depth, because
what is known of a solution grows with it. Fitted on held-out problems, never on tested ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import expit

from reason.errors import unknown
from reason.methods.particle.driver import Prefix, Reward
from reason.methods.particle.rewards import logits, parts, seen
from reason.methods.particle.rollouts import Rollouts
from reason.metrics.association import auroc
from reason.metrics.calibration import expected_calibration_error, fit_temperature

KINDS = ("temperature", "platt", "isotonic")
FOLDS = 5
FINISHED = (
    1 << 30
)  # the depth that stands for finished solutions, whatever theirs is: they are judged by their answer
Curve = dict[
    str, Any
]  # {"temperature": t}, {"slope": a, "offset": b}, {"x": [...], "y": [...]}, or {}: as it is


@dataclass(frozen=True)
class Calibration:
    """How rewards at each depth are to be read.

    first: the depth at which each curve begins; it holds up to the next, the last for all that are deeper. ``FINISHED`` = for
        finished solutions.
    before, after: NLL and ECE, the latter of curves fitted to other problems than they are measured on.
    seen: fingerprints of the problems that it was fitted on. notes: for people.
    """

    kind: str
    first: tuple[int, ...]
    curves: tuple[Curve, ...]
    before: Mapping[str, float]
    after: Mapping[str, float]
    seen: frozenset[str]
    notes: tuple[str, ...] = ()

    def __call__(
        self, reward: np.ndarray, step: np.ndarray, finished: np.ndarray | bool = False
    ) -> np.ndarray:
        """(n,) probabilities of rewards (n,) at depths (n,) of solutions that are finished, or not (n,) bool."""
        return _read(self.first, self.curves, reward, np.where(finished, FINISHED, step))

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind, "first": list(self.first), "curves": list(self.curves), "before": dict(self.before),
            "after": dict(self.after), "seen": sorted(self.seen), "notes": list(self.notes),
        }  # fmt: skip

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Calibration:
        return cls(
            found["kind"], tuple(found["first"]), tuple(found["curves"]), found["before"], found["after"],
            frozenset(found["seen"]), tuple(found["notes"]),
        )  # fmt: skip


class Calibrated:
    """A reward, calibrated. What its members said stays as it was."""

    def __init__(self, reward: Reward, calibration: Calibration):
        self.reward, self.calibration = reward, calibration
        self.seen = seen(reward) | calibration.seen

    def __call__(self, prefixes: Sequence[Prefix]) -> np.ndarray:
        found = np.asarray(self.reward(prefixes), np.float64)
        given, members = parts(found)
        nodes = [prefix.node for prefix in prefixes]
        step, finished = np.array([n.step for n in nodes]), np.array([n.finished for n in nodes])
        read = self.calibration(given, step, finished)
        return read if found.ndim == 1 else np.column_stack([read, members])


def fit(kind: str, rollouts: Rollouts, least: int = 200) -> Calibration:
    """Fit the rewards of rollouts, labelled by their own outcomes, to these outcomes.

    Args:
        kind: "temperature": log-odds divided by a number; "platt": a slope and an offset on log-odds; "isotonic": any curve
            that does not fall.
        least: prefixes for a curve of its own; neighbouring depths share one until there are so many, of both outcomes.

    Raises:
        ConfigError: an unknown kind.
        ValueError: labels that are shares, or rewards that are not in [0, 1].
    """
    if kind not in KINDS:
        raise unknown("kind of calibration", kind, KINDS)
    reward, label, step = (
        rollouts.reward,
        rollouts.label,
        np.where(rollouts.finished, FINISHED, rollouts.step),
    )
    if not np.isin(label, (0, 1)).all():
        raise ValueError("Calibration needs what each prefix came to itself, right or wrong.")
    if not ((reward >= 0) & (reward <= 1)).all():
        raise ValueError("A reward to calibrate is not between 0 and 1.")
    before = quality(reward, label)
    if label.min(initial=1) == label.max(initial=0) or not len(label):
        note = f"The reward is not calibrated: all {len(label):,} prefixes to fit it on came to the same end."
        return Calibration(kind, (1,), ({},), before, before, rollouts.seen, (note,))
    first = _depths(step, label, least)
    # Fitted to all, and told how it does on problems that it was not fitted to.
    fold = np.random.default_rng(0).permutation(len(rollouts.fingerprints))[rollouts.problem] % FOLDS
    after = np.empty(len(label))
    for k in range(FOLDS):
        out = fold == k
        curves = _fit(kind, first, reward[~out], label[~out], step[~out])
        after[out] = _read(first, curves, reward[out], step[out])
    curves = _fit(kind, first, reward, label, step)
    return Calibration(kind, first, curves, before, quality(after, label), rollouts.seen)


def quality(reward: np.ndarray, label: np.ndarray) -> dict[str, float]:
    """NLL (nats), ECE and AUROC of rewards (n,) for labels (n,) in [0, 1]; {} for none. AUROC is left out where all ended alike."""
    if not len(label):
        return {}
    z = logits(reward)
    found = {
        "examples": len(label),
        "nll": float((np.logaddexp(0, z) - label * z).mean()),
        "ece": expected_calibration_error(reward, label),
    }
    area = auroc(np.asarray(reward), np.asarray(label) > 0.5)
    return found if np.isnan(area) else {**found, "auroc": area}


def quality_by_depth(rollouts: Rollouts, reward: np.ndarray | None = None) -> dict[int, dict[str, float]]:
    """``quality`` at every depth; of the rewards of the rollouts, or of others (n,)."""
    given = rollouts.reward if reward is None else reward
    depths = np.unique(rollouts.step).tolist()
    return {d: quality(given[at], rollouts.label[at]) for d in depths if (at := rollouts.step == d).any()}


# --- inside ---------------------------------------------------------------------------------------------


def _depths(step: np.ndarray, label: np.ndarray, least: int) -> tuple[int, ...]:
    """Where curves begin, each with ``least`` examples at least, a tenth of them or ten of each outcome."""
    few = min(10, max(1, least // 10))
    first: list[int] = []
    begin = 1

    def enough(at: np.ndarray) -> bool:
        right = label[at].sum()
        return at.sum() >= least and min(right, at.sum() - right) >= few

    unfinished = step < FINISHED
    for depth in np.unique(step[unfinished]).tolist():
        if enough((step >= begin) & (step <= depth)):
            first.append(begin)
            begin = depth + 1
    if first and enough(~unfinished):  # what is left over before it joins the last
        first.append(FINISHED)
    return tuple(first or [1])


def _place(first: Sequence[int], step: np.ndarray) -> np.ndarray:
    return np.maximum(np.searchsorted(first, step, side="right") - 1, 0)


def _fit(
    kind: str, first: Sequence[int], reward: np.ndarray, label: np.ndarray, step: np.ndarray
) -> tuple[Curve, ...]:
    place = _place(first, step)
    return tuple(_curve(kind, reward[place == k], label[place == k]) for k in range(len(first)))


def _curve(kind: str, reward: np.ndarray, label: np.ndarray) -> Curve:
    if len(np.unique(label)) < 2:  # as may be in a fold
        return {}
    z = logits(reward)
    if kind == "temperature":
        import torch

        both = torch.from_numpy(np.column_stack([np.zeros_like(z), z]))
        return {"temperature": fit_temperature(both, torch.from_numpy(label.astype(np.int64)))}
    if kind == "platt":
        from sklearn.linear_model import LogisticRegression

        found = LogisticRegression(C=1e6).fit(z[:, None], label)
        slope, offset = float(found.coef_[0, 0]), float(found.intercept_[0])
        if slope < 0:  # it says the contrary of what happens; nothing is better than that
            slope, offset = 0.0, float(logits(label.mean()))
        return {"slope": slope, "offset": offset}
    from sklearn.isotonic import IsotonicRegression

    found = IsotonicRegression(out_of_bounds="clip").fit(reward, label)
    edge = 1 / (len(label) + 2)  # nobody is sure after n examples
    y = np.clip(found.y_thresholds_, edge, 1 - edge)
    return {"x": found.X_thresholds_.tolist(), "y": y.tolist()}


def _read(first: Sequence[int], curves: Iterable[Curve], reward: np.ndarray, step: np.ndarray) -> np.ndarray:
    reward, place = np.asarray(reward, np.float64), _place(first, step)
    found = reward.copy()
    for k, curve in enumerate(curves):
        at = place == k
        if "temperature" in curve:
            found[at] = expit(logits(reward[at]) / curve["temperature"])
        elif "slope" in curve:
            found[at] = expit(logits(reward[at]) * curve["slope"] + curve["offset"])
        elif "x" in curve:
            found[at] = np.interp(reward[at], curve["x"], curve["y"])
    return found
