"""Trivial rivals of a language model: the commonest token, and what most often followed the last one."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from reason.datasets.packing import Cases, Windows

AT_ONCE = 512  # windows or documents that are read in one call


class Follower:
    """Token counts of training, and of pairs of neighbours, as probabilities that leave room for what was not seen.

    A pair has probability (c(a b) + T(a) p(b)) / (c(a) + T(a)), T(a) the number of different tokens that followed a
    (Witten and Bell, 1991), and p(b) = (c(b) + 1) / (n + V).
    """

    def __init__(self, train: Windows, vocab: int):
        pairs, self.vocab = [], vocab
        for a in range(0, len(train), AT_ONCE):
            batch = train.batch(np.arange(a, min(a + AT_ONCE, len(train))))
            asked = batch["targets"] >= 0
            pairs.append((batch["tokens"][asked] * vocab + batch["targets"][asked]).numpy())
        self.pair, self.count = np.unique(np.concatenate(pairs), return_counts=True)  # ascending
        before, after = self.pair // vocab, self.pair % vocab
        single = np.bincount(after, weights=self.count, minlength=vocab)
        self.alone = (single + 1) / (single.sum() + vocab)  # (V,)
        self.followed = np.bincount(before, weights=self.count, minlength=vocab)  # (V,) c(a)
        self.kinds = np.bincount(before, minlength=vocab)  # (V,) T(a)
        self.commonest = int(single.argmax())
        self.next = np.full(vocab, self.commonest)  # (V,) the likeliest follower
        order = np.lexsort((after, -self.count, before))
        first = np.unique(before[order], return_index=True)[1]
        self.next[before[order][first]] = after[order][first]

    def unigram(self, last: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(nats, hit) of each target (n,), whatever came last."""
        return -np.log(self.alone[target]), target == self.commonest

    def bigram(self, last: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(nats, hit) of each target (n,) after ``last`` (n,)."""
        key = last * self.vocab + target
        at = np.searchsorted(self.pair, key).clip(max=len(self.pair) - 1)
        seen = np.where(self.pair[at] == key, self.count[at], 0)
        room = self.kinds[last]
        whole = self.followed[last] + room
        share = (seen + room * self.alone[target]) / np.maximum(whole, 1)
        return -np.log(np.where(whole > 0, share, self.alone[target])), target == self.next[last]


def targets(cases: Cases) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(document, last token, target) of every target, some documents at a time."""
    for index in cases.batches(np.arange(len(cases)), AT_ONCE):
        batch = cases.batch(index)
        asked = (batch["targets"] >= 0).numpy()
        row = np.broadcast_to(index[batch["case"].numpy()][:, None], asked.shape)
        yield row[asked], batch["tokens"].numpy()[asked], batch["targets"].numpy()[asked]
