"""Multiply-adds of Mixture-of-Recursions, counted twice: as the paper counts, and as they are executed.

The paper (Bae et al., arXiv 2507.10524, appendix; the accounting that gives its step counts) counts a
forward pass, takes K and V for as wide as the states, and leaves out embedding, head, router and norms.
``executed`` leaves out only norms and pointwise functions; benchmarks hold measured times against it.
All numbers are floating-point operations: a multiply-add is two. Free of torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class DecoderFlops:
    """FLOPs of the parts of a decoder with a looped block, by its sizes."""

    width: int  # D
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int  # F, inner width of SwiGLU
    vocab: int
    block: int  # b, layers that are looped
    ends: int  # layers that run once: 2 with private ends, else 0
    lora: int = 0  # rank of the correction of each use of a looped layer

    @property
    def layer(self) -> int:
        """Of one token through the linear maps of one layer, without attention to keys."""
        q = 2 * self.width * self.heads * self.head_dim
        return 2 * q + self.keys_values + 6 * self.width * self.ffn

    @property
    def keys_values(self) -> int:
        return 2 * 2 * self.width * self.kv_heads * self.head_dim

    @property
    def correction(self) -> int:
        """Of one token through the corrections of a looped layer: two thin products for each linear map."""
        q, inner = self.heads * self.head_dim, (self.width, self.ffn)
        sides = [(self.width, q), (q, self.width), inner, inner, inner]
        return self.keys_values_correction + sum(2 * min(self.lora, *pair) * sum(pair) for pair in sides)

    @property
    def keys_values_correction(self) -> int:
        pair = (self.width, 2 * self.kv_heads * self.head_dim)
        return 2 * min(self.lora, *pair) * sum(pair)

    @property
    def pair(self) -> int:
        """Of one query attending to one key and its value."""
        return 4 * self.heads * self.head_dim

    @property
    def head(self) -> int:
        return 2 * self.width * self.vocab

    @property
    def parameters(self) -> int:
        """Outside embedding, head and routers: layers that exist, each with two norms, and the last norm. A model without
        a loop has them all in ``block``."""
        heads, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        layer = 2 * self.width * (heads + keys) + 3 * self.width * self.ffn + 2 * self.width
        return (self.block + self.ends) * layer + self.width


# --- as the paper counts ----------------------------------------------------------------------------


def published(
    width: int, ffn: int, context: int, *, ends: int, block: int, capacities: Sequence[float], shared: bool = False
) -> float:  # fmt: skip
    """Forward operations of one token: Phi of the paper's accounting.

    capacities: c_1..c_Nr; all ones give the plain recursive model, a single one with ``block`` unique
        layers the vanilla one. shared: K and V of the first step serve all.
    """
    steps = ends + block * sum(capacities)  # layers that a token runs through on average
    reach = steps if shared else ends + block * sum(c * c for c in capacities)
    total = steps * 2 * (4 * width**2 + 3 * width * ffn) + reach * 2 * width * context
    if shared:
        total -= block * sum(capacities[1:]) * 2 * 2 * width**2
    return total


def steps_within(budget: float, per_token: float, tokens_per_step: int) -> float:
    """Optimiser steps whose forward passes cost ``budget`` operations."""
    return budget / (per_token * tokens_per_step)


# --- as they are executed ---------------------------------------------------------------------------


def executed(
    sizes: DecoderFlops, context: int, counts: Sequence[int], *, kv_mode: str = "recursion", router: int = 0, head: bool = True
) -> float:  # fmt: skip
    """Forward operations of one sequence of ``context`` tokens, of which ``counts[r]`` take step r + 1.

    Attention is counted by the pairs that the causal mask admits. kv_mode: which keys later steps attend to (``visible_keys.KV_MODES``):
    except for "recursion", those of all earlier tokens; with "sharing" they compute no K and V, and with "propagate" also those of
    the tokens that have just exited. router: operations of scoring one token once; the tokens that took step r
    are scored for the next one.
    """
    whole, looped = context * (context + 1) // 2, sizes.layer + sizes.correction
    total = float(sizes.ends * (context * sizes.layer + whole * sizes.pair))
    for r, k in enumerate(counts):
        # Which positions stay active is not known here: on average they see half of the text.
        reach = k if kv_mode == "recursion" or not r else context
        computed = 0  # tokens whose K and V this step computes beyond (or short of) the k that take it
        if r and kv_mode == "sharing":
            computed = -k
        elif r and kv_mode == "propagate":
            computed = counts[r - 1] - k
        keys_values = sizes.keys_values + sizes.keys_values_correction
        total += sizes.block * (k * looped + computed * keys_values + k * (reach + 1) / 2 * sizes.pair)
    total += router * sum([context, *counts][: len(counts)])
    return total + (context * sizes.head if head else 0)


# --- capacities -------------------------------------------------------------------------------------


def balanced(recursions: int) -> list[float]:
    """The paper's capacities: (N_r - r + 1) / N_r, as if depths were uniform."""
    return [(recursions - r) / recursions for r in range(recursions)]


def top_k_size(capacity: float, tokens: int) -> int:
    """k_r = max(1, floor(c_r T)), of the whole length, however many tokens the step before kept."""
    return max(1, math.floor(capacity * tokens + 1e-9))


def warmup_capacity(capacity: float, step: int, steps: int) -> float:
    """Capacity during a cosine warm-up from 1 over ``steps`` optimiser steps; 0 = none."""
    if steps <= 0 or step >= steps:
        return capacity
    return capacity + (1 - capacity) * 0.5 * (1 + math.cos(math.pi * step / steps))
