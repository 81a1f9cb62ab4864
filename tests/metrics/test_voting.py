"""Classes of equal answers in a fixed order, and votes over them against plain loops."""

from __future__ import annotations

import random
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reason.metrics import grading
from reason.metrics.voting import NONE, argmax, classes, sample, vote


def test_classes_by_first_appearance():
    assert classes(["7", "12", "007", None, "7.0", "", "12"]).tolist() == [0, 1, 0, NONE, 0, NONE, 1]
    assert classes([None, " ", "$"]).tolist() == [NONE] * 3


def test_equality_is_asked_of_the_first_of_each_class_in_order():
    """ "b~" equals a and c, which are not equal: it joins the first, and what equals it alone is another class."""
    asked = []

    def same(answer, first):
        asked.append((answer, first))
        return {answer, first} in ({"a+1", "b+1"}, {"b+1", "c+1"})

    assert classes(["a+1", "c+1", "b+1", "b+1", "a+1"], same).tolist() == [0, 1, 0, 0, 0]
    assert asked == [("c+1", "a+1"), ("b+1", "a+1")], "each text is compared once"
    assert classes(["c+1", "b+1", "a+1"], same).tolist() == [0, 0, 1]


@pytest.mark.skipif(not grading.available(), reason="needs math-verify (extra: math)")
def test_mathematics_is_one_class():
    found = classes([r"\sqrt{12}", "3", r"2\sqrt{3}", r"\sqrt 9", "2^{-80}", "2^{-81}"])
    assert found.tolist() == [0, 1, 0, 1, 2, 3]


def reference(kinds, weights):
    """Winner, its first answer, mass and margin, by hand."""
    sums: dict[int, float] = {}
    for kind, weight in zip(kinds, weights, strict=True):
        if kind != NONE:
            sums[kind] = sums.get(kind, 0) + weight
    total = sum(sums.values())
    if not total:
        return NONE, NONE, 0, 0
    ranked = sorted(sums, key=lambda k: (-sums[k], k))
    next_ = sums[ranked[1]] if len(ranked) > 1 else 0
    return ranked[0], kinds.index(ranked[0]), sums[ranked[0]] / total, (sums[ranked[0]] - next_) / total


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(1, 12).flatmap(
        lambda n: st.lists(st.lists(st.tuples(st.integers(-1, 4), st.integers(0, 3)), min_size=n, max_size=n), min_size=1, max_size=5)
    )
)  # fmt: skip
def test_votes_are_those_of_a_loop(rows):
    numbered = []
    for row in rows:  # classes are numbered by first appearance
        order = {NONE: NONE}
        for kind, _ in row:
            order.setdefault(kind, len(order) - 1)
        numbered.append([order[kind] for kind, _ in row])
    weights = [[float(w) for _, w in row] for row in rows]
    for given_, used in ((None, [[1.0] * len(r) for r in rows]), (np.array(weights), weights)):
        votes = vote(np.array(numbered), given_)
        for i, (kinds, w) in enumerate(zip(numbered, used, strict=True)):
            want = reference(kinds, w)
            assert (votes.winner[i], votes.first[i]) == want[:2]
            assert (votes.mass[i], votes.margin[i]) == pytest.approx(want[2:])


def test_ties_go_to_the_first_seen_whatever_the_order_of_addition():
    votes = vote(np.array([0, 1, 1]), np.array([0.3, 0.1, 0.2]))  # 0.1 + 0.2 > 0.3 in floating point
    assert votes.winner.tolist() == [0] and votes.margin[0] == pytest.approx(0, abs=1e-9)


def test_weights_that_are_none():
    for bad in ([1.0, np.nan], [1.0, -0.1], [1.0, np.inf]):
        with pytest.raises(ValueError, match="finite"):
            vote(np.array([0, 1]), np.array(bad))
        with pytest.raises(ValueError, match="finite"):
            sample(np.array(bad), np.array([0.5]))
    with pytest.raises(ValueError, match="shape"):
        vote(np.array([0, 1]), np.ones(3))
    with pytest.raises(ValueError, match="NaN"):
        argmax(np.array([0.9, np.nan, 0.2]))


def test_argmax_and_no_answers():
    scores = np.array([[0.2, 0.9, 0.9], [0.5, 0.1, 0.3], [-np.inf, -np.inf, -np.inf]])
    assert argmax(scores).tolist() == [1, 0, 0]
    kinds = np.array([[0, NONE, 0], [NONE, NONE, NONE], [NONE, 0, 0]])
    assert argmax(scores, kinds).tolist() == [2, 0, 1]


def test_a_draw_is_in_proportion_to_weight():
    weights = np.tile([0.1, 0.0, 0.6, 0.3], (1000, 1))
    uniform = (np.arange(1000) + 0.5) / 1000
    assert Counter(sample(weights, uniform).tolist()) == {0: 100, 2: 600, 3: 300}
    kinds = np.tile([0, 1, NONE, 2], (1000, 1))
    assert Counter(sample(weights, uniform, kinds).tolist()) == {0: 250, 3: 750}
    assert Counter(sample(np.zeros((1000, 4)), uniform).tolist()) == dict.fromkeys(range(4), 250)


def test_sums_of_a_thousand_problems_are_quick():
    rng = random.Random(0)
    answers = [[str(rng.randrange(97)) for _ in range(64)] for _ in range(1000)]
    start = time.monotonic()
    votes = vote(np.stack([classes(several) for several in answers]))
    assert time.monotonic() - start < 5
    for several, first in zip(answers, votes.first, strict=True):
        counts = Counter(several)
        assert several[first] == max(counts, key=lambda a: (counts[a], -several.index(a)))
