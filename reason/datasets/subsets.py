"""Parts of a set of examples: spread evenly over it, or drawn by a hash of each example's name."""

from __future__ import annotations

import hashlib
from typing import Protocol, Self, TypeVar

import numpy as np


class Named(Protocol):
    """Examples that have names, and of which a part can be taken."""

    @property
    def id(self) -> np.ndarray:
        """(n,) of str."""
        ...

    def take(self, index: np.ndarray) -> Self:
        """The examples at ``index``, in that order."""
        ...


E = TypeVar("E", bound=Named)


def unit(name: str, purpose: str) -> float:
    """A number in [0, 1) that depends on ``name`` and ``purpose`` alone."""
    return int.from_bytes(hashlib.sha256(f"{purpose} {name}".encode()).digest()[:8], "big") / 2**64


def evenly_spaced(examples: int, limit: int) -> np.ndarray:
    """(m,) int64: at most ``limit`` of 0..examples-1, the first and the last among them; 0 = all."""
    if not 0 < limit < examples:
        return np.arange(examples)
    return np.unique(np.linspace(0, examples - 1, limit).round().astype(np.int64))


def hold_out(examples: E, share: float, seed: int = 0) -> tuple[E, E]:
    """(rest, held): about ``share`` of the examples held apart, both parts in the order given.

    Where an example falls depends on its id and the seed alone, not on the order or on the other examples.
    The one exception: where all of two or more would fall to one side, the nearest one changes sides, so that
    neither part is empty. A share of 0 holds nothing apart.

    Raises:
        ValueError: a share outside of [0, 1).
    """
    if not 0 <= share < 1:
        raise ValueError(f"The share of examples to hold out is {share}; it must be at least 0 and below 1.")
    place = np.array([unit(str(name), f"hold out {seed}") for name in examples.id])
    held = place < share
    if share and len(place) > 1:
        if held.all():
            held[place.argmax()] = False
        elif not held.any():
            held[place.argmin()] = True
    return examples.take(np.flatnonzero(~held)), examples.take(np.flatnonzero(held))
