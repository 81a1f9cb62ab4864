"""Temperatures, calibration errors and thresholds, against plain ways of finding the same."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reason.metrics.calibration import (
    EXCLUDED,
    expected_calibration_error,
    fit_temperature,
    steps_taken,
    threshold_for_mean_steps,
    threshold_for_share,
)

# --- temperatures -----------------------------------------------------------------------------------


def test_temperature_is_where_the_likelihood_is_highest():
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(4000, 12, generator=generator)
    label = torch.multinomial((scores / 0.4).softmax(-1), 1, generator=generator).squeeze(1)
    found = fit_temperature(scores, label)
    assert found == pytest.approx(0.4, rel=0.08)
    nll = [
        float(torch.nn.functional.cross_entropy(scores / t, label))
        for t in (found * 0.97, found, found * 1.03)
    ]
    assert nll[1] == min(nll)


def test_what_is_no_candidate_does_not_shape_the_temperature():
    generator = torch.Generator().manual_seed(2)
    scores = torch.randn(1000, 8, generator=generator)
    label = torch.multinomial((scores / 0.7).softmax(-1), 1, generator=generator).squeeze(1)
    wider = torch.cat([scores, torch.full((1000, 30), EXCLUDED)], 1)
    assert fit_temperature(wider, label) == pytest.approx(fit_temperature(scores, label), rel=1e-4)


# --- the calibration error --------------------------------------------------------------------------


def plain_error(confidence, correct, bins, equal_mass):
    """ECE as the papers write it: a loop over bins, each with its accuracy and its mean confidence."""
    pairs = list(zip(confidence, correct, strict=True))
    if equal_mass:
        ordered = sorted(pairs, key=lambda pair: pair[0])
        groups = [[p for i, p in enumerate(ordered) if i * bins // len(ordered) == b] for b in range(bins)]
    else:
        edges = np.linspace(0, 1, bins + 1)
        groups = [
            [p for p in pairs if low < p[0] <= high or (low == 0 and p[0] == 0)]
            for low, high in itertools.pairwise(edges)
        ]
    assert sum(map(len, groups)) == len(pairs)
    total = 0.0
    for group in filter(None, groups):
        accuracy = sum(right for _, right in group) / len(group)
        mean_confidence = sum(c for c, _ in group) / len(group)
        total += len(group) / len(pairs) * abs(accuracy - mean_confidence)
    return total


@settings(max_examples=150, deadline=None)
@given(
    pairs=st.lists(
        st.tuples(st.floats(0, 1) | st.sampled_from([0.0, 0.2, 0.28, 0.6, 1.0]), st.booleans()),
        min_size=1,
        max_size=60,
    ),
    bins=st.integers(1, 25),
    equal_mass=st.booleans(),
)
def test_calibration_error_equals_the_plain_loop(pairs, bins, equal_mass):
    confidence, correct = (np.array(column) for column in zip(*pairs, strict=True))
    found = expected_calibration_error(confidence, correct, bins, equal_mass=equal_mass)
    assert found == pytest.approx(plain_error(confidence, correct, bins, equal_mass), abs=1e-12)


def test_calibration_error_by_hand():
    confidence = np.array([0.95, 0.95, 0.95, 0.95, 0.55, 0.55])
    correct = np.array([True, True, True, False, True, False])
    assert expected_calibration_error(confidence, correct, 10) == pytest.approx((4 * 0.2 + 2 * 0.05) / 6)
    assert expected_calibration_error(confidence, correct, 1) == pytest.approx(abs(4 / 6 - confidence.mean()))
    two = expected_calibration_error(confidence, correct, 2, equal_mass=True)  # 3 below and 3 above, by rank
    assert two == pytest.approx((abs(2 - 2.05) + abs(2 - 2.85)) / 6)


@pytest.mark.parametrize("equal_mass", [False, True])
def test_whoever_is_right_as_often_as_they_say_has_no_error(equal_mass):
    rng = np.random.default_rng(0)
    confidence = rng.random(200_000)
    right = rng.random(200_000) < confidence
    assert expected_calibration_error(confidence, right, equal_mass=equal_mass) < 0.005
    assert expected_calibration_error(confidence**0.25, right, equal_mass=equal_mass) > 0.25


@pytest.mark.parametrize(
    ("confidence", "correct", "bins", "says"),
    [
        ([], [], 15, "two columns"),
        ([0.5, 0.5], [True], 15, "two columns"),
        ([1.5], [True], 15, "from 0 to 1"),
        ([float("nan")], [True], 15, "from 0 to 1"),
        ([0.5], [True], 0, "at least 1 bin"),
    ],
)
def test_what_has_no_calibration_error_is_refused(confidence, correct, bins, says):
    with pytest.raises(ValueError, match=says):
        expected_calibration_error(np.array(confidence), np.array(correct), bins)


# --- thresholds -------------------------------------------------------------------------------------


@given(st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=40, unique=True), st.floats(0, 1))
def test_the_share_lies_above_the_quantile(scores, share):
    column = np.array(scores, np.float32)
    assert (column > np.float32(threshold_for_share(column, share))).sum() == round(share * len(scores))


def test_all_scores_lie_above_where_all_of_them_are_to():
    assert threshold_for_share(np.array([0.5, 0.7]), 1.0) < -1e20
    assert threshold_for_share(np.zeros(0), 0.3) == 0.0


@given(
    st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=3), min_size=1, max_size=20), st.integers(0, 3)
)
def test_an_example_stops_at_the_first_step_that_reaches_the_threshold(measures, least):
    found = steps_taken(torch.tensor(measures).float(), 2.0, least).tolist()
    assert found == [next((k for k in range(least, 3) if row[k] >= 2), 3) for row in measures]


def test_no_step_leaves_nothing_to_decide():
    assert steps_taken(torch.zeros(4, 0), 1.0, 0).tolist() == [0] * 4
    assert threshold_for_mean_steps(torch.zeros(4, 0), 1.0, 0) == 0.0


def test_the_budget_is_met():
    found = torch.rand(5000, 3, generator=torch.Generator().manual_seed(0)).cumsum(1)
    for target in (1.0, 1.3, 1.77, 2.5, 2.99, 3.0):
        for least in (0, 1):
            threshold = threshold_for_mean_steps(found, target, least)
            assert steps_taken(found, threshold, least).double().mean() == pytest.approx(target, abs=0.02)


@given(
    st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=3), min_size=1, max_size=20),
    st.floats(0, 3),
    st.integers(0, 2),
)
def test_no_threshold_comes_nearer_to_the_budget(measures, target, least):
    column = torch.tensor(measures).float()

    def distance(threshold):
        return abs(float(steps_taken(column, threshold, least).float().mean()) - target)

    found = distance(threshold_for_mean_steps(column, target, least))
    assert found == pytest.approx(min(distance(t) for t in (-1, 0, 1, 2, 3, 4, 5)), abs=1e-6)
