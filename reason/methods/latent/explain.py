"""What latent reasoning did to one answer, in numbers.

Two questions are kept apart. *What did the steps change?* ``Explainer.trace`` follows one request; the change
of a score is exact, as scores are linear in the state that answers. *Which items of the history does the
answer rest on?* Three attributions, each one number an item: ``Trace.item_attention`` (what the steps attended to),
``Explainer.gradient`` (slope of the score times the item's vector) and ``Explainer.occlusion`` (what happens
without the item). Only the last is an experiment; ``faithfulness.py`` asks how far the others agree with it.

Knows the encoder and the readout; knows nothing of training or of how anything is shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from reason.methods.latent import objective

if TYPE_CHECKING:
    from reason.backbones.encoder import SequenceEncoder


@dataclass(frozen=True)
class Trace:
    """One request followed step by step: n items read, K steps taken, L layers."""

    states: Tensor  # (K + 1, d), r_0..r_K
    scores: Tensor  # (K + 1, N), of the state that would answer after each step, before any temperature
    attention: Tensor  # (K, L, n + K), of each step over items, then latent tokens; mean over heads

    @property
    def contributions(self) -> Tensor:
        """(K, N): what each step added to each item's score. Sums over steps to the last less the first."""
        return self.scores[1:] - self.scores[:-1]

    @property
    def item_attention(self) -> Tensor:
        """(n,): the share of each item in the attention of the latent steps, over all steps and layers."""
        return self.attention.mean((0, 1))[: self.attention.shape[2] - len(self.attention)]


class Explainer:
    """A trained encoder that answers after ``depth`` steps, asked why."""

    def __init__(self, config: Any, model: SequenceEncoder, depth: int):
        self.config, self.model, self.depth = config.latent, model, depth
        self.vectors = model.item_vectors().detach()  # (N, d)

    @torch.no_grad()
    def trace(self, items: Tensor) -> Trace:
        """Follow one history (n,) of item codes."""
        weights: list[Tensor] = []
        states = self._follow(items[None], weights)[0]
        steps = range(self.depth + 1)
        read = torch.stack([objective.read(self.config, states[: k + 1]) for k in steps])
        width = len(items) + self.depth
        rows = [F.pad(w.mean(1)[0], (0, width - w.shape[-1])) for w in weights]  # K * L of (n + K,)
        attention = torch.stack(rows).unflatten(0, (self.depth, -1)) if rows else read.new_zeros(0, 1, width)
        return Trace(states, read @ self.vectors.T, attention)

    @torch.no_grad()
    def score(self, items: Tensor, item: int) -> Tensor:
        """(B, n) histories without padding -> (B,), the score of ``item``."""
        return objective.read(self.config, self._follow(items)) @ self.vectors[item]

    def occlusion(self, items: Tensor, item: int) -> Tensor:
        """(n,): how far the score of ``item`` falls when one item of the history (n,) is left out.

        The item is removed, as if it had never been: later ones move up, and nothing older comes in.

        Raises:
            ValueError: the history has one item, without which there is nothing to answer from.
        """
        n = len(items)
        if n < 2:
            raise ValueError("A history of one item leaves nothing to answer from without it.")
        place = torch.arange(n, device=items.device).expand(n, n)
        others = place[place != place.T].view(n, n - 1)  # row i: all places but i
        return self.score(items[None], item) - self.score(items[others], item)

    def gradient(self, items: Tensor, item: int) -> Tensor:
        """(n,): slope of the score of ``item`` in each input vector, times that vector, summed over d.

        Each place of the history has an input vector of its own, also where an item is repeated; the
        vector that ``item`` is scored with is held fixed. A history is no longer than the catalogue.
        """
        n = len(items)
        if n > len(self.vectors):
            raise ValueError(f"A history of {n} items is longer than the catalogue of {len(self.vectors)}.")
        with torch.enable_grad():
            own = self.vectors[items].requires_grad_()  # (n, d), which the first n codes now stand for
            place, vectors = torch.arange(n, device=items.device), torch.cat([own, self.vectors[n:]])
            states, _ = self.model.reason(
                place[None], self.depth, vectors=vectors
            )  # ``advance`` has no slope
            score = objective.read(self.config, states[0, -1]) @ self.vectors[item]
            (slope,) = torch.autograd.grad(score, own)
        return (slope * own).sum(-1).detach()

    def _follow(self, items: Tensor, weights: list[Tensor] | None = None) -> Tensor:
        """(B, n) histories without padding -> (B, depth + 1, d), the state after each step."""
        length = torch.full((len(items),), items.shape[1], device=items.device)
        thought = self.model.start(items, length, self.depth, self.vectors)
        first = thought.state
        later = [self.model.advance(thought, weights) for _ in range(self.depth)]
        return torch.stack([first, *later], 1)


def nearest_items(states: Tensor, vectors: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Cosines and codes of the items nearest to each state (S, d): two (S, count), nearest first."""
    found = (F.normalize(states, dim=-1) @ F.normalize(vectors, dim=-1).T).topk(min(count, len(vectors)))
    return found.values, found.indices


def category_mass(probability: Tensor, categories: Sequence[Sequence[str]]) -> dict[str, list[float]]:
    """Probability of each category after each step, the largest at the end first.

    Args:
        probability: (S, N), each row sums to 1.
        categories: of each item; an item of several shares its probability equally among them, one of
            none counts for the category "none".
    """
    names = {name: column for column, name in enumerate(dict.fromkeys(c for own in categories for c in own))}
    share = probability.new_zeros(len(categories), len(names) + 1)
    for item, own in enumerate(categories):
        for name in own:
            share[item, names[name]] += 1 / len(own)
        share[item, -1] = not own
    mass = probability @ share  # (S, C + 1)
    columns = [*names, "none"] if share[:, -1].any() else [*names]
    ranked = sorted(range(len(columns)), key=lambda column: -float(mass[-1, column]))
    return {columns[column]: mass[:, column].tolist() for column in ranked}
