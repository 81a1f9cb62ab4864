"""A value head: the chance that a solution ends right, read off the policy's own hidden state.

It costs next to nothing beside the policy, which has read the prefix already.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reason.errors import ConfigError
from reason.methods.particle.driver import Prefix


class ValueHead(nn.Module):
    """Hidden states (..., D) -> log-odds (...,) that the solution ends right.

    Args:
        width: D.
        hidden: of its one hidden layer; 0: it is linear.
    """

    def __init__(self, width: int, hidden: int = 0):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.body = nn.Sequential(nn.Linear(width, hidden), nn.GELU()) if hidden else nn.Identity()
        self.head = nn.Linear(hidden or width, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.head(self.body(self.norm(hidden.to(self.head.weight.dtype))))[..., 0]

    def loss(self, batch: dict[str, Tensor]) -> dict[str, tuple[Tensor, float]]:
        """Binary cross-entropy with labels (n,) in [0, 1], and their number. batch: see ``Rollouts.batch``."""
        found = F.binary_cross_entropy_with_logits(self(batch["hidden"]), batch["label"], reduction="sum")
        return {"value": (found, float(len(batch["label"])))}


class Value:
    """A value head as a reward.

    Args:
        head: trained.
        seen: fingerprints of the problems that it was trained on.

    Raises:
        ConfigError: when called, where the policy gives no hidden states.
    """

    def __init__(self, head: ValueHead, seen: Iterable[str] = ()):
        self.head, self.seen = head.eval(), frozenset(seen)

    @torch.inference_mode()
    def __call__(self, prefixes: Sequence[Prefix]) -> np.ndarray:
        """(n,)"""
        if not prefixes:
            return np.zeros(0)
        states = [prefix.hidden for prefix in prefixes if prefix.hidden is not None]
        if len(states) < len(prefixes):
            raise ConfigError(
                "A value head reads the hidden states of the policy, and this one gives none.",
                "Choose another reward for a policy behind a server.",
            )
        hidden = torch.stack(states)
        return self.head(hidden.to(self.head.head.weight.device)).double().sigmoid().cpu().numpy()
