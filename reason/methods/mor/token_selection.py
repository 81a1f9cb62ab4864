"""Routes: which tokens take the next recursion, given the router's logits. See ``router`` for the three kinds.

A route is called as ``route(step, logits, candidates)``: step from 0; logits (n,) of the candidates, the tokens that
took the step before (all, at step 0). It returns indices (m,) int64 into the candidates, ascending, of the tokens
that take this step, and how many every sequence has where that number is the same for all. None instead of indices:
all candidates. Every token takes the first step: depth 0 is no state of these networks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from reason.methods.mor.active import ActiveTokens
from reason.methods.mor.config import MorConfig
from reason.methods.mor.flops import top_k_size
from reason.methods.mor.router import above_threshold, top_k

Choice = tuple[Tensor | None, int | None]


class Route(Protocol):
    looks_ahead: bool  # whether later tokens of a sequence may change which ones are chosen

    def __call__(self, step: int, logits: Tensor, candidates: ActiveTokens) -> Choice: ...


class TopK:
    """Expert-choice as it is trained: of each sequence the best ``capacities[step]`` of its length, later tokens included."""

    looks_ahead = True

    def __init__(self, capacities: Sequence[float]):
        self.capacities = capacities

    def __call__(self, step: int, logits: Tensor, candidates: ActiveTokens) -> Choice:
        capacity = self.capacities[step]
        if step == 0:
            return None, candidates.per_sequence
        if candidates.per_sequence is not None:
            k = min(top_k_size(capacity, candidates.length), candidates.per_sequence)
            best = top_k(logits.view(candidates.batch, candidates.per_sequence), k)
            first = torch.arange(candidates.batch, device=best.device)[:, None] * candidates.per_sequence
            return (best + first).flatten(), k
        length = candidates.counts if candidates.lengths is None else candidates.lengths
        most = torch.tensor(
            [top_k_size(capacity, n) if n else 0 for n in length.tolist()], device=logits.device
        )
        index, real = candidates.padded
        best = logits[index].masked_fill(~real, -torch.inf).sort(dim=1, descending=True, stable=True).indices
        rank = torch.empty_like(best)
        rank.scatter_(1, best, torch.arange(best.shape[1], device=best.device).expand_as(best))
        return index[(rank < most[:, None]) & real], None


class AboveThreshold:
    """Tokens whose logit is above the step's threshold, in logits; the first step has none. Causal."""

    looks_ahead = False

    def __init__(self, thresholds: Sequence[float]):
        self.thresholds = thresholds  # of steps 1, 2, ...

    def __call__(self, step: int, logits: Tensor, candidates: ActiveTokens) -> Choice:
        if step == 0:
            return None, candidates.per_sequence
        return above_threshold(logits, self.thresholds[step - 1]).nonzero().flatten(), None


class KnownDepths:
    """Depths that are known at entry: fixed, chosen by each token, or replayed. Causal if they were decided causally.

    depth: (B T,) int64, recursions of every position; or one number for all.
    """

    looks_ahead = False

    def __init__(self, depth: Tensor | int):
        self.depth = depth

    def __call__(self, step: int, logits: Tensor, candidates: ActiveTokens) -> Choice:
        if step == 0 or (isinstance(self.depth, int) and step < self.depth):
            return None, candidates.per_sequence
        if isinstance(self.depth, int):
            return candidates.index.new_empty(0), 0
        return (self.depth[candidates.index] > step).nonzero().flatten(), None


class NoisyScores:
    """Another route on router logits with logistic noise: exploration (ours).

    A gate gets a gradient only from tokens that take the step. Without noise, a token that is not chosen once
    is never chosen again.

    scale: of the noise, in logits.
    """

    def __init__(self, route: Route, generator: torch.Generator, scale: float):
        self.route, self.generator, self.scale = route, generator, scale
        self.looks_ahead = route.looks_ahead

    def __call__(self, step: int, logits: Tensor, candidates: ActiveTokens) -> Choice:
        drawn = torch.rand(len(logits), generator=self.generator, device=self.generator.device)
        return self.route(step, logits + self.scale * drawn.logit(eps=1e-6).to(logits.device), candidates)


class RandomScores:
    """The control: another route on random numbers instead of router logits."""

    def __init__(self, route: Route, generator: torch.Generator):
        self.route, self.generator = route, generator
        self.looks_ahead = route.looks_ahead

    def __call__(self, step: int, logits: Tensor, candidates: ActiveTokens) -> Choice:
        drawn = torch.rand(len(logits), generator=self.generator, device=self.generator.device)
        return self.route(step, drawn.to(logits.device), candidates)


# --- the route of an evaluation -----------------------------------------------------------------------


def evaluation_route(
    config: MorConfig, recursions: int, tokens: Tensor, thresholds: Sequence[float] | None, seed: int
) -> Route | None:
    """The route by which a model is evaluated on tokens (B, T); None: what a token-choice router chooses.

    thresholds: of steps 2 to N_r, calibrated; None: there are none yet. Validation during training then goes by
        top-k: it compares weights, and they are to spend the same depth.
    """
    if config.routing == "none" or config.route == "fixed" or recursions == 1:
        return KnownDepths(recursions)
    if config.routing == "token":
        return None
    capacities = config.shares(recursions)
    if config.routing == "random":
        return KnownDepths(random_depths(tokens, capacities, seed))
    if config.route == "topk" or thresholds is None:
        return TopK(capacities)
    return AboveThreshold([t + config.shift for t in thresholds])


def random_depths(tokens: Tensor, capacities: Sequence[float], seed: int) -> Tensor:
    """(B T,) int64 depths that are random, and yet always the same for the same token at the same position, after the
    same token.

    So random routing can be evaluated and replayed, and a text that is being generated has depths by the positions of
    its new tokens alone. A step is reached with probability ``capacities``.
    """
    position = torch.arange(tokens.shape[1], device=tokens.device)
    before = F.pad(tokens, (1, 0))[:, :-1]
    mixed = tokens
    for part in (before, position, position.new_tensor(seed)):  # an avalanche of 32 bits after each
        mixed = (mixed ^ (part + 0x9E3779B9)) * 0x85EBCA6B & 0xFFFFFFFF
        mixed = (mixed ^ (mixed >> 15)) * 0xC2B2AE35 & 0xFFFFFFFF
        mixed = mixed ^ (mixed >> 13)
    uniform = mixed.double() / 2**32  # (B, T)
    return torch.stack([(uniform < c).long() for c in capacities]).sum(0).flatten()
