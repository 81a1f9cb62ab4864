"""Unigram and bigram models of a training text: the trivial baselines of language models."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from reason.datasets.packing import Cases, Windows

AT_ONCE = 512  # windows or documents that are read in one call


class NGramModel:
    """Unigram and bigram probabilities of tokens, smoothed.

    A pair has probability (c(a b) + T(a) p(b)) / (c(a) + T(a)), T(a) the number of different tokens that followed a
    (Witten and Bell, 1991), and p(b) = (c(b) + 1) / (n + V).
    """

    def __init__(self, train: Windows, vocab: int):
        pairs, self.vocab = [], vocab
        for a in range(0, len(train), AT_ONCE):
            batch = train.batch(np.arange(a, min(a + AT_ONCE, len(train))))
            is_target = batch["targets"] >= 0
            pairs.append((batch["tokens"][is_target] * vocab + batch["targets"][is_target]).numpy())
        self.pair, self.count = np.unique(np.concatenate(pairs), return_counts=True)  # ascending
        before, after = self.pair // vocab, self.pair % vocab
        single = np.bincount(after, weights=self.count, minlength=vocab)
        self.probability = (single + 1) / (single.sum() + vocab)  # (V,) p(b)
        self.followed = np.bincount(before, weights=self.count, minlength=vocab)  # (V,) c(a)
        self.followers = np.bincount(before, minlength=vocab)  # (V,) T(a)
        self.most_frequent = int(single.argmax())
        self.next = np.full(vocab, self.most_frequent)  # (V,) the most frequent follower
        order = np.lexsort((after, -self.count, before))
        first = np.unique(before[order], return_index=True)[1]
        self.next[before[order][first]] = after[order][first]

    def unigram(self, last: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(nats, correct) of each target (n,), whatever the last token (n,)."""
        return -np.log(self.probability[target]), target == self.most_frequent

    def bigram(self, last: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(nats, correct) of each target (n,) after the last token (n,)."""
        key = last * self.vocab + target
        at = np.searchsorted(self.pair, key).clip(max=len(self.pair) - 1)
        count = np.where(self.pair[at] == key, self.count[at], 0)
        followers = self.followers[last]
        total = self.followed[last] + followers
        share = (count + followers * self.probability[target]) / np.maximum(total, 1)
        return -np.log(np.where(total > 0, share, self.probability[target])), target == self.next[last]

    def by_document(self, cases: Cases) -> dict[str, dict[str, np.ndarray]]:
        """For "unigram" and "bigram" the columns nll (nats), correct and targets: sums over each document."""
        models, n = {"unigram": self.unigram, "bigram": self.bigram}, len(cases)
        sums = {name: {column: np.zeros(n) for column in ("nll", "correct", "targets")} for name in models}
        for document, last, target in targets(cases):
            for name, model in models.items():
                nats, correct = model(last, target)
                values = {"nll": nats, "correct": correct, "targets": np.ones(len(target))}
                for column, weights in values.items():
                    sums[name][column] += np.bincount(document, weights=weights, minlength=n)
        return sums


def targets(cases: Cases) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(document, last token, target) of every target, some documents at a time."""
    for index in cases.batches(np.arange(len(cases)), AT_ONCE):
        batch = cases.batch(index)
        is_target = (batch["targets"] >= 0).numpy()
        document = np.broadcast_to(index[batch["case"].numpy()][:, None], is_target.shape)
        yield document[is_target], batch["tokens"].numpy()[is_target], batch["targets"].numpy()[is_target]
