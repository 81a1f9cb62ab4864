"""Routes: who takes the next recursion, given the router's logits. See ``router`` for the three kinds.

A route is called as ``route(step, logits, among)``: step from 0; logits (n,) of the tokens ``among`` that took the
step before (all, at step 0). It answers with the places (m,) int64, ascending, of those that take this step, and
with how many every sequence has where that is the same for all. None instead of places: all of them.
Every token takes the first step: depth 0 is no state of these networks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from reason.methods.mor.flops import kept
from reason.methods.mor.router import above, top_k
from reason.methods.mor.taken import Taken

Choice = tuple[Tensor | None, int | None]


class Route(Protocol):
    looks_ahead: bool  # whether what comes later in a sequence may change who is chosen

    def __call__(self, step: int, logits: Tensor, among: Taken) -> Choice: ...


class TopK:
    """Expert-choice as it is trained: the best ``capacities[step]`` of each sequence's own length, the future included."""

    looks_ahead = True

    def __init__(self, capacities: Sequence[float]):
        self.capacities = capacities

    def __call__(self, step: int, logits: Tensor, among: Taken) -> Choice:
        capacity = self.capacities[step]
        if step == 0:
            return None, among.each
        if among.each is not None:
            k = min(kept(capacity, among.length), among.each)
            best = top_k(logits.view(among.batch, among.each), k)
            first = torch.arange(among.batch, device=best.device)[:, None] * among.each
            return (best + first).flatten(), k
        whole = among.counts if among.real is None else among.real
        most = torch.tensor([kept(capacity, n) if n else 0 for n in whole.tolist()], device=logits.device)
        place, real = among.grid
        best = logits[place].masked_fill(~real, -torch.inf).sort(dim=1, descending=True, stable=True).indices
        rank = torch.empty_like(best)
        rank.scatter_(1, best, torch.arange(best.shape[1], device=best.device).expand_as(best))
        return place[(rank < most[:, None]) & real], None


class Above:
    """Those whose logit is above the step's threshold, in logits; the first step has none. Causal."""

    looks_ahead = False

    def __init__(self, thresholds: Sequence[float]):
        self.thresholds = thresholds  # of steps 1, 2, ...

    def __call__(self, step: int, logits: Tensor, among: Taken) -> Choice:
        if step == 0:
            return None, among.each
        return above(logits, self.thresholds[step - 1]).nonzero().flatten(), None


class Known:
    """Depths that are known at entry: fixed, chosen by each token, or replayed. Causal if they were found causally.

    depth: (B T,) int64, recursions of every position; or one number for all.
    """

    looks_ahead = False

    def __init__(self, depth: Tensor | int):
        self.depth = depth

    def __call__(self, step: int, logits: Tensor, among: Taken) -> Choice:
        if step == 0 or (isinstance(self.depth, int) and step < self.depth):
            return None, among.each
        if isinstance(self.depth, int):
            return among.index.new_empty(0), 0
        return (self.depth[among.index] > step).nonzero().flatten(), None


class Explored:
    """Another route, that hears the router through logistic noise.

    A gate is told what a step was worth only where it was taken. Without noise, a token that is left out once is
    left out for good (ours).

    scale: of the noise, in logits.
    """

    def __init__(self, route: Route, generator: torch.Generator, scale: float):
        self.route, self.generator, self.scale = route, generator, scale
        self.looks_ahead = route.looks_ahead

    def __call__(self, step: int, logits: Tensor, among: Taken) -> Choice:
        drawn = torch.rand(len(logits), generator=self.generator, device=self.generator.device)
        return self.route(step, logits + self.scale * drawn.logit(eps=1e-6).to(logits.device), among)


class AtRandom:
    """The control: another route, that hears random numbers instead of the router."""

    def __init__(self, route: Route, generator: torch.Generator):
        self.route, self.generator = route, generator
        self.looks_ahead = route.looks_ahead

    def __call__(self, step: int, logits: Tensor, among: Taken) -> Choice:
        drawn = torch.rand(len(logits), generator=self.generator, device=self.generator.device)
        return self.route(step, drawn.to(logits.device), among)
