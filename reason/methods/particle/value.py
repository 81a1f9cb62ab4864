"""A value head: the chance that a solution ends right, read off what the policy itself knows of it.

It costs next to nothing beside the policy, which has read the prefix already.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reason.errors import ConfigError
from reason.methods.particle.driver import Prefix
from reason.methods.particle.lineage import Node

FEATURES = 5  # that ``signs`` has


def signs(node: Node) -> list[float]:
    """What the path of a prefix says beside its state: the log-probability of a token of the last chunk, of the least likely
    chunk, and of a chunk on average, the logarithm of its steps, and whether it is finished.

    A policy knows a step that it does not believe in while it writes it, and may have forgotten it a step later.
    """
    each = [step.log_p / max(len(step.tokens), 1) for step in node.path]
    return [each[-1], min(each), sum(each) / len(each), math.log(len(each)), float(node.finished)]


class ValueHead(nn.Module):
    """What is known of prefixes (..., D + F) -> log-odds (...,) that the solution ends right.

    The first D are the policy's hidden state, the last F the ``signs`` of the path.

    Args:
        width: D.
        hidden: of its one hidden layer; 0: it is linear.
    """

    def __init__(self, width: int, hidden: int = 0):
        super().__init__()
        self.width = width
        self.norm = nn.LayerNorm(width)
        inputs = width + FEATURES
        self.body = nn.Sequential(nn.Linear(inputs, hidden), nn.GELU()) if hidden else nn.Identity()
        self.head = nn.Linear(hidden or inputs, 1)

    def forward(self, known: Tensor) -> Tensor:
        known = known.to(self.head.weight.dtype)
        state, rest = known[..., : self.width], known[..., self.width :]
        return self.head(self.body(torch.cat([self.norm(state), rest], -1)))[..., 0]

    def loss(self, batch: dict[str, Tensor]) -> dict[str, tuple[Tensor, float]]:
        """Binary cross-entropy with labels (n,) in [0, 1], and their number. batch: see ``Rollouts.batch``."""
        found = F.binary_cross_entropy_with_logits(self(batch["known"]), batch["label"], reduction="sum")
        return {"value": (found, float(len(batch["label"])))}


def known_of(prefixes: Sequence[Prefix]) -> Tensor:
    """(n, D + F) what a head reads of prefixes, whose states are there."""
    states = torch.stack([prefix.hidden for prefix in prefixes if prefix.hidden is not None])
    told = torch.tensor([signs(prefix.node) for prefix in prefixes], dtype=states.dtype)
    return torch.cat([states, told.to(states.device)], -1)


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
        if any(prefix.hidden is None for prefix in prefixes):
            raise ConfigError(
                "A value head reads the hidden states of the policy, and this one gives none.",
                "Choose another reward for a policy behind a server.",
            )
        return self.head(known_of(prefixes)).double().sigmoid().cpu().numpy()
