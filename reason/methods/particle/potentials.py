"""From rewards to weights: what one step multiplies the weight of a particle by.

Five definitions are in circulation and have different targets (Puri et al., arXiv 2502.01618: the text, the pseudocode
and the code of the paper use three of them):

    prob            log r_t                         each step must be accepted, with probability r_t
    exp             r_t                             the pseudocode's softmax of raw rewards
    logit           logit r_t                       the authors' code: odds
    ratio           log r_t - log r_(t-1)           r_t is a value, the chance of ending right: evidence counts once
    self_certainty  logit of exp(mean log p)        no reward: the policy's own probabilities of the chunk

Each is divided by a temperature, which is 1 where rewards are taken at their word. A finished particle is not
weighed again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from reason.errors import ConfigError, unknown
from reason.methods.particle.lineage import Node

KINDS = ("prob", "exp", "logit", "ratio", "self_certainty")
SUREST = 1e-7  # a reward of 1 has finite odds, whatever the clip
CLIP = 1e-4  # no reward is surer than this: one score moves a weight by 9.2 nats at most


@dataclass(frozen=True)
class Potential:
    """The log-potential of a step.

    kind: one of ``KINDS``. temperature: what it is divided by. clip: rewards closer to 0 or 1 than this are moved to
    it; with 0, a reward of 0 ends a particle. prior: r_0 of ``ratio``.
    """

    kind: str = "ratio"
    temperature: float = 1.0
    clip: float = CLIP
    prior: float = 1.0

    def __post_init__(self):
        if self.kind not in KINDS:
            raise unknown("potential", self.kind, KINDS)

    def __call__(self, node: Node) -> float:
        """Log-potential of the last step of ``node``."""
        return self.base(node) / self.temperature

    def base(self, node: Node) -> float:
        """At temperature 1."""
        if self.kind == "self_certainty":
            if math.isnan(node.log_p):
                raise ConfigError(
                    "The potential self_certainty needs the probabilities of the policy's tokens, and its server tells none.",
                    "Use a server that gives logprobs, or another potential.",
                )
            return self._logit(math.exp(node.log_p / max(len(node.tokens), 1)))
        reward = node.reward
        if not 0 <= reward <= 1:  # NaN too
            raise ValueError(f"A reward of {reward} at step {node.step}; it must lie between 0 and 1.")
        if self.kind == "exp":
            return reward
        if self.kind == "logit":
            return self._logit(reward)
        log_r = self._log(reward)
        if self.kind == "prob" or log_r == -math.inf:
            return log_r
        parent = node.parent
        assert parent is not None
        before = parent.reward if parent.parent is not None else self.prior
        return log_r - self._log(before)

    def path(self, node: Node) -> float:
        """Log-potential of the whole path, at temperature 1."""
        return sum(self.base(step) for step in node.path)

    def _log(self, r: float) -> float:
        r = max(r, self.clip)
        return math.log(r) if r > 0 else -math.inf

    def _logit(self, r: float) -> float:
        r = min(max(r, self.clip), 1 - max(self.clip, SUREST))
        return math.log(r) - math.log1p(-r) if r > 0 else -math.inf


def annealing(schedule: str, weights: np.ndarray, progress: float) -> float:
    """The temperature, at least 1, by which weights are flattened before resampling: entropic particle filtering.

    Early scores are too sure, and a population that collapses on them does not recover; so weights that have
    collapsed (ESS below N / 2) in the first half of a solution are flattened (Giannone et al., arXiv 2510.05825; the three
    schedules as in its_hub).

    Args:
        schedule: "ess", "entropy" or "base".
        weights: (N,), normalised.
        progress: share of the solution that is written, as far as is known.
    """
    from reason.methods.particle.resampling import effective_size, normalized_entropy

    n, ess = len(weights), effective_size(weights)
    if ess >= n / 2 or progress >= 0.5 or n == 1:
        return 1.0
    if schedule == "ess":
        return max(1.0, n / ess * (1 - progress))
    if schedule == "entropy":
        entropy = normalized_entropy(weights)
        return max(1.0, 1 / (entropy + (1 - entropy) * progress))
    if schedule == "base":
        return max(1.0, 2 - progress)
    raise unknown("annealing schedule", schedule, ("ess", "entropy", "base"))
