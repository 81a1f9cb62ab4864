"""Prefixes of solutions and who was copied from whom.

A *node* is a prefix: its parent's text and one chunk more. Particles, beams and samples are nodes at the end of paths;
a node that was copied has several children. Nothing is copied but references, and nothing of a node changes once it
is made, so a path never loses its history.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np


@dataclass(eq=False)
class Node:
    """A prefix of a solution.

    tokens, text: of its chunk alone. log_p: log-probability of the chunk given what is before it, as it was drawn.
    reward: of the whole prefix, in [0, 1]; NaN where none was asked for. finish: why nothing follows ("" = it
    is unfinished). step: chunks up to here; the root, an empty solution, has 0. length: tokens up to here.
    """

    parent: Node | None
    tokens: Sequence[int] = ()
    text: str = ""
    log_p: float = 0.0
    reward: float = math.nan
    finish: str = ""
    members: Sequence[float] = ()  # what each member of an ensemble of rewards said
    step: int = field(init=False)
    length: int = field(init=False)

    def __post_init__(self):
        above = self.parent
        self.step = above.step + 1 if above else 0
        self.length = (above.length if above else 0) + len(self.tokens)

    @property
    def finished(self) -> bool:
        return bool(self.finish)

    @property
    def path(self) -> list[Node]:
        """From the first chunk to this one; without the root."""
        nodes: list[Node] = []
        node = self
        while node.parent is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]

    @property
    def solution(self) -> str:
        """The text of the whole path."""
        return "".join(node.text for node in self.path)

    @property
    def all_tokens(self) -> list[int]:
        """The tokens of the whole path."""
        return [token for node in self.path for token in node.tokens]

    @cached_property
    def id(self) -> str:
        """16 hex digits: equal for equal prefixes, cut into chunks alike."""
        above = self.parent.id if self.parent else ""
        return hashlib.blake2b(f"{above} {list(self.tokens)}".encode(), digest_size=8).hexdigest()


def distinct_ancestors(nodes: Iterable[Node], step: int) -> int:
    """How many different prefixes of ``step`` chunks the paths of ``nodes`` begin with."""
    return len({id(path[min(step, len(path)) - 1]) if (path := node.path) else 0 for node in nodes})


@dataclass(frozen=True)
class Round:
    """What one round of a sweep did: chunks were added, weighed, and perhaps resampled.

    nodes: (N) after the chunk. log_weights: (N,) unnormalised, before resampling. ess: effective sample size of these.
    temperature: by which they were flattened for resampling (1 = not). ancestors: (N,) slots that the next round's
    particles were copied from; None where nothing was resampled. spliced: with ancestor sampling, (N) what the
    reference's future came to behind each particle; None where it cannot follow.
    """

    nodes: tuple[Node, ...]
    log_weights: np.ndarray
    ess: float
    temperature: float = 1.0
    ancestors: np.ndarray | None = None
    spliced: tuple[Node | None, ...] = ()

    @property
    def survivors(self) -> int:
        """Slots that have offspring; ESS after resampling says nothing, this does."""
        return len(self.nodes) if self.ancestors is None else len(np.unique(self.ancestors))


@dataclass(frozen=True)
class Population:
    """Weighted particles, the outcome of a sweep or of several.

    nodes: (N), log_weights: (N,) unnormalised. log_z: log of the estimated evidence, the probability that every step is
    accepted; the estimate itself is unbiased, the mean under normalised weights is biased by O(1/N). rounds: what
    led here. status: "finished", "dead" where all weights were zero, or why it was halted.
    """

    nodes: tuple[Node, ...]
    log_weights: np.ndarray
    log_z: float
    rounds: tuple[Round, ...] = ()
    status: str = "finished"

    @property
    def weights(self) -> np.ndarray:
        """(N,) normalised; zero where all are."""
        from reason.methods.particle.resampling import normalized

        return normalized(self.log_weights)

    @property
    def finished(self) -> np.ndarray:
        """(N,) bool: who is a candidate for the answer."""
        return np.array([node.finished for node in self.nodes])
