"""The keys of latent reasoning. Free of torch: ``show``, ``--help`` and ``--dry-run`` read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from reason.errors import ConfigError, unknown
from reason.methods.base import evaluation_key

Policy = Literal["fixed", "cos", "kl", "margin", "overlap", "entropy", "router"]
FEATURES = ("history", "distinct", "popularity", "norm", "entropy", "margin")

# Of each stop test: the thresholds that can do something lie strictly between two numbers; whether a request stops
# once the measure has risen to the threshold (else: fallen to it); what is measured.
THRESHOLDS = {
    "cos": (-1.0, 1.0, True, "cosine of the last two states"),
    "kl": (0.0, float("inf"), False, "nats from the answers of the step before to these"),
    "margin": (0.0, 1.0, True, "probability of the first item less that of the second"),
    "overlap": (0.0, 1.0 + 1e-9, True, "share of the ten items that stayed"),
    "entropy": (0.0, 1.0, False, "entropy of the answers, as a share of the largest there could be"),
}


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

    policy: Policy = evaluation_key("fixed")  # who decides the depth: nobody, a stop test, or a router
    threshold: float | None = evaluation_key(None)  # of the stop test, in its units; null = fitted
    mean_depth: float | None = evaluation_key(None)  # latent steps to spend on average; null = the middle
    min_depth: int = evaluation_key(1)  # latent steps taken before a stop test is asked (ours)
    deadline_ms: float = evaluation_key(
        0.0
    )  # most a request may take: caps the depth by times measured here; 0 = none
    shortlist: int = evaluation_key(200)  # items of step 0 that tests of the answer look at (ours)
    features: str = evaluation_key(",".join(FEATURES))  # of a request, that the router reads, by comma (ours)

    def __post_init__(self):
        self._check_policy()
        for key in ("tau", "alpha", "contrast_tau", "kl_bound"):
            if getattr(self, key) <= 0:
                raise ValueError(f"latent.{key} is {getattr(self, key)}; it must be above 0.")
        for key in ("step_weight", "contrast_weight", "noise", "kl_weight", "anytime", "step_std"):
            if getattr(self, key) < 0:
                raise ValueError(f"latent.{key} is {getattr(self, key)}; it must not be below 0.")

    def settle(self, config: Any, origin: Mapping[str, str]) -> None:
        """Refuse a budget that no threshold meets; with a policy or a deadline judge at ``depth`` alone, its cap."""
        if self.policy != "fixed" or self.deadline_ms:
            if config.eval.curve and origin.get("eval.curve") == "command line":
                raise ConfigError(
                    "eval.curve=true asks for every depth, and a policy decides depths itself.",
                    "Leave it out; a run with latent.policy=fixed has the curve.",
                )
            config.eval.curve = False  # below its cap a policy is another policy
        if self.policy == "fixed":
            for key in ("threshold", "mean_depth"):
                if getattr(self, key) is not None and origin.get(f"latent.{key}") != "recorded run":
                    raise ConfigError(
                        f"latent.{key} is set, and latent.policy=fixed does not read it.",
                        f"Choose a policy: latent.policy=cos, or {', '.join(list(THRESHOLDS)[1:])}, router.",
                    )
                setattr(self, key, None)  # of a recorded policy that is being replaced
            return
        least = self.first_test(config.depth)
        if self.mean_depth is not None and not least <= self.mean_depth <= config.depth:
            raise ConfigError(
                f"latent.mean_depth={self.mean_depth:g} cannot be spent: a request takes {least} to {config.depth} steps.",
                f"Set it between {least} and {config.depth}, or change depth or latent.min_depth.",
            )

    def _check_policy(self) -> None:
        if self.min_depth < 0 or self.shortlist < 20 or not 0 <= self.deadline_ms < float("inf"):
            raise ConfigError(
                f"latent.min_depth={self.min_depth}, latent.shortlist={self.shortlist}, latent.deadline_ms={self.deadline_ms:g}.",
                "min_depth and deadline_ms are 0 or more, a shortlist holds 20 items or more.",
            )
        for name in self.feature_names:
            if name not in FEATURES:
                error = unknown("router feature", name, FEATURES)
                error.hint += " A router reads only what is known before the answer."
                raise error
        if not self.feature_names:
            raise ConfigError(
                "latent.features is empty: a router that sees nothing cannot decide.",
                f"Choose from {', '.join(FEATURES)}.",
            )
        if self.threshold is None or self.policy == "fixed":
            return
        if self.mean_depth is not None:
            raise ConfigError(
                "latent.threshold and latent.mean_depth are both set.",
                "The second fits the first: leave one out.",
            )
        if self.policy == "router":
            raise ConfigError(
                "latent.threshold means nothing to the router, whose score is fitted.",
                "Say what it may spend instead: latent.mean_depth=1",
            )
        low, high, rises, meaning = THRESHOLDS[self.policy]
        if low < self.threshold < high:
            return
        never = (self.threshold >= high) == rises
        raise ConfigError(
            f"latent.threshold={self.threshold:g} would {'never' if never else 'always'} stop a request: "
            f"{self.policy} is the {meaning}, and it stops when that has {'risen' if rises else 'fallen'} to the threshold.",
            f"Set it between {low:g} and {high:g}, or leave it out and set latent.mean_depth.",
        )

    def first_test(self, depth: int) -> int:
        """The steps after which the policy is first asked: 0 for the router; what compares two steps needs one."""
        if self.policy == "router":
            return 0
        return min(max(self.min_depth, int(self.policy in ("cos", "kl", "overlap"))), depth)

    @property
    def feature_names(self) -> list[str]:
        return [name.strip() for name in self.features.split(",") if name.strip()]
