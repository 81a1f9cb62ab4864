"""The n-gram models against counting by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from reason.datasets.documents import Documents
from reason.datasets.ngrams import NGramModel, targets
from reason.datasets.packing import Cases, Windows, encode


class Letters:
    eos = 26

    def encode(self, texts):
        return [([ord(c) - 97 for c in t], [(i, i + 1) for i in range(len(t))]) for t in texts]


@pytest.fixture
def model():
    data = encode(
        Documents(["a", "b"], ["abab", "abca"]), Letters()
    )  # $abab$abca: pairs $a ab ba ab b$ $a ab bc ca
    return NGramModel(Windows(data, 4), 27)


def test_counts(model):
    a, b, end = 0, 1, 26
    assert model.most_frequent == a and model.next[a] == b and model.next[end] == a
    assert model.next[b] == a  # a, c and the end followed it once each: the lower id
    nats, correct = model.unigram(np.array([a, a]), np.array([b, a]))
    assert correct.tolist() == [False, True] and nats[0] == pytest.approx(-math.log((3 + 1) / (9 + 27)))
    nats, correct = model.bigram(np.array([a, b, 7]), np.array([b, b, a]))
    assert correct.tolist() == [True, False, True]
    assert nats[0] == pytest.approx(-math.log((3 + 1 * 4 / 36) / (3 + 1)))
    assert nats[1] == pytest.approx(-math.log((0 + 3 * 4 / 36) / (3 + 3)))
    assert nats[2] == pytest.approx(-math.log((4 + 1) / 36))  # nothing followed it: as it is alone


def test_probabilities_sum_to_one(model):
    for last in range(27):
        nats, _ = model.bigram(np.full(27, last), np.arange(27))
        assert np.exp(-nats).sum() == pytest.approx(1)


def test_every_target_once():
    cases = Cases(encode(Documents(["x", "y"], ["abc", "d"]), Letters()), 2)
    row, last, target = (np.concatenate(part) for part in zip(*targets(cases), strict=True))
    assert sorted(zip(row.tolist(), last.tolist(), target.tolist(), strict=True)) == [
        (0, 0, 1), (0, 1, 2), (0, 26, 0), (1, 26, 3)
    ]  # fmt: skip


def test_sums_by_document(model):
    cases = Cases(encode(Documents(["x", "y"], ["abc", "d"]), Letters()), 2)
    got = model.by_document(cases)
    for name in ("unigram", "bigram"):
        row, last, target = (np.concatenate(part) for part in zip(*targets(cases), strict=True))
        nats, correct = getattr(model, name)(last, target)
        for i in range(2):
            assert got[name]["nll"][i] == pytest.approx(nats[row == i].sum())
            assert got[name]["correct"][i] == correct[row == i].sum()
        assert got[name]["targets"].tolist() == [3, 1]
