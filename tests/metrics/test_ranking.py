"""Ranks and what they are worth, against hand computation and a slow plain reference."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reason.metrics.ranking import (
    METRICS,
    exclusion_mask,
    head_items,
    ranking_columns,
    ranking_rows,
    target_rank,
)


def plain_rank(scores: list[float], target: int, excluded: set[int]) -> float:
    rivals = [s for i, s in enumerate(scores) if i != target and i not in excluded]
    own = scores[target]
    return 1 + sum(s > own for s in rivals) + sum(s == own for s in rivals) / 2


def test_rank_by_hand():
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.5], [3.0, 3.0, 3.0, 3.0], [1.0, 2.0, 3.0, 4.0]])
    target = torch.tensor([2, 0, 3])
    # 0.9 above and one level with it; three level; nothing above
    assert target_rank(scores, target).tolist() == [2.5, 2.5, 1.0]


def test_constant_scorer_gets_the_middle_whatever_the_target():
    items = 101
    ranks = target_rank(torch.zeros(items, items), torch.arange(items))
    assert ranks.unique().tolist() == [(items + 1) / 2]
    assert ranking_columns(ranks)["recall@20"].sum() == 0


def test_excluded_items_are_no_rivals_but_the_target_always_is_a_candidate():
    scores = torch.tensor([[5.0, 4.0, 3.0, 2.0]])
    seen = torch.tensor([[True, False, True, True]])
    assert target_rank(scores, torch.tensor([3]), seen).tolist() == [2.0]
    padding = torch.tensor([True, False, False, False])  # (N,): the same for every example
    assert target_rank(scores, torch.tensor([2]), padding).tolist() == [2.0]


def test_nan_never_wins():
    nan = float("nan")
    scores = torch.tensor([[nan, 1.0, 2.0], [nan, 1.0, 2.0], [nan, nan, nan]])
    ranks = target_rank(scores, torch.tensor([0, 2, 1]))
    assert ranks[0] > 3 - 0.5 and ranks[1] == 2 and ranks[2] >= 3


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_rank_equals_plain_reference(data):
    items = data.draw(st.integers(1, 12))
    scores = data.draw(st.lists(st.integers(-3, 3).map(float), min_size=items, max_size=items))
    target = data.draw(st.integers(0, items - 1))
    excluded = data.draw(st.sets(st.integers(0, items - 1)))
    mask = torch.tensor([[i in excluded for i in range(items)]])
    found = target_rank(torch.tensor([scores]), torch.tensor([target]), mask)
    assert found.item() == plain_rank(scores, target, excluded)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_rank_takes_any_real_dtype(dtype):
    scores = torch.tensor([[1.0, 2.0, 3.0]], dtype=dtype)
    assert target_rank(scores, torch.tensor([1])).tolist() == [2.0]


def test_columns_by_hand():
    columns = ranking_columns(np.array([1.0, 2.0, 5.5, 11.0]), ks=(5, 10))
    assert columns["recall@5"].tolist() == [1, 1, 0, 0]
    assert columns["recall@10"].tolist() == [1, 1, 1, 0]
    np.testing.assert_allclose(columns["ndcg@10"], [1, 1 / math.log2(3), 1 / math.log2(6.5), 0])
    np.testing.assert_allclose(columns["mrr"], [1, 0.5, 1 / 5.5, 1 / 11])


@given(st.lists(st.integers(2, 400).map(lambda half: half / 2), min_size=1, max_size=30))
def test_recall_and_ndcg_never_fall_with_k_and_ndcg_never_exceeds_recall(ranks):
    columns = ranking_columns(torch.tensor(ranks), ks=(1, 3, 5, 10, 50))
    for name in ("recall", "ndcg"):
        for less, more in ((1, 3), (3, 5), (5, 10), (10, 50)):
            assert np.all(columns[f"{name}@{less}"] <= columns[f"{name}@{more}"])
    assert np.all(columns["ndcg@10"] <= columns["recall@10"])


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"scores \(n, N\)"):
        target_rank(torch.zeros(3), torch.tensor([1]))
    with pytest.raises(ValueError, match="exclude"):
        target_rank(torch.zeros(2, 3), torch.tensor([1, 1]), torch.zeros(3, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="at least 1"):
        ranking_columns([0.5])
    with pytest.raises(ValueError, match="at least 1"):
        ranking_columns([float("nan")])
    with pytest.raises(ValueError, match="Every k"):
        ranking_columns([1.0], ks=(0,))


# --- rows ---------------------------------------------------------------------------------------


def test_rows_by_hand():
    counts = np.array([5, 1, 9, 0, 2, 7])  # the head, a fifth of six rounded up: items 2 and 5
    found = ranking_rows(
        id=np.array(["ann", "bob"], object),
        history=np.array([4, 2]),
        target=np.array([2, 3]),
        rank=np.array([1.0, 30.0], np.float32),
        counts=counts,
        top=np.array([[2, 0], [1, 4]]),
        depth_used=np.array([2.0, 1.0]),
    ).to_pydict()
    assert found["id"] == ["ann", "bob"] and found["history"] == [4, 2] and found["target"] == [2, 3]
    assert found["target_count"] == [9, 0] and found["target_head"] == [1, 0]
    assert found["rank"] == [1, 30] and found["ndcg@10"] == [1, 0] and found["mrr"] == [1, 1 / 30]
    assert found["top@10"] == [[2, 0], [1, 4]] and found["popularity@10"] == [7, 1.5]
    assert found["tail@10"] == [0.5, 1] and found["depth_used"] == [2, 1]
    assert set(METRICS.values()) <= set(found)


def test_rows_without_answers_have_no_columns_of_them():
    found = ranking_rows(np.array(["a"], object), *(np.array([1]) for _ in range(3)), np.array([3, 4]))
    assert "top@10" not in found.column_names and "target_head" in found.column_names


@pytest.mark.parametrize(("items", "head"), [(1, 1), (5, 1), (6, 2), (35, 7), (36, 8)])
def test_the_head_is_a_fifth_of_the_items_ties_by_code(items, head):
    assert head_items(np.ones(items)).tolist() == [True] * head + [False] * (items - head)
    assert head_items(np.arange(items))[::-1].tolist() == [True] * head + [False] * (items - head)


def test_pairs_become_a_mask():
    assert exclusion_mask(None, 2, 3) is None
    pairs = torch.tensor([0, 1, 1]), torch.tensor([2, 0, 0])
    assert exclusion_mask(pairs, 2, 3).tolist() == [[False, False, True], [True, False, False]]
