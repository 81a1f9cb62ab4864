"""Resampling schemes, potentials and annealing against values computed by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reason.methods.particle.lineage import Node
from reason.methods.particle.potentials import CLIP, Potential, annealing
from reason.methods.particle.requests import Draws, Uniforms
from reason.methods.particle.resampling import (
    SCHEMES,
    effective_size,
    log_mean,
    normalized,
    normalized_entropy,
    resample,
)

GOLDEN = np.array([2.1, -1.2, 1.3, 0.1])


def numbers(i: int) -> Uniforms:
    return Draws(i, "test").uniforms("resample")


class Fixed:
    """Uniform numbers that are given."""

    def __init__(self, *values: float):
        self.values = list(values)

    def random(self, count: int = 1) -> np.ndarray:
        found, self.values = self.values[:count], self.values[count:]
        return np.array(found)


def test_golden_weights():
    w = normalized(GOLDEN)
    assert w == pytest.approx([0.6167, 0.0227, 0.2771, 0.0835], abs=5e-5)
    assert effective_size(w) == pytest.approx(2.152, abs=5e-4)
    assert normalized_entropy(w) == pytest.approx(0.683, abs=5e-4)


def test_golden_ancestors():
    assert resample(normalized(GOLDEN), 4, Fixed(0.37)).tolist() == [0, 0, 0, 2]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("logit", [0.8735, 0.0538, 0.0727]),
        ("exp", [0.4253, 0.2767, 0.2980]),
        ("prob", [0.4610, 0.2514, 0.2876]),
    ],
)
def test_golden_potentials(kind, expected):
    root = Node(None)
    logs = [Potential(kind)(Node(root, (1,), reward=r)) for r in (0.9453, 0.5156, 0.5898)]
    assert normalized(np.array(logs)) == pytest.approx(expected, abs=5e-5)


def test_ratio_telescopes_and_self_certainty_reads_no_reward():
    a = Node(Node(None), (1,), reward=0.8)
    b = Node(a, (2, 3), log_p=2 * np.log(0.25), reward=0.2)
    assert Potential("ratio").path(b) == pytest.approx(np.log(0.2))
    assert Potential("ratio", prior=0.5).path(b) == pytest.approx(np.log(0.4))
    assert Potential("self_certainty")(b) == pytest.approx(np.log(0.25 / 0.75))


def test_a_temperature_divides_and_a_clip_bounds():
    sure = Node(Node(None), (1,), reward=1.0)
    assert Potential("logit", 2.0)(sure) == pytest.approx(np.log((1 - CLIP) / CLIP) / 2)
    never = Node(Node(None), (1,), reward=0.0)
    assert Potential("prob")(never) == pytest.approx(np.log(CLIP))
    assert Potential("prob", clip=0.0)(never) == -np.inf
    assert np.isfinite(Potential("logit", clip=0.0)(sure))
    for kind in ("prob", "logit", "ratio"):  # once at zero, always at zero, and never NaN
        assert Potential(kind, clip=0.0)(Node(never, (1,), reward=0.0)) == -np.inf


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="logit"):
        Potential("logits")
    with pytest.raises(ValueError, match="systematic"):
        resample(np.ones(2) / 2, 2, Uniforms(0), "sistematic")
    with pytest.raises(ValueError, match="entropy"):
        annealing("entrop", np.array([0.99, 0.01, 0, 0]), 0.1)


def test_golden_annealing():
    weights = np.zeros(8)
    weights[:2] = 0.5
    assert annealing("ess", weights, 2 / 20) == pytest.approx(3.6)
    assert annealing("ess", weights, 10 / 20) == 1
    assert annealing("base", weights, 0.1) == pytest.approx(1.9)
    two = np.array([0.999, 0.001])  # two particles have an entropy as any others
    assert annealing("entropy", np.append(two, [0, 0]), 0.1) > 1


weights = st.lists(st.floats(0, 1), min_size=1, max_size=9).filter(lambda w: sum(w) > 1e-3)


@settings(max_examples=60, deadline=None)
@given(weights, st.sampled_from(sorted(SCHEMES)), st.integers(0, 2**32))
def test_counts_are_as_the_scheme_promises(w, scheme, seed):
    w = np.array(w) / np.sum(w)
    n = len(w)
    found = resample(w, n, numbers(seed), scheme)
    count = np.bincount(found, minlength=n)
    assert len(found) == n and not count[w == 0].any()
    low, high = np.floor(n * w - 1e-9), np.ceil(n * w + 1e-9)
    if scheme == "systematic":
        assert (low <= count).all() and (count <= high).all()
    if scheme == "residual":
        assert (count >= low).all()
    keep = int(w.argmax())
    kept = resample(w, n, numbers(seed), scheme, keep)
    assert len(kept) == n and kept[-1] == keep and not np.bincount(kept, minlength=n)[w == 0].any()


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_offspring_are_on_average_as_many_as_their_weight_says(scheme):
    w = np.array([0.5, 0.31, 0.15, 0.04])
    counts = np.array([np.bincount(resample(w, 4, numbers(i), scheme), minlength=4) for i in range(4000)])
    error = counts.std(0) / np.sqrt(len(counts)) + 1e-9
    assert (np.abs(counts.mean(0) - 4 * w) < 4 * error).all()


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_the_conditional_form_is_the_scheme_given_its_last_offspring(scheme):
    """Counts of the scheme with its slots shuffled, given that the last slot has parent k, by rejection."""
    w, k = np.array([0.45, 0.3, 0.2, 0.05]), 1
    rng = np.random.default_rng(0)
    rejected = []
    for i in range(12000):
        found = rng.permutation(resample(w, 4, numbers(i), scheme))
        if found[-1] == k:
            rejected.append(np.bincount(found, minlength=4))
    direct = [np.bincount(resample(w, 4, numbers(-i - 1), scheme, k), minlength=4) for i in range(4000)]

    def shares(counts) -> dict:
        ids, n = np.unique(np.array(counts), axis=0, return_counts=True)
        return {tuple(row): m / len(counts) for row, m in zip(ids.tolist(), n, strict=True)}

    a, b = shares(rejected), shares(direct)
    assert 0.5 * sum(abs(a.get(key, 0) - b.get(key, 0)) for key in {*a, *b}) < 0.065


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-50, 50), min_size=1, max_size=8), st.floats(-300, 300))
def test_a_constant_added_to_all_shifts_the_evidence_alone(logs, shift):
    logs = np.array(logs)
    assert normalized(logs).sum() == pytest.approx(1)
    assert normalized(logs + shift) == pytest.approx(normalized(logs), abs=1e-9)
    assert log_mean(logs + shift) == pytest.approx(log_mean(logs) + shift, abs=1e-9)


def test_no_weight_at_all_is_zeros_and_not_nan():
    dead = np.full(4, -np.inf)
    assert normalized(dead).tolist() == [0, 0, 0, 0]
    assert effective_size(normalized(dead)) == 0 and log_mean(dead) == -np.inf
