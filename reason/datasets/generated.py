"""What generated datasets share: documents drawn without repetition, and words with the level they ask for."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import TypeVar

from reason.datasets.documents import SPLITS, Span
from reason.datasets.textconfig import GeneratedKeys
from reason.errors import DataError

PATIENCE = 1000  # repeats in a row after which no new example is hoped for
T = TypeVar("T")


def distinct(
    draw: Callable[[random.Random], T], key: Callable[[T], str], keys: GeneratedKeys
) -> dict[str, list[T]]:
    """Examples by split, no two with the same ``key``.

    Each split has a random stream of its own. The test is drawn first, so that neither it nor
    validation depends on how much there is to train on.

    Raises:
        DataError: the keys of the dataset allow too few different examples.
    """
    seen: set[str] = set()
    found: dict[str, list[T]] = {}
    for split in reversed(SPLITS):
        rng = random.Random(f"{keys.seed} {split}")
        wanted, repeats = getattr(keys, f"{split}_documents"), 0
        found[split] = []
        while len(found[split]) < wanted:
            example = draw(rng)
            said = key(example)
            if said in seen:
                repeats += 1
                if repeats == PATIENCE:
                    raise DataError(
                        f"{keys.name}: there are few more than {len(seen):,} different examples of these "
                        f"sizes; {wanted:,} are asked for under dataset.{split}_documents.",
                        "Ask for fewer documents, or make them larger.",
                    )
                continue
            repeats = 0
            seen.add(said)
            found[split].append(example)
    return found


def names(split: str, count: int) -> list[str]:
    """Ids of generated documents: test-000000 ..."""
    return [f"{split}-{i:06d}" for i in range(count)]


class Words:
    """A text of words between single spaces, written one after the other."""

    def __init__(self):
        self._words: list[str] = []
        self._levels: list[int | None] = []

    def say(self, *words: str, level: int | None = None) -> None:
        """Add words; those with a level are supervised."""
        self._words += words
        self._levels += [level] * len(words)

    def __len__(self) -> int:
        return len(self._words)

    @property
    def text(self) -> str:
        return " ".join(self._words)

    @property
    def spans(self) -> list[Span]:
        """Neighbours of one level are one span."""
        spans: list[Span] = []
        start = 0
        pairs = zip(self._levels, self._words, strict=True)
        for level, run in itertools.groupby(pairs, lambda pair: pair[0]):
            end = start + sum(len(word) + 1 for _, word in run)
            if level is not None:
                spans.append((start, end - 1, level))
            start = end
        return spans
