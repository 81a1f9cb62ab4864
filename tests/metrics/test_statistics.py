"""Intervals that hold what they promise, pairing that helps, and answers known beforehand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reason.metrics import statistics
from reason.metrics.statistics import (
    ExampleScores,
    blend,
    bootstrap_interval,
    holm,
    paired_difference,
    paired_differences,
    seeded_interval,
)


def rows(values, ids=None, denominator=None) -> ExampleScores:
    values = np.asarray(values, dtype=float)
    return ExampleScores(
        np.arange(len(values)).astype(str) if ids is None else np.asarray(ids), values, denominator
    )


def ndcg_like(rng: np.random.Generator, n: int, shift: float = 0.0) -> np.ndarray:
    rank = rng.integers(1, 80, n) - shift
    return np.where(rank <= 10, 1 / np.log2(np.maximum(rank, 1) + 1), 0.0)


# --- one run ------------------------------------------------------------------------------------


def test_interval_of_a_mean_agrees_with_theory():
    values = np.random.default_rng(0).normal(3, 2, 2000)
    low, high = bootstrap_interval(values)
    half = 1.96 * values.std(ddof=1) / np.sqrt(len(values))
    assert low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.15 * half)


def test_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    truth = np.mean(ndcg_like(np.random.default_rng(9), 400_000))
    hits = 0
    for trial in range(300):
        low, high = bootstrap_interval(ndcg_like(rng, 200), resamples=400, seed=trial)
        hits += low <= truth <= high
    assert 0.91 <= hits / 300 <= 0.985


def test_ratio_weighs_examples_by_their_denominator():
    loss, tokens = np.array([10.0, 1.0, 3.0, 8.0]), np.array([10.0, 2.0, 2.0, 4.0])
    found = seeded_interval({0: rows(loss, denominator=tokens)})
    assert found.value == pytest.approx(22 / 18)
    assert (found.low, found.high) == bootstrap_interval(loss, tokens)
    assert loss.min() / tokens.max() < found.low < found.value < found.high <= 2.0


def test_all_right_out_of_twenty_does_not_claim_certainty():
    low, high = bootstrap_interval(np.ones(20))
    assert high == 1.0
    assert low == pytest.approx(20 / (20 + 1.959964**2), abs=1e-6)  # Wilson at share 1


def test_drawing_equal_rows_together_changes_nothing():
    rng = np.random.default_rng(2)
    values = ndcg_like(rng, 3000)
    together = bootstrap_interval(values, resamples=4000)
    one_by_one = bootstrap_interval(values + 1e-9 * rng.normal(size=3000), resamples=4000)  # none equal
    width = one_by_one[1] - one_by_one[0]
    assert together == pytest.approx(one_by_one, abs=0.06 * width)


def test_samples_are_drawn_in_pieces_without_a_seam(monkeypatch):
    values = np.random.default_rng(3).normal(size=500)
    whole = bootstrap_interval(values, resamples=1000)
    monkeypatch.setattr(statistics, "_CELLS", 7 * 500)
    pieces = bootstrap_interval(values, resamples=1000)
    assert pieces == whole


@pytest.mark.parametrize(
    ("numerator", "denominator", "words"),
    [([], None, "no example"), ([1.0, np.nan], None, "not finite"), ([1.0], [0.0], "denominator is 0")],
)
def test_what_has_no_answer_is_refused(numerator, denominator, words):
    down = None if denominator is None else np.array(denominator)
    with pytest.raises(ValueError, match=words):
        bootstrap_interval(np.array(numerator), down)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(2, 5, width=32), min_size=1, max_size=30), st.integers(0, 99))
def test_the_interval_holds_the_value_stays_in_range_and_repeats(values, seed):
    column = np.array(values)
    low, high = bootstrap_interval(column, resamples=200, seed=seed)
    assert (low, high) == bootstrap_interval(column, resamples=200, seed=seed)
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9


# --- several seeds ------------------------------------------------------------------------------


def simulated(rng, n, seeds, between=0.0, example=1.0, noise=1.0, mean=0.0):
    """(n, S): mean + an effect of the seed + an effect of the example + noise."""
    return (
        mean
        + between * rng.normal(size=(1, seeds))
        + example * rng.normal(size=(n, 1))
        + noise * rng.normal(size=(n, seeds))
    )


@pytest.mark.parametrize(("seeds", "between"), [(1, 0.0), (3, 0.0), (3, 0.3), (5, 0.1)])
def test_interval_over_seeds_covers_the_truth(seeds, between):
    rng, hits, trials = np.random.default_rng(4), 0, 200
    for trial in range(trials):
        values = simulated(rng, 80, seeds, between)
        found = seeded_interval({s: rows(values[:, s]) for s in range(seeds)}, resamples=300, seed=trial)
        hits += found.low <= 0 <= found.high
    assert hits / trials >= 0.90


def test_seeds_that_differ_widen_the_interval():
    rng = np.random.default_rng(5)
    alike, apart = simulated(rng, 300, 3), simulated(rng, 300, 3) + np.array([[-0.5, 0.0, 0.5]])
    narrow = seeded_interval({s: rows(alike[:, s]) for s in range(3)})
    wide = seeded_interval({s: rows(apart[:, s]) for s in range(3)})
    assert narrow.seeds == wide.seeds == 3
    assert wide.high - wide.low > 3 * (narrow.high - narrow.low)


def test_one_seed_is_the_plain_interval():
    column = ndcg_like(np.random.default_rng(6), 200)
    found = seeded_interval({7: rows(column)})
    assert found == (column.mean(), *bootstrap_interval(column), 200, 1)


# --- two sides ----------------------------------------------------------------------------------


def test_identical_sides_differ_by_nothing():
    side = {s: rows(ndcg_like(np.random.default_rng(s), 150)) for s in range(3)}
    found = paired_difference(side, dict(side))
    assert (found.value, found.low, found.high, found.p) == (0, 0, 0, 1)
    assert not found.distinguishable


def test_pairing_is_narrower_than_two_intervals_apart():
    rng = np.random.default_rng(7)
    common = rng.normal(0, 3, 400)
    a, b = rows(common + rng.normal(0.3, 0.5, 400)), rows(common + rng.normal(0, 0.5, 400))
    paired = paired_difference({0: a}, {0: b})
    shuffled = ExampleScores(b.id, rng.permutation(b.numerator))
    unpaired = paired_difference({0: a}, {0: shuffled})
    assert paired.high - paired.low < (unpaired.high - unpaired.low) / 3
    assert paired.distinguishable and not unpaired.distinguishable


def test_pairing_goes_by_id_and_not_by_place():
    rng = np.random.default_rng(8)
    a, b, turn = rng.normal(size=60), rng.normal(size=60), rng.permutation(60)
    ids = np.array([f"user-{i}" for i in range(60)])
    straight = paired_difference({0: rows(a, ids)}, {0: rows(b, ids)})
    turned = paired_difference({0: rows(a, ids)}, {0: rows(b[turn], ids[turn])})
    assert straight == turned


def test_sides_swap_sign():
    rng = np.random.default_rng(10)
    a, b = ({s: rows(rng.normal(size=90)) for s in range(3)} for _ in range(2))
    there, back = paired_difference(a, b), paired_difference(b, a)
    assert there.value == pytest.approx(-back.value)
    assert there.low == pytest.approx(-back.high, abs=0.05)


@pytest.mark.parametrize("n", [1, 2, 5, 6, 20])
def test_few_examples_cannot_tell_however_alike_they_are(n):
    better, worse = {0: rows(np.full(n, 1.0))}, {0: rows(np.zeros(n))}
    found = paired_difference(better, worse)
    assert found.value == found.low == found.high == 1
    assert found.p >= 2.0 ** (1 - n) and found.distinguishable == (n > 5)  # all on one side, by chance


def test_only_shared_seeds_count():
    rng = np.random.default_rng(11)
    values = {s: rows(rng.normal(size=50)) for s in range(4)}
    found = paired_difference({0: values[0], 1: values[1]}, {1: values[2], 2: values[3]})
    assert found.seeds == 1
    assert found.value == pytest.approx(values[1].numerator.mean() - values[2].numerator.mean())
    with pytest.raises(ValueError, match="No seed in common"):
        paired_difference({0: values[0]}, {1: values[1]})


def test_different_examples_cannot_be_paired():
    with pytest.raises(ValueError, match="different examples"):
        paired_difference({0: rows([1, 2, 3], ["a", "b", "c"])}, {0: rows([1, 2, 3], ["a", "b", "d"])})
    with pytest.raises(ValueError, match="more than once"):
        paired_difference({0: rows([1, 2], ["a", "a"])}, {0: rows([1, 2], ["a", "a"])})


def test_difference_of_ratios_is_not_the_mean_of_differences():
    tokens = np.array([1.0, 9.0])
    a = ExampleScores(np.array(["x", "y"]), np.array([1.0, 0.0]), tokens)
    b = ExampleScores(np.array(["x", "y"]), np.array([0.0, 1.0]), tokens)
    assert paired_difference({0: a}, {0: b}).value == 0.0


def test_p_is_uniform_enough_under_no_difference():
    rng = np.random.default_rng(12)
    small = 0
    for trial in range(200):
        d = simulated(rng, 60, 3)
        side = {s: rows(d[:, s]) for s in range(3)}
        zero = {s: rows(np.zeros(60)) for s in range(3)}
        small += paired_difference(side, zero, resamples=300, seed=trial).p < 0.05
    assert small / 200 <= 0.10


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=10))
def test_holm_never_lowers_and_keeps_the_order(p):
    adjusted = holm(p)
    assert all(a >= b for a, b in zip(adjusted, p, strict=True))
    order = np.argsort(p, kind="stable")
    assert np.all(np.diff(np.array(adjusted)[order]) >= 0)


def test_pairs_that_are_drawn_together_get_what_each_gets_alone():
    rng = np.random.default_rng(12)
    ids = np.arange(800)
    sides = [{s: ExampleScores(ids, ndcg_like(rng, 800)) for s in range(3)} for _ in range(4)]
    weighed = {s: ExampleScores(ids, rng.random(800), 1 + rng.random(800)) for s in range(3)}
    pairs = [(sides[0], sides[1]), (sides[2], sides[3]), (weighed, sides[0]), (sides[0], sides[0])]
    together = paired_differences(pairs)
    for (a, b), found in zip(pairs, together, strict=True):
        alone = paired_difference(a, b)
        assert (found.value, found.n, found.seeds) == (pytest.approx(alone.value), alone.n, alone.seeds)
        width = alone.high - alone.low
        assert (found.low, found.high) == pytest.approx((alone.low, alone.high), abs=0.1 * width)
    assert (together[3].low, together[3].high, together[3].p) == (0, 0, 1)


def test_a_blend_is_what_drawing_gives_on_average():
    rng = np.random.default_rng(13)
    ids = np.arange(50)
    a, b = (
        ExampleScores(ids, rng.random(50), rng.random(50) + 1),
        ExampleScores(ids, rng.random(50), rng.random(50) + 1),
    )
    weight = rng.random(50)
    mixed = blend([(weight, a), (1 - weight, b)])
    drawn = [
        np.where(rng.random(50) < weight, [a.numerator, a.denominator], [b.numerator, b.denominator])
        for _ in range(4000)
    ]
    assert np.mean(drawn, axis=0) == pytest.approx(np.stack([mixed.numerator, mixed.denominator]), abs=0.05)
    assert blend(
        [(1.0, ExampleScores(ids, a.numerator)), (-1.0, ExampleScores(ids, b.numerator))]
    ).value == pytest.approx(np.mean(a.numerator - b.numerator))
    assert a.take(ids < 5).value == pytest.approx(a.numerator[:5].sum() / a.denominator[:5].sum())
