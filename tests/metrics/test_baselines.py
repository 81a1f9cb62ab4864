"""Popularity and the Markov chain, against counting by hand."""

from __future__ import annotations

import numpy as np
import torch

from reason.metrics.baselines import MarkovChain, baseline_ranks

HISTORIES = [[0, 1, 2], [0, 1, 3], [3, 1, 2], [2, 0, 1]]
PREVIOUS = np.array([a for h in HISTORIES for a in h[:-1]])
FOLLOWING = np.array([b for h in HISTORIES for b in h[1:]])
COUNTS = np.bincount(np.concatenate(HISTORIES), minlength=5)


def test_the_chain_counts_what_followed():
    scores = MarkovChain(PREVIOUS, FOLLOWING, 5).scores(torch.tensor([1, 0, 4]))
    assert scores.tolist() == [[0, 0, 2, 1, 0], [0, 3, 0, 0, 0], [0, 0, 0, 0, 0]]


def test_ranks_by_popularity_and_by_what_followed():
    chain = MarkovChain(PREVIOUS, FOLLOWING, 5)
    exclude = torch.tensor([[False, True, False, False, False]])
    batches = [
        (torch.tensor([1, 4]), torch.tensor([3, 2]), None),  # COUNTS: 3, 4, 3, 2, 0
        (torch.tensor([1]), torch.tensor([0]), exclude),
    ]
    found = baseline_ranks(batches, chain, COUNTS)
    assert found["popularity"].tolist() == [4, 2.5, 1.5]
    # After 1 came 2 twice and 3 once; nothing is known after 4, so popularity settles it; then 0 behind 2 and 3.
    assert found["successor"].tolist() == [2, 2.5, 3]
