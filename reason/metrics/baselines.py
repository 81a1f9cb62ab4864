"""What a recommender has to beat: popularity, and a first-order Markov chain. Both count, neither learns.

Knows codes and counts; knows no model and no split.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from reason.metrics.ranking import target_rank


class MarkovChain:
    """How often each item followed each other item in training, as sorted pairs."""

    def __init__(self, previous: np.ndarray, following: np.ndarray, num_items: int):
        """previous, following: (n,) int64 codes, the two items of each transition."""
        self.num_items = num_items
        self._pair, self._count = np.unique(previous * num_items + following, return_counts=True)

    def scores(self, last: Tensor) -> Tensor:
        """(n,) items -> (n, N) float64 counts of what followed them."""
        scores = np.zeros((len(last), self.num_items))
        first = np.searchsorted(self._pair, last.numpy() * self.num_items)
        end = np.searchsorted(self._pair, (last.numpy() + 1) * self.num_items)
        for row, (a, b) in enumerate(zip(first, end, strict=True)):
            scores[row, self._pair[a:b] % self.num_items] = self._count[a:b]
        return torch.from_numpy(scores)


def baseline_ranks(
    examples: Iterable[tuple[Tensor, Tensor, Tensor | None]], chain: MarkovChain, counts: np.ndarray
) -> dict[str, np.ndarray]:
    """Ranks (n,) of the targets by each trivial ranker.

    ``popularity``: items by their occurrences in training. ``successor``: by how often they followed the
    last item of the history there, ties by popularity (a first-order Markov chain).

    Args:
        examples: a batch at a time the last item of each history (b,), the target (b,), and what is no
            candidate (b, N) or None.
        counts: (N,) occurrences of each item in training.
    """
    popularity = torch.from_numpy(counts).double()
    share = popularity / (popularity.sum() + 1)  # below 1, so it only settles ties
    ranks: dict[str, list[np.ndarray]] = {"popularity": [], "successor": []}
    for last, target, exclude in examples:
        plain = popularity.expand(len(last), -1)
        for name, scores in (("popularity", plain), ("successor", chain.scores(last) + share)):
            ranks[name].append(target_rank(scores, target, exclude).numpy())
    return {name: np.concatenate(parts) for name, parts in ranks.items()}
