"""From the answers of many solutions to one: classes of equal answers, votes over them, and how clear they are.

Shapes: P problems with N answers each. A class is an int, numbered by first appearance in its problem, so that
among equals the lowest number was seen first; ``NONE`` is the class of what is no answer. It has no vote.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from reason.metrics.grading import canonical, grader, simple

NONE = -1
TIE = 1e-12  # relative difference below which two sums are equal, whatever the order they were added in
Same = Callable[[str, str], bool]


def classes(answers: Sequence[str | None], same: Same | None = None) -> np.ndarray:
    """(N,) int64: the class of each answer to one problem.

    Answers of one canonical text are equal. Another is compared with the first answer of each class, in order, and
    joins the first that it equals: being equal is not transitive among answers, so the order is part of the result.

    Args:
        same: (answer, first of the class) -> whether they are equal; default: the shared grader's.
    """
    same = same or grader().same
    first: list[str] = []
    hard: list[int] = []  # classes whose first answer is no plain number and no word
    known: dict[str, int] = {"": NONE}
    found = np.empty(len(answers), np.int64)
    for i, answer in enumerate(answers):
        text = canonical(answer or "")
        if text not in known:
            assert answer is not None
            plain = simple(answer)  # two of these are equal only if their texts are
            rivals = hard if plain else range(len(first))
            match = next((k for k in rivals if same(answer, first[k])), len(first))
            if match == len(first):
                first.append(answer)
                hard += [] if plain else [match]
            known[text] = match
        found[i] = known[text]
    return found


@dataclass(frozen=True)
class Votes:
    """The outcome of a vote for each problem. Where nobody has a vote, ``winner`` is NONE and the rest is 0."""

    winner: np.ndarray  # (P,) int64 classes
    first: np.ndarray  # (P,) int64 index of the first answer of that class, or NONE
    mass: np.ndarray  # (P,) its part of all votes
    margin: np.ndarray  # (P,) its part less that of the next


def vote(kinds: np.ndarray, weights: np.ndarray | None = None) -> Votes:
    """Sum of ``weights`` in each class; the largest wins, and among equals the one seen first.

    With no weights this is the majority; with posterior weights the weighted vote; with rewards the reward vote.

    Args:
        kinds: (P, N) int64 classes, or (N,) for one problem.
        weights: like ``kinds``; finite and not negative.
    Raises:
        ValueError: shapes that differ, or weights that are negative or not finite.
    """
    kinds = np.atleast_2d(np.asarray(kinds, np.int64))
    given = np.ones(kinds.shape) if weights is None else np.atleast_2d(np.asarray(weights, np.float64))
    if given.shape != kinds.shape:
        raise ValueError(f"Weights of shape {given.shape} for answers of shape {kinds.shape}.")
    if not np.isfinite(given).all() or (given < 0).any():
        raise ValueError("Weights of votes must be finite and at least 0.")
    problems, answers = kinds.shape
    sums = np.zeros((problems, answers + 1))
    np.add.at(sums, (np.arange(problems)[:, None], kinds), np.where(kinds == NONE, 0.0, given))
    top = sums.max(1)
    winner = (sums >= top[:, None] * (1 - TIE)).argmax(1)
    total = sums.sum(1)
    some = total > 0
    share = np.divide(sums, total[:, None], out=np.zeros_like(sums), where=some[:, None])
    rows = np.arange(problems)
    mass = share[rows, winner]
    share[rows, winner] = 0.0
    first = (kinds == winner[:, None]).argmax(1)
    return Votes(np.where(some, winner, NONE), np.where(some, first, NONE), mass, mass - share.max(1))


def argmax(scores: np.ndarray, kinds: np.ndarray | None = None) -> np.ndarray:
    """(P,) int64: index of the answer with the highest score, the first among equals.

    Args:
        scores: (P, N) or (N,); no NaN. kinds: where given, what is no answer is chosen only where nothing else is.
    """
    scores = np.atleast_2d(np.asarray(scores, np.float64))
    if np.isnan(scores).any():
        raise ValueError("A score is NaN.")
    allowed = _candidates(scores, kinds)
    scores = np.where(allowed, scores, -np.inf)
    return np.where(np.isneginf(scores.max(1)), allowed.argmax(1), scores.argmax(1))


def sample(weights: np.ndarray, uniform: np.ndarray, kinds: np.ndarray | None = None) -> np.ndarray:
    """(P,) int64: the index of one answer, drawn in proportion to its weight.

    Args:
        weights: (P, N) or (N,), not negative; a row of zeros counts as equal weights.
        uniform: (P,) numbers in [0, 1), one for each problem.
        kinds: where given, what is no answer is drawn only where nothing else is.
    Raises:
        ValueError: weights that are negative or not finite.
    """
    weights = np.atleast_2d(np.asarray(weights, np.float64))
    if not np.isfinite(weights).all() or (weights < 0).any():
        raise ValueError("Weights of a draw must be finite and at least 0.")
    allowed = _candidates(weights, kinds)
    weights = np.where(allowed, weights, 0.0)
    edges = np.where(weights.sum(1, keepdims=True) > 0, weights, allowed).cumsum(1)
    return (edges > np.asarray(uniform).reshape(-1, 1) * edges[:, -1:]).argmax(1)


def _candidates(scores: np.ndarray, kinds: np.ndarray | None) -> np.ndarray:
    """(P, N) bool: what may be chosen."""
    if kinds is None:
        return np.ones(scores.shape, bool)
    some = np.atleast_2d(kinds) != NONE
    return some | ~some.any(1, keepdims=True)
