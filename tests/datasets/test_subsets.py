"""Parts of examples: where one falls depends on its name alone, and no part is empty."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reason.datasets.config import SyntheticConfig
from reason.datasets.subsets import evenly_spaced, hold_out, unit
from reason.datasets.synthetic import load


@dataclass
class Named:
    id: np.ndarray

    def take(self, index):
        return Named(self.id[index])


def named(ids) -> Named:
    return Named(np.array(list(ids), object))


def held_of(ids, share, seed=0) -> set[str]:
    rest, held = hold_out(named(ids), share, seed)
    assert sorted([*rest.id, *held.id]) == sorted(ids)
    return set(held.id)


MANY = [f"user {i}" for i in range(2000)]


@pytest.mark.parametrize("share", [0.1, 0.25, 0.9])
def test_the_share_is_held_out(share):
    assert len(held_of(MANY, share)) == pytest.approx(share * len(MANY), abs=4 * (2000 * 0.25) ** 0.5)


def test_where_an_example_falls_depends_on_its_name_alone():
    held = held_of(MANY, 0.25)
    assert held_of(MANY[::-1], 0.25) == held
    assert held_of(MANY[:400], 0.25) == held & set(MANY[:400])
    assert held < held_of(MANY, 0.5), "a larger share holds out the same and more"
    assert held_of(MANY, 0.25, seed=1) != held
    assert {name for name in MANY if unit(name, "split") < 0.25} != held, "not the hash that splits documents"


def test_both_parts_keep_the_order():
    rest, held = hold_out(named(MANY), 0.25)
    place = {name: i for i, name in enumerate(MANY)}
    for part in (rest, held):
        assert (np.diff([place[name] for name in part.id]) > 0).all()


@given(st.lists(st.text(max_size=4), min_size=2, max_size=6, unique=True), st.floats(0.001, 0.999))
def test_of_two_examples_or_more_neither_part_is_empty(ids, share):
    assert 0 < len(held_of(ids, share)) < len(ids)


def test_no_share_holds_nothing_and_one_example_cannot_be_split():
    assert held_of(MANY, 0) == set()
    assert len(held_of(["a"], 0.001)) + len(held_of(["a"], 0.999)) == 1
    assert held_of([], 0.5) == set()
    for share in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="at least 0 and below 1"):
            hold_out(named(MANY), share)


def test_cases_of_a_dataset_can_be_held_out():
    cases = load(SyntheticConfig(users=60, items=40, mean_length=9, categories=4)).sequences(5).valid
    rest, held = hold_out(cases, 0.25)
    assert set(rest.id) | set(held.id) == set(cases.id) and not set(rest.id) & set(held.id)
    where = [cases.find(name) for name in held.id]
    assert held.batch(np.arange(len(held)))["target"].tolist() == cases.target[where].tolist()


@given(st.integers(0, 50), st.integers(0, 60))
def test_evenly_spaced(examples, limit):
    found = evenly_spaced(examples, limit)
    assert len(found) == min(limit or examples, examples)
    if len(found) > 1:
        assert found[0] == 0 and found[-1] == examples - 1
        assert np.diff(found).min() >= 1 and np.diff(found).max() - np.diff(found).min() <= 1
