"""Outcomes of language models against torch's cross-entropy and sums by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from reason.metrics import language
from reason.metrics.language import TokenOutcomes, document_columns, metrics, token_outcomes


@pytest.fixture
def batch():
    """Three windows of two documents."""
    return {
        "targets": torch.tensor([[1, 2, -100], [0, 3, 1], [4, -100, -100]]),
        "level": torch.tensor([[0, 2, -1], [0, 0, 2], [2, -1, -1]]),
        "case": torch.tensor([0, 0, 1]),
    }


def test_outcomes_are_cross_entropy_token_by_token(batch, monkeypatch):
    states, head = torch.randn(3, 3, 8), torch.randn(5, 8)
    logits, targets = states @ head.T, batch["targets"]
    want = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    for rows in (2, 4096):  # however many logits are alive at a time
        monkeypatch.setattr(language, "ROWS", rows)
        got = token_outcomes(states, targets, lambda x: F.linear(x, head))
        np.testing.assert_allclose(got.nll, want.numpy(), rtol=1e-5, atol=1e-6)
        assert (got.correct == ((logits.argmax(-1) == targets) & (targets >= 0)).numpy()).all()
    plain = token_outcomes(logits, targets, lambda x: x)
    np.testing.assert_allclose(plain.nll, got.nll, rtol=1e-5, atol=1e-6)


def test_windows_are_selected_and_joined():
    some = TokenOutcomes(np.arange(6.0).reshape(3, 2), np.eye(3, 2, dtype=bool))
    both = TokenOutcomes.concatenate([some.select(np.array([2, 0])), some.select(np.array([1]))])
    assert both.nll.tolist() == [[4, 5], [0, 1], [2, 3]] and both.correct.tolist()[1] == [True, False]


def test_columns_are_sums_over_the_windows_of_a_document(batch):
    nll = np.array([[1.0, 2.0, 0.0], [3.0, 4.0, 5.0], [7.0, 0.0, 0.0]])
    correct = np.array([[True, False, False], [False, True, True], [True, False, False]])
    got = document_columns(TokenOutcomes(nll, correct), batch, 2, [0, 2])
    assert got["nll"].tolist() == [15, 7] and got["targets"].tolist() == [5, 1]
    assert got["correct"].tolist() == [3, 1] and got["bits"][1] == pytest.approx(7 / math.log(2))
    assert got["targets_0"].tolist() == [3, 0] and got["correct_0"].tolist() == [2, 0]
    assert got["targets_2"].tolist() == [2, 1] and got["correct_2"].tolist() == [1, 1]
    assert all(column.dtype == np.float64 for column in got.values())


def test_no_windows_have_empty_columns_of_floats(batch):
    none = TokenOutcomes(np.zeros((0, 0)), np.zeros((0, 0), bool))
    got = document_columns(none, {name: column[:0] for name, column in batch.items()}, 0)
    assert all(len(column) == 0 and column.dtype == np.float64 for column in got.values())


def test_every_metric_reads_columns_that_there_are(batch):
    columns = document_columns(TokenOutcomes(np.zeros((3, 3)), np.zeros((3, 3), bool)), batch, 2, [0, 2])
    names = {*columns, "bytes"}
    found = metrics([0, 2])
    assert {ratio.numerator for ratio in found.values()} <= names
    assert {ratio.denominator for ratio in found.values()} <= names
    assert {"next-token accuracy", "bits per byte", "loss", "accuracy at level 2"} <= set(found)
