"""Outcomes of a routed pass: loss, correctness and depth of every token, their sums over documents, and what it cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from reason.methods.mor.flops import DecoderFlops, executed
from reason.methods.mor.network import MixtureOfRecursions, RoutedOutput
from reason.methods.mor.trace import fallback_tokens
from reason.metrics.language import TokenOutcomes, document_columns, sum_by_document, token_outcomes


@dataclass
class RoutedOutcomes(TokenOutcomes):
    """``TokenOutcomes``, and how each token was routed."""

    depth: np.ndarray  # (B, T) int64, recursions; 0 at padding
    fallback: np.ndarray  # (B, T) bool, an output of a router was not finite, and the token ran at full depth

    @classmethod
    def empty(cls) -> RoutedOutcomes:
        """Of no windows."""
        none = (0, 0)
        return cls(np.zeros(none), np.zeros(none, bool), np.zeros(none, np.int64), np.zeros(none, bool))


@torch.no_grad()
def routed_outcomes(model: MixtureOfRecursions, routed: RoutedOutput, targets: Tensor) -> RoutedOutcomes:
    """Outcomes of a forward pass. targets: (B, T) with -100 where there is none."""
    found = token_outcomes(model.read(routed.states), targets, model.decoder.logits)
    depth, fallback = (x.cpu().numpy() for x in (routed.depth, fallback_tokens(routed)))
    return RoutedOutcomes(found.nll, found.correct, depth, fallback)


@torch.no_grad()
def token_nll(model: MixtureOfRecursions, states: Tensor, targets: Tensor) -> np.ndarray:
    """(B, T) float64, nats, 0 where there is no target: of states (B, T, D) after the loop."""
    return token_outcomes(model.read(states), targets, model.decoder.logits).nll


def routed_columns(
    outcomes: RoutedOutcomes,
    batch: Mapping[str, Tensor],
    documents: int,
    recursions: int,
    levels: Sequence[int],
) -> dict[str, np.ndarray]:
    """``document_columns``, and of each document: at_1, at_2 ..., tokens that exited after so many recursions; tokens;
    fallbacks; depth_used, the mean recursions of its tokens. With levels: depth_L, the sum of depths over targets of level
    L; easy_at_R and hard_at_R, targets of level 0 and of the others that took R recursions."""
    case, level = batch["case"].numpy(), batch["level"].numpy()
    target, depth = (batch["targets"] >= 0).numpy(), outcomes.depth

    def total(values: np.ndarray) -> np.ndarray:
        return sum_by_document(values, case, documents)

    columns = document_columns(outcomes, batch, documents, levels)
    steps = range(1, recursions + 1)
    columns |= {f"at_{r}": total(depth == r) for r in steps}
    columns |= {"tokens": total(depth > 0), "fallbacks": total(outcomes.fallback)}
    columns["depth_used"] = total(depth) / np.maximum(columns["tokens"], 1)
    columns |= {f"depth_{n}": total(depth * (target & (level == n))) for n in levels}
    for r in steps if levels else ():
        columns[f"easy_at_{r}"] = total((depth == r) & target & (level == 0))
        columns[f"hard_at_{r}"] = total((depth == r) & target & (level > 0))
    return columns


# --- cost ---------------------------------------------------------------------------------------------


def decoder_flops(network: MixtureOfRecursions) -> DecoderFlops:
    """What FLOP accounting needs to know of a network."""
    s, sharing = network.decoder.shape, network.decoder.sharing
    lora = network.config.lora if network.decoder.corrections is not None else 0
    return DecoderFlops(
        s.hidden, s.heads, s.kv_heads, s.head_dim, s.ffn, s.vocab, sharing.block, sharing.ends, lora
    )


def forward_flops(model: MixtureOfRecursions, flops: DecoderFlops, depth: np.ndarray) -> float:
    """Operations of a forward pass, sequence by sequence, by the recursions (B, T) that each token took; 0 at padding."""
    router = sum(routers[0].flops for routers in (model.by_step, model.foreseers) if routers)
    total = 0.0
    for row in depth:
        length = int((row > 0).sum())
        if length:
            counts = [int((row > r).sum()) for r in range(int(row.max()))]
            total += executed(flops, length, counts, kv_mode=model.config.kv_mode, router=router)
            if model.by_token is not None:
                total += length * model.by_token.flops
    return total
