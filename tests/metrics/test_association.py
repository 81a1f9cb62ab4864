"""Rank correlation, AUROC and PSI against plain references, ties included."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from reason.metrics.association import (
    auroc,
    auroc_of_counts,
    population_stability_index,
    ranks,
    spearman,
)

PAIRS = st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=3, max_size=30)
LABELLED = st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=30)


def test_ranks_share_ties():
    assert ranks(np.array([3.0, 1, 3, 2])).tolist() == [3.5, 1, 3.5, 2]


@given(PAIRS)
def test_spearman_is_scipys(pairs):
    a, b = np.array(pairs, float).T
    if len(set(a)) == 1 or len(set(b)) == 1:
        assert spearman(a, b) is None
    else:
        assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)


def test_spearman_of_what_does_not_vary():
    assert spearman(np.ones(4), np.arange(4)) is None
    assert spearman(np.ones(1), np.ones(1)) is None and spearman(np.zeros(0), np.zeros(0)) is None


@given(LABELLED)
def test_auroc_is_scikit_learns(pairs):
    scores, positive = np.array([s for s, _ in pairs], float), np.array([p for _, p in pairs])
    levels = range(-3, 4)
    counts = [np.array([(scores[kind] == level).sum() for level in levels]) for kind in (positive, ~positive)]
    if positive.all() or not positive.any():
        assert math.isnan(auroc(scores, positive)) and math.isnan(auroc_of_counts(*counts))
    else:
        want = roc_auc_score(positive, scores)
        assert auroc(scores, positive) == pytest.approx(want, abs=1e-12)
        assert auroc_of_counts(*counts) == pytest.approx(want, abs=1e-12)


def test_psi_by_hand():
    assert population_stability_index([5, 3, 2], [0.5, 0.3, 0.2]) == pytest.approx(0)
    want = (0.8 - 0.5) * math.log(0.8 / 0.5) + (0.2 - 0.5) * math.log(0.2 / 0.5)
    assert population_stability_index([8, 2], [0.5, 0.5]) == pytest.approx(want)


def test_psi_of_empty_bins_is_finite():
    assert 5 < population_stability_index([0, 0, 9], [0.5, 0.5, 0]) < math.inf
