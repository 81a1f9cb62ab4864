"""Routers: scoring tokens, turning scores into sets of tokens, and the losses that train routers.

Bae et al., arXiv 2507.10524, sections 2.2 and appendix. A *router* maps states to logits. A *route*
turns logits into the set of tokens that take the next recursion:

- ``top_k``: the k_r best of the tokens that took the step before, per sequence. It looks at all scores
  of a sequence, later ones too: for training and for offline comparison, never for decoding.
- ``above_threshold``: those whose logit is above the step's threshold. Causal.
- depths that are known at entry (token-choice, fixed, replay): ``depth >= r``. Causal.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Router(nn.Module):
    """Logits (..., outputs) in float32 of states (..., D). ``linear``: one product, no bias; ``mlp``: a hidden
    layer of 2D with GELU, no biases."""

    def __init__(self, width: int, outputs: int, kind: str, std: float):
        super().__init__()
        sizes = [width, outputs] if kind == "linear" else [width, 2 * width, outputs]
        layers = [nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(sizes)]
        self.layers = cast(Sequence[nn.Linear], nn.ModuleList(layers))
        for layer in self.layers:
            nn.init.normal_(layer.weight, std=std)

    def forward(self, states: Tensor) -> Tensor:
        with torch.autocast(
            states.device.type, enabled=False
        ):  # near-ties decide which tokens are computed: never in 16 bits
            x = states.float()
            for i, layer in enumerate(self.layers):
                x = F.linear(F.gelu(x) if i else x, layer.weight.float())
            return x

    @property
    def flops(self) -> int:
        """Operations of scoring one token."""
        return sum(2 * layer.weight.numel() for layer in self.layers)


def gate(logits: Tensor, kind: str, alpha: float) -> Tensor:
    """How strongly a recursion's output enters the state: alpha times sigmoid, tanh, softmax (over the last axis) or 1."""
    if kind == "sigmoid":
        return alpha * torch.sigmoid(logits)
    if kind == "tanh":
        return alpha * torch.tanh(logits)
    if kind == "softmax":
        return alpha * torch.softmax(logits, -1)
    return torch.full_like(logits, alpha)


# A logit beyond doubt.
CERTAIN = 100.0


def deepest_if_nonfinite(logits: Tensor) -> Tensor:
    """(n, m) logits, rows that are not finite replaced by the deepest choice: a broken router costs time, not text."""
    certain = torch.full_like(logits[:1], -CERTAIN)
    certain[:, -1] = CERTAIN
    return torch.where(logits.isfinite().all(-1, keepdim=True), logits, certain)


# --- scores to sets ---------------------------------------------------------------------------------


def top_k(logits: Tensor, k: int) -> Tensor:
    """(B, n) logits -> (B, k) int64: the columns of the k largest in each row, ascending.

    Ties go to the earlier column, so that rounding of equal scores never depends on the hardware. Without
    the ascending order a causal mask over the chosen tokens would let them see the future.
    """
    best = logits.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return best.sort(dim=1).values


def above_threshold(logits: Tensor, threshold: float) -> Tensor:
    """bool, as logits: above the threshold."""
    return logits > threshold


# --- losses and balance of routers --------------------------------------------------------------------------


def auxiliary_loss(logits: Tensor, chosen: Tensor) -> Tensor:
    """The auxiliary loss of expert-choice: binary cross-entropy, summed, of predicting which candidates the top-k will
    choose. Both (...), chosen bool."""
    return F.binary_cross_entropy_with_logits(logits, chosen.to(logits.dtype), reduction="sum")


def z_loss(logits: Tensor) -> Tensor:
    """Sum over tokens of the squared log-sum-exp over the last axis; of one logit, its square."""
    return torch.logsumexp(logits, -1).square().sum()


def balance_bias(bias: Tensor, load: Tensor, rate: float) -> Tensor:
    """The selection bias after a step: raised by ``rate`` where the load is below the mean, lowered above it."""
    load = load.to(bias.dtype)
    return bias + rate * torch.sign(load.mean() - load)


def max_violation(load: Tensor | Sequence[float]) -> float:
    """(largest load - mean load) / mean load: 0 where all are equal."""
    load = torch.as_tensor(load, dtype=torch.float64)
    return float((load.max() - load.mean()) / load.mean())


def normalised_entropy(load: Tensor | Sequence[float]) -> float:
    """Entropy of the shares over the largest there could be: 1 = even, 0 = one takes all. In [0, 1]."""
    share = torch.as_tensor(load, dtype=torch.float64)
    share = share / share.sum()
    if len(share) < 2:
        return 1.0
    return float(
        torch.special.entr(share).sum() / torch.log(torch.tensor(float(len(share)), dtype=torch.float64))
    )
