"""The keys of latent reasoning. Free of torch: ``show``, ``--help`` and ``--dry-run`` read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from reason.errors import ConfigError, unknown
from reason.keys import key

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
    """The paper is Tang et al., arXiv 2503.22675; its reference code has defaults of its own; "ours" is a choice of
    this platform."""

    loss: Literal["prl", "erl", "ce"] = key(
        "prl",
        "prl = progressive (paper, section 3.4); erl = ensemble (section 3.3); ce = cross-entropy of the readout",
    )
    tau: float = key(
        0.07, "softmax temperature of the item scores (reference code; the paper searches 0.05 to 5)"
    )
    alpha: float = key(
        5.0,
        "prl: ratio of the temperatures of successive steps (reference code; the paper searches 1 to 10)",
    )
    step_weight: float = key(
        1.0, "prl: weight of the cross-entropy averaged over steps 0 to K-1 (reference code)"
    )
    contrast_weight: float = key(
        1.0, "prl: weight of the contrastive loss; 0 skips it and its noisy forward pass (reference code)"
    )
    contrast_tau: float = key(
        0.1,
        "prl: temperature of the contrastive loss, in units of the similarity (ours; reference code: tau)",
    )
    similarity: Literal["cosine", "dot"] = key(
        "cosine", "prl: similarity of two states (ours); the paper's dot saturates where |r|^2 is near d"
    )
    noise: float = key(
        0.01, "prl: standard deviation of the noise added to latent inputs (reference code; paper: 0.1)"
    )
    kl_weight: float = key(
        0.05,
        "erl: weight of the KL divergence between steps (reference code; the paper finds more to be worse)",
    )
    kl_bound: float = key(
        2.0,
        "erl: KL divergence in nats up to which a pair of steps is rewarded; without a bound training diverges (ours)",
    )
    anytime: float = key(
        0.0, "weight of the cross-entropy of the readout after a randomly drawn number of steps (ours)"
    )
    readout: Literal["auto", "last", "mean"] = key(
        "auto",
        "state that scores the items: the last, or the mean of all; auto = mean for erl, else last (paper)",
    )
    step_std: float = key(
        0.02,
        "standard deviation of the step embeddings at initialization (reference code; states have norm ~sqrt(d))",
    )

    policy: Policy = key(
        "fixed",
        "what decides how many steps a request takes: fixed = depth; cos, kl, margin, overlap, entropy = a "
        "stopping test; router = a learned router",
        evaluation=True,
    )
    threshold: float | None = key(
        None,
        "threshold of the stopping test, in its own units; null = fitted on validation data",
        evaluation=True,
    )
    mean_depth: float | None = key(
        None,
        "latent steps to spend on average; null = halfway between the fewest and the most",
        evaluation=True,
    )
    min_depth: int = key(
        1, "latent steps to take before the stopping test is first applied (ours)", evaluation=True
    )
    deadline_ms: float = key(
        0.0,
        "time limit for a request in milliseconds; caps the depth by latencies measured on this machine; 0 = none",
        evaluation=True,
    )
    shortlist: int = key(
        200,
        "number of top items of step 0 that the tests margin, overlap, entropy and kl look at (ours)",
        evaluation=True,
    )
    features: str = key(
        ",".join(FEATURES),
        "features of a request that the router reads, separated by commas (ours)",
        evaluation=True,
    )

    def __post_init__(self):
        self._check_policy()
        for name in ("tau", "alpha", "contrast_tau", "kl_bound"):
            if getattr(self, name) <= 0:
                raise ValueError(f"latent.{name} is {getattr(self, name)}; it must be above 0.")
        for name in ("step_weight", "contrast_weight", "noise", "kl_weight", "anytime", "step_std"):
            if getattr(self, name) < 0:
                raise ValueError(f"latent.{name} is {getattr(self, name)}; it must not be below 0.")

    def settle(self, config: Any, origin: Mapping[str, str]) -> None:
        """Refuse a budget that no threshold meets; with a policy or a deadline evaluate ``depth`` alone, its cap."""
        if self.policy != "fixed" or self.deadline_ms:
            self._drop_curve(config, origin)
        if self.policy == "fixed":
            self._drop_budget(origin)
        else:
            self._check_budget(config.depth)

    def _drop_curve(self, config: Any, origin: Mapping[str, str]) -> None:
        """Below its cap a policy is another policy."""
        if config.eval.curve and origin.get("eval.curve") == "command line":
            raise ConfigError(
                "eval.curve=true asks for every depth, but a policy or a deadline decides the depth itself.",
                "Leave it out; a run with latent.policy=fixed has the curve.",
            )
        config.eval.curve = False

    def _drop_budget(self, origin: Mapping[str, str]) -> None:
        """A recorded policy that is being replaced leaves its budget behind; nobody may set one for nothing."""
        for name in ("threshold", "mean_depth"):
            if getattr(self, name) is not None and origin.get(f"latent.{name}") != "recorded run":
                raise ConfigError(
                    f"latent.{name} is set, but latent.policy=fixed does not read it.",
                    f"Choose a policy: latent.policy=cos, or {', '.join(list(THRESHOLDS)[1:])}, router.",
                )
            setattr(self, name, None)

    def _check_budget(self, depth: int) -> None:
        least = self.first_test(depth)
        if self.mean_depth is not None and not least <= self.mean_depth <= depth:
            raise ConfigError(
                f"latent.mean_depth={self.mean_depth:g} cannot be spent: a request takes {least} to {depth} steps.",
                f"Set it between {least} and {depth}, or change depth or latent.min_depth.",
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
