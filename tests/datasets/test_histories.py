"""Cleaning, order and splits, on cases small enough to work out by hand."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from interaction_files import ROWS, sequences_of

from reason.datasets.config import InteractionsConfig
from reason.datasets.histories import build, k_core, sentence
from reason.datasets.tables import InteractionTable
from reason.errors import ConfigError, DataError


def test_leave_one_out_by_hand(files):
    data = files.load(random.Random(0).sample(ROWS, len(ROWS)))
    assert sequences_of(data) == {"ann": list("xyzx"), "bob": list("yzx"), "cem": list("zy")}
    rows = {"valid": data.valid_rows.tolist(), "test": data.test_rows.tolist()}
    assert rows == {"valid": [2, 5], "test": [3, 6]}  # of cem, with two interactions, none
    assert data.train_end.tolist() == [2, 5, 9]
    assert data.train_counts.tolist() == [1, 3, 1]
    assert data.info["users"] == 3 and data.info["interactions"] == 9
    assert data.info["cold_valid"] == 0 and data.info["density"] == 1.0
    assert any("1 of 3 users" in note for note in data.notes)


def test_time_split_by_hand(files):
    data = files.load(ROWS, split="time", valid_from=25, test_from=35)
    assert data.train_end.tolist() == [2, 5, 9]
    assert data.valid_rows.tolist() == [2, 5]  # ann z at 30, bob z at 25: the border belongs to validation
    assert data.test_rows.tolist() == [3, 6]
    assert data.info["dropped_cold_cases"] == 0


def test_time_split_drops_what_training_never_saw(files):
    # w first occurs in validation: bob's case on it goes, and so does every later case of bob.
    rows = [*ROWS, ("bob", "w", 31), ("dee", "x", 50), ("dee", "y", 60)]
    data = files.load(rows, split="time", valid_from=25, test_from=35)
    assert sequences_of(data) == {
        "ann": list("xyzx"),
        "bob": list("yz"),
        "cem": list("zy"),
        "dee": list("xy"),
    }
    assert "w" not in data.item_ids
    assert data.info["dropped_cold_cases"] == 2
    assert [data.item_ids[i] for i in data.items[data.test_rows]] == ["x", "y"]  # ann, and dee after x
    kept = files.load(rows, split="time", valid_from=25, test_from=35, cold="keep")
    assert "w" in kept.item_ids and kept.info["cold_valid"] == 1


def test_leave_one_out_counts_cold_targets_and_can_drop_them(files):
    rows = [*ROWS, ("bob", "new", 99)]
    data = files.load(rows)
    assert data.info["cold_test"] == 1 and any("never occur in training" in n for n in data.notes)
    assert files.load(rows, cold="drop").info["dropped_cold_cases"] == 1


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 5), st.integers(0, 8), st.integers(0, 30)), min_size=4, max_size=60
    ),
    history=st.integers(1, 3),
)
def test_time_split_hygiene(rows, history):
    """No training row at or after t1; no case on, or after, an item that training never saw."""
    raw = np.array(rows)
    user, item = (np.unique(raw[:, i], return_inverse=True) for i in (0, 1))
    ids = ([f"u{i}" for i in user[0]], [f"i{i}" for i in item[0]])
    table = InteractionTable(user[1], item[1], *ids, raw[:, 2], "time", None, "rows")
    keys = InteractionsConfig(split="time", valid_from=12, test_from=20, min_history=history)
    try:
        data = build(table, keys)
    except DataError:
        return
    assert data.times is not None
    warm = set(
        data.items[np.arange(len(data.items)) < np.repeat(data.train_end, np.diff(data.offsets))].tolist()
    )
    assert warm == set(range(len(data.item_ids)))
    for n in range(len(data.user_ids)):
        low, cut, high = data.offsets[n], data.train_end[n], data.offsets[n + 1]
        assert (data.times[low:cut] < 12).all() and (data.times[cut:high] >= 12).all()
        assert (np.diff(data.times[low:high]) >= 0).all()
    for rows_of, low, high in ((data.valid_rows, 12, 20), (data.test_rows, 20, np.inf)):
        assert ((data.times[rows_of] >= low) & (data.times[rows_of] < high)).all()
        first = data.offsets[data.users[rows_of]]
        assert (rows_of - first >= history).all()


def test_quantiles_cut_by_share(files):
    rows = [(f"u{n % 4}", f"i{n % 3}", n) for n in range(100)]
    data = files.load(rows, split="time")
    assert (data.info["valid_from"], data.info["test_from"]) == (80, 90)
    assert data.info["valid_cases"] == data.info["test_cases"] == 10


def test_min_history(files):
    data = files.load(ROWS, min_history=2)
    assert data.valid_rows.tolist() == [2]  # bob's validation case has one item before it
    assert data.test_rows.tolist() == [3, 6]


def naive_core(pairs, min_user, min_item):
    while True:
        kept = [
            (u, i)
            for u, i in pairs
            if sum(u == v for v, _ in pairs) >= min_user and sum(i == j for _, j in pairs) >= min_item
        ]
        if kept == pairs:
            return kept
        pairs = kept


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=30),
    st.integers(0, 4),
    st.integers(0, 4),
)
def test_k_core_equals_the_naive_loop(pairs, min_user, min_item):
    user, item = np.array(pairs).T
    keep = k_core(user, item, np.ones(len(pairs), bool), min_user, min_item)
    assert [p for p, k in zip(pairs, keep, strict=True) if k] == naive_core(pairs, min_user, min_item)


def test_k_core_and_min_rating_on_a_file(files):
    rows = [(*row, 5 if row[0] != "cem" else 1) for row in ROWS]
    columns = ("user_id", "item_id", "timestamp", "rating")
    assert files.load(rows, columns, min_rating=4).user_ids == ["ann", "bob"]
    assert files.load(rows, columns, min_user=3).user_ids == ["ann", "bob"]
    with pytest.raises(DataError, match="none of 9 interactions is left"):
        files.load(rows, columns, min_item=50)
    with pytest.raises(DataError, match="no ratings"):
        files.load(ROWS, min_rating=3)


def test_ties_depend_on_the_seed_and_not_on_the_lines(files):
    rows = [(u, f"i{n}", 7) for u in "abc" for n in range(6)]
    orders = set()
    for seed in range(6):
        plain = sequences_of(files.load(rows, tie_seed=seed))
        shuffled = sequences_of(files.load(random.Random(seed).sample(rows, len(rows)), tie_seed=seed))
        assert plain == shuffled
        orders.add(tuple(map(tuple, plain.values())))
    assert len(orders) == 6  # each seed draws another order
    assert any(len(set(order)) == 3 for order in orders)  # and another one for each user
    assert any("100.0% of interactions share their time" in note for note in files.load(rows).notes)


def test_exact_repeats_count_once_and_other_repeats_stay(files):
    columns = ("user_id", "item_id", "timestamp", "rating")
    rows = [(*row, 3) for row in ROWS]
    data = files.load([*rows, ("ann", "y", 20, 5), ("ann", "y", 21, 3)], columns)
    assert sequences_of(data)["ann"] == list("xyyzx")
    assert data.ratings is not None and data.ratings[1] == 5  # the higher rating of the pair
    assert any("1 exact repeats" in note for note in data.notes)


def test_one_user_or_no_cases(files):
    with pytest.raises(DataError, match="only one user"):
        files.load([r for r in ROWS if r[0] == "ann"])
    with pytest.raises(DataError, match="at least 3 interactions"):
        files.load([("a", "x", 1), ("b", "y", 2), ("b", "x", 3)])
    with pytest.raises(DataError, match="0 validation"):
        files.load(ROWS, split="time", valid_from=100, test_from=200)
    with pytest.raises(DataError, match="validation would start at 30"):
        files.load(ROWS, split="time", valid_from=30, test_from=20)


def test_time_split_needs_times(files):
    with pytest.raises(DataError, match="no times, only an order"):
        files.load(
            [(u, n, i) for n, (u, i, _) in enumerate(ROWS)], ("user_id", "position", "item_id"), split="time"
        )


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"split": "leave_one_in"}, "Did you mean 'leave_one_out'"),
        ({"cold": "warm"}, "Choices: auto, keep, drop"),
        ({"min_history": 0}, "1 or more"),
        ({"stride": -1}, "0 or more"),
        ({"valid_quantile": 0.9, "test_quantile": 0.8}, "0 < valid_quantile < test_quantile < 1"),
    ],
)
def test_senseless_keys_are_refused_before_any_file(keys, message):
    with pytest.raises(ConfigError, match=message):
        InteractionsConfig(path="nowhere.csv", **keys)


def test_digest_says_what_counts(files):
    base = files.load(ROWS)
    assert files.load(random.Random(1).sample(ROWS, 9)).digest == base.digest
    assert len(base.digest) == 32
    assert files.load(ROWS, split="time", valid_from=25, test_from=35).digest == base.digest  # cuts alike
    others = [
        files.load(ROWS, min_history=2),
        files.load(ROWS, split="time", valid_from=20, test_from=30),
        files.load([*ROWS, ("cem", "x", 99)]),
        files.load([("ANN" if u == "ann" else u, i, t) for u, i, t in ROWS]),
        files.load([(u, i, t + 1) for u, i, t in ROWS]),
    ]
    digests = [base.digest, *(o.digest for o in others)]
    assert len(set(digests)) == len(digests)
    files.write([("x", "Xylophone")], ("item_id", "title"), "items.csv")
    assert files.load(ROWS).digest not in digests


def test_find(files):
    data = files.load(ROWS)
    assert data.user_ids[data.find("bob")] == "bob"
    with pytest.raises(DataError, match="Did you mean 'bob'"):
        data.find("bobb")


def test_sentence():
    names = ["title", "year", "genres"]
    assert (
        sentence(names, ["Toy Story", "1995", "Animation|Comedy"])
        == "Toy Story (1995). Genres: Animation, Comedy."
    )
    assert sentence(names, ["What?", "", ""]) == "What?"
    assert sentence(names, ["Odd", "V", "Drama"]) == "Odd. Genres: Drama."
    assert sentence(["title", "keywords"], ["", "soap dish"]) == "soap dish."
    assert sentence(names, ["", "", ""]) == ""


def test_every_user_has_one_case_of_each_kind(files):
    rows = [
        (f"u{u}", f"i{i}", t)
        for u in range(5)
        for t, i in enumerate(itertools.islice(itertools.cycle(range(4)), u + 3))
    ]
    data = files.load(rows)
    assert (data.users[data.test_rows] == np.arange(5)).all()
    assert (data.test_rows - data.valid_rows == 1).all()
