"""The keys of latent reasoning. Free of torch: ``show``, ``--help`` and ``--dry-run`` read it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass
class LatentConfig:
    """Sources: [P] Tang et al., arXiv 2503.22675; [C] its reference code; "ours" is a choice of this platform."""

    loss: Literal["prl", "erl", "ce"] = (
        "prl"  # progressive [P 3.4] | ensemble [P 3.3] | cross-entropy on the readout
    )
    tau: float = 0.07  # temperature of the answer's softmax, in score units ([C]; [P] searches 0.05..5)
    alpha: float = 5.0  # prl: temperature ratio of one step to the next ([C]; [P] searches 1..10)
    step_weight: float = 1.0  # prl: weight of the mean cross-entropy of steps 0..K-1 ([C])
    contrast_weight: float = (
        1.0  # prl: weight of the contrastive term; 0 leaves it and the noisy branch out ([C])
    )
    contrast_tau: float = 0.1  # prl: temperature of the contrast, in units of the similarity (ours; [C]: tau)
    similarity: Literal["cosine", "dot"] = (
        "cosine"  # prl: of two states (ours); dot is [P]'s, near saturation at |r|^2 = d
    )
    noise: float = 0.01  # prl: standard deviation of the noise on latent inputs ([C]; [P] says 0.1)
    kl_weight: float = 0.05  # erl: weight of the diversity between steps ([C]; [P]: worse above 0.05)
    kl_bound: float = (
        2.0  # erl: nats, the most that a pair of steps is rewarded for; [C] has no bound and diverges
    )
    anytime: float = 0.0  # weight of cross-entropy on the readout after a random number of steps (ours)
    readout: Literal["auto", "last", "mean"] = (
        "auto"  # state that answers: last, mean of all, auto = mean for erl ([P])
    )
    step_std: float = (
        0.02  # initial standard deviation of the step positions ([C]; states have norm ~sqrt(d))
    )

    def __post_init__(self):
        for key in ("tau", "alpha", "contrast_tau", "kl_bound"):
            if getattr(self, key) <= 0:
                raise ValueError(f"latent.{key} is {getattr(self, key)}; it must be above 0.")
        for key in ("step_weight", "contrast_weight", "noise", "kl_weight", "anytime", "step_std"):
            if getattr(self, key) < 0:
                raise ValueError(f"latent.{key} is {getattr(self, key)}; it must not be below 0.")
