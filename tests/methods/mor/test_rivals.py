"""The n-gram rivals against counting by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from reason.datasets.documents import Documents
from reason.datasets.packing import Cases, Windows, encode
from reason.methods.mor.rivals import Follower, targets


class Letters:
    eos = 26

    def encode(self, texts):
        return [([ord(c) - 97 for c in t], [(i, i + 1) for i in range(len(t))]) for t in texts]


@pytest.fixture
def follower():
    data = encode(
        Documents(["a", "b"], ["abab", "abca"]), Letters()
    )  # $abab$abca: pairs $a ab ba ab b$ $a ab bc ca
    return Follower(Windows(data, 4), 27)


def test_counts(follower):
    a, b, end = 0, 1, 26
    assert follower.commonest == a and follower.next[a] == b and follower.next[end] == a
    assert follower.next[b] == a  # a, c and the end followed it once each: the lower id
    nats, hit = follower.unigram(np.array([a, a]), np.array([b, a]))
    assert hit.tolist() == [False, True] and nats[0] == pytest.approx(-math.log((3 + 1) / (9 + 27)))
    nats, hit = follower.bigram(np.array([a, b, 7]), np.array([b, b, a]))
    assert hit.tolist() == [True, False, True]
    assert nats[0] == pytest.approx(-math.log((3 + 1 * 4 / 36) / (3 + 1)))
    assert nats[1] == pytest.approx(-math.log((0 + 3 * 4 / 36) / (3 + 3)))
    assert nats[2] == pytest.approx(-math.log((4 + 1) / 36))  # nothing followed it: as it is alone


def test_probabilities_sum_to_one(follower):
    for last in range(27):
        nats, _ = follower.bigram(np.full(27, last), np.arange(27))
        assert np.exp(-nats).sum() == pytest.approx(1)


def test_every_target_once():
    cases = Cases(encode(Documents(["x", "y"], ["abc", "d"]), Letters()), 2)
    row, last, target = (np.concatenate(part) for part in zip(*targets(cases), strict=True))
    assert sorted(zip(row.tolist(), last.tolist(), target.tolist(), strict=True)) == [
        (0, 0, 1), (0, 1, 2), (0, 26, 0), (1, 26, 3)
    ]  # fmt: skip
