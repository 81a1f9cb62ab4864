"""Requests with histories: understood as they are meant, or refused in words."""

from __future__ import annotations

import numpy as np
import pytest

from reason.datasets.catalogue import Catalogue
from reason.datasets.requests import RecommendationRequest, read_request
from reason.errors import DataError


def catalogue(items: int = 30) -> Catalogue:
    ids = [str(i) if i else "zero" for i in range(items)]
    return Catalogue(ids, ids, {}, np.arange(items))


def nobody(user: str) -> list[int]:
    raise AssertionError("no user is named, so the data is not asked")


def test_a_history_is_read_in_order_and_unknown_items_are_named():
    found = read_request({"history": ["3", "gone", 7, "zero", "3"]}, catalogue(), nobody, 4)
    assert found == RecommendationRequest([3, 7, 0, 3], ["gone"], 10, None)


def test_a_user_is_looked_up():
    asked = []

    def history_of(user: str) -> np.ndarray:
        asked.append(user)
        return np.array([4, 2])

    found = read_request({"user": 17, "k": 3, "depth": 0}, catalogue(), history_of, 4)
    assert found == RecommendationRequest([4, 2], [], 3, 0) and asked == ["17"]


def test_fewer_items_than_an_answer_has_are_all_answered():
    assert read_request({"history": []}, catalogue(4), nobody, 2).k == 4


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        ({}, "A request is"),
        (["3"], "A request is"),
        (None, "A request is"),
        ({"history": [], "user": "u"}, "A request is"),
        ({"history": [], "n": 3}, "Unknown key 'n'"),
        ({"history": [], "k": 0}, 'k" is 0; it must be a whole number from 1 to 30'),
        ({"history": [], "k": 31}, "from 1 to 30"),
        ({"history": [], "k": 2.0}, "whole number"),
        ({"history": [], "k": True}, "whole number"),
        ({"history": [], "k": None}, "whole number"),
        ({"history": [], "depth": 5}, "from 0 to 4"),
        ({"history": [], "depth": -1}, "from 0 to 4"),
        ({"history": "3"}, "must be a list"),
        ({"history": ["3", ["4"]]}, r"holds \['4'\]"),
        ({"history": [None]}, "holds None"),
        ({"history": [True]}, "holds True"),
    ],
)
def test_what_makes_no_sense_is_refused_in_words(request_, says):
    with pytest.raises(DataError, match=says):
        read_request(request_, catalogue(), nobody, 4)
