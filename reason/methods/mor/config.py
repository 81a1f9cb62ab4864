"""The keys of Mixture-of-Recursions. Free of torch: ``show``, ``--help`` and ``--dry-run`` read it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from reason.backbones.sharing import Sharing
from reason.errors import ConfigError
from reason.keys import key
from reason.methods.mor.flops import balanced

Routing = Literal["expert", "token", "random", "none"]
Route = Literal["auto", "threshold", "token", "fixed", "topk"]
KV = Literal["recursion", "sharing", "hybrid"]
Gate = Literal["auto", "sigmoid", "tanh", "softmax", "none"]
Combine = Literal["auto", "paper", "delta", "replace"]
Init = Literal["stepwise", "average", "lower", "upper", "random"]
Profile = Literal["default", "economy", "max"]
Gap = Literal["trained", "skip", "share_first", "hybrid", "deepest", "propagate"]


@dataclass
class MorConfig:
    """The paper is Bae et al., arXiv 2507.10524; its reference code has defaults of its own; "ours" is a choice of
    this platform. Keys that begin with "source" or "expert" are read with a backbone.source or that routing only."""

    routing: Routing = key(
        "expert",
        "expert = each recursion chooses its tokens; token = each token chooses its depth; random = depths drawn "
        "at random; none = every token takes every recursion (paper, section 2.2)",
    )
    router: Literal["linear", "mlp"] = key(
        "linear",
        "network that scores a token; mlp has one hidden layer of width 2D (paper and reference code)",
    )
    gate: Gate = key(
        "auto",
        "how a router score scales a recursion's output; auto = sigmoid for expert, softmax for token (reference code)",
    )
    alpha: float = key(
        0.0,
        "factor of the gate; 0 = 0.1 for expert and 1 for token (reference code), or with a source whatever makes "
        "the gate 1 at initialization (ours)",
    )
    combine: Combine = key(
        "auto",
        "state after a recursion f with gate g: paper = x + g f(x); delta = x + g (f(x) - x); replace = f(x); auto = "
        "paper from scratch, delta with a source, whose activations paper would rescale (ours)",
    )
    capacities: str = key(
        "",
        "fraction of all tokens that each recursion processes, separated by commas; empty = 1, (N-1)/N, ..., 1/N "
        "for N recursions (paper)",
    )
    capacity_warmup: int = key(
        0,
        "optimizer steps over which capacities fall from 1 and aux_weight rises from 0; 0 = none, which the paper "
        "found better from scratch",
    )
    explore: float = key(
        0.0,
        "expert: scale of the noise added to router logits when tokens are selected in training; falls to 0 at "
        "60% of it; try 1 with aux=none (ours)",
    )
    elastic: float = key(
        0.0,
        "expert: fraction of steps with randomly drawn capacities, so that depth can be changed later (ours)",
    )
    exit_weight: float = key(
        0.0, "weight of the loss after a randomly drawn recursion, so that every depth can predict (ours)"
    )

    aux: Literal["loss", "router", "none"] = key(
        "loss",
        "expert: how top-k selection is predicted without looking at future tokens: loss = auxiliary loss on the "
        "router; router = a second, auxiliary router (paper)",
    )
    aux_weight: float = key(
        0.01, "weight of that binary cross-entropy, summed over recursions (paper: 0.001)"
    )
    balance: Literal["loss", "bias", "none"] = key(
        "loss",
        "token: how the load of the depths is balanced; bias = without a loss, by a selection bias (paper)",
    )
    balance_weight: float = key(0.1, "token: weight of the balancing loss (reference code)")
    balance_rate: float = key(0.001, "token: change of the selection bias per optimizer step (paper)")
    z_weight: float = key(
        0.0, "weight of the router z-loss, the squared log-sum-exp of its logits (paper: 0 for linear)"
    )

    init: Init = key(
        "stepwise",
        "source: which of its layers initialize the shared block: stepwise = evenly spaced; average = the mean of "
        "those that each stands for; lower; upper; random (reference code)",
    )
    lora: int = key(
        0,
        "rank of the LoRA weights that each use of a shared layer has of its own; 0 = none (arXiv 2410.20672)",
    )
    distil: float = key(
        0.0, "source: weight of the distillation loss KL(source || model) over next tokens (arXiv 2410.20672)"
    )

    kv: KV = key(
        "recursion",
        "keys and values that a recursion attends to: recursion = of the tokens that take it; sharing = of the "
        "first recursion; hybrid = its own where they exist, else the first's (paper, section 2.3)",
    )

    route: Route = key(
        "auto",
        "how depth is decided in evaluation; auto = threshold for expert, token for token, else fixed",
        evaluation=True,
    )
    mean_depth: float | None = key(
        None, "recursions to spend per token on average; null = as trained", evaluation=True
    )
    shift: float = key(0.0, "amount added to every threshold, in logits (ours)", evaluation=True)
    profile: Profile = key(
        "default",
        "default = thresholds as calibrated; economy = for a mean depth halfway to one recursion; max = every "
        "recursion (ours)",
        evaluation=True,
    )
    gap: Gap = key(
        "trained",
        "keys and values that stand in for tokens that have left: trained = as kv says; skip = none; share_first = of "
        "the first recursion, for all tokens; hybrid = of the first; deepest = of the last that they took; propagate = "
        "made from the state that they left with",
        evaluation=True,
    )
    force: bool = key(
        False, "evaluate with other keys and values than the model was trained with", evaluation=True
    )
    audit: float = key(
        0.05, "fraction of documents evaluated again at full depth, to find misrouted tokens", evaluation=True
    )
    record: bool = key(
        False,
        "predict: log each request to audit.jsonl, so that it can be replayed exactly (ours)",
        evaluation=True,
    )
    guard: bool = key(
        False,
        "predict: switch to a safer profile when depths drift from those on validation data (ours)",
        evaluation=True,
    )

    def __post_init__(self):
        for name in (
            "alpha", "capacity_warmup", "exit_weight", "aux_weight", "balance_weight", "balance_rate", "z_weight",
            "lora", "distil", "explore",
        ):  # fmt: skip
            if getattr(self, name) < 0:
                raise ConfigError(f"mor.{name} is {getattr(self, name)}; it must not be below 0.")
        for name in ("elastic", "audit"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"mor.{name} is {getattr(self, name)}; it is a fraction, from 0 to 1.")
        if self.explore and self.routing != "expert":
            raise ConfigError(
                f"mor.explore={self.explore:g} is noise on the choice that a recursion makes; with "
                f"mor.routing={self.routing} none does.",
                "Use mor.routing=expert, or leave mor.explore out.",
            )
        if self.gate == "softmax" and self.routing != "token":
            raise ConfigError(
                "mor.gate=softmax compares the depths a token may choose; an expert-choice router scores one step at a time.",
                "Use mor.gate=sigmoid, or mor.routing=token.",
            )
        self._listed()

    def settle(self, config: Any, origin: Mapping[str, str]) -> None:
        """Refuse what does not fit the number of recursions or the sharing of layers, before anything is loaded."""
        if not config.backbone.source:  # a source has layers of its own
            Sharing(config.backbone.sharing, config.backbone.layers, max(config.train_depth, 1))
        for rule in RULES if config.train_depth else BASE_RULES:
            rule(self, config, origin)

    def resolved(self, source: bool, recursions: int) -> MorConfig:
        """These keys with "auto" and 0 of ``gate``, ``alpha`` and ``combine`` replaced by what they stand for.

        source: whether weights are those of a model that works. Its routers begin at zero, and scales are such that
        g is 1 then: at full depth the network begins as the plain recursive one.
        """
        token = self.routing == "token"
        gate = self.gate if self.gate != "auto" else "softmax" if token else "sigmoid"
        if source:  # softmax and sigmoid of zeros are 1 / N_r and 1 / 2
            alpha = {"softmax": float(recursions), "sigmoid": 2.0}.get(gate, 1.0)
        else:
            alpha = 1.0 if token else 0.1
        combine = self.combine if self.combine != "auto" else "delta" if source else "paper"
        return replace(self, gate=gate, alpha=self.alpha or alpha, combine=combine)

    @property
    def kv_mode(self) -> str:
        """What a token sees when the model is judged."""
        return {"trained": self.kv, "skip": "recursion", "share_first": "sharing"}.get(self.gap, self.gap)

    def shares(self, recursions: int) -> list[float]:
        """c_1 .. c_Nr: the share of all tokens that each recursion keeps.

        Raises:
            ConfigError: another number of capacities than recursions.
        """
        listed = self._listed() or balanced(recursions)
        if len(listed) != recursions:
            usual = ",".join(f"{c:.3g}" for c in balanced(recursions))
            swept = (
                f"; in a sweep, where commas part values: mor.capacities=[{usual}]"
                if len(listed) == 1
                else ""
            )
            raise ConfigError(
                f"mor.capacities has {len(listed)} share{'s' * (len(listed) != 1)} for {recursions} recursions.",
                f"For example: mor.capacities={usual}{swept}",
            )
        return listed

    def _listed(self) -> list[float]:
        try:
            listed = [float(word) for word in self.capacities.split(",") if word.strip()]
        except ValueError:
            raise ConfigError(
                f"mor.capacities={self.capacities} is not a list of numbers.",
                "For example: mor.capacities=1,0.5",
            ) from None
        if not listed:
            return []
        if not all(0 < c <= 1 for c in listed):
            raise ConfigError(
                f"mor.capacities={self.capacities}: a capacity is above 0 and at most 1.",
                "A recursion that nobody takes is one fewer: lower train_depth.",
            )
        if listed[0] != 1:
            falling = sorted(listed, reverse=True)
            raise ConfigError(
                f"mor.capacities={self.capacities}: every token takes the first recursion.",
                f"Begin with 1: mor.capacities={','.join(f'{c:g}' for c in [1.0, *falling[1:]])}",
            )
        if any(b > a for a, b in itertools.pairwise(listed)):
            raise ConfigError(
                f"mor.capacities={self.capacities} rises: only a token that took a recursion can take the next.",
                f"Never rising: mor.capacities={','.join(f'{c:g}' for c in sorted(listed, reverse=True))}",
            )
        return listed


# --- rules over the whole configuration: each refuses one thing --------------------------------------------

Origin = Mapping[str, str]  # the layer that set each key


def no_depth_to_spend(mor: MorConfig, config: Any, origin: Origin) -> None:
    """The base takes no recursions: how depth is spent cannot be asked for. A recorded run may still say so."""
    for name in ("mean_depth", "profile", "shift", "gap"):
        if origin.get(f"mor.{name}") == "command line":
            raise ConfigError(
                f"mor.{name} says how depth is spent, and train_depth=0 is the base, which has none to spend.",
                f"Leave mor.{name} out, or name a run with recursions.",
            )


def distillation_needs_a_source(mor: MorConfig, config: Any, origin: Origin) -> None:
    if mor.distil and not config.backbone.source:
        raise ConfigError(
            f"mor.distil={mor.distil:g} learns from a source, and there is none.",
            "Name one: backbone.source=smollm2-135m, or leave mor.distil out.",
        )


def tanh_shuts_a_source_out(mor: MorConfig, config: Any, origin: Origin) -> None:
    if mor.gate == "tanh" and config.backbone.source:
        raise ConfigError(
            "mor.gate=tanh is 0 at initialization, which shuts out the layers that come from a source.",
            "Use mor.gate=auto, which is 1 at initialization.",
        )


def router_needs_a_gradient(mor: MorConfig, config: Any, origin: Origin) -> None:
    """A router learns through its gate, or, for expert choice, from the auxiliary loss."""
    ungated = [
        f"mor.{name}={value}"
        for name, value in (("combine", "replace"), ("gate", "none"))
        if getattr(mor, name) == value
    ]
    auxiliary = mor.routing != "token" and mor.aux == "loss" and mor.aux_weight > 0
    if mor.routing != "none" and ungated and not auxiliary:
        way = "" if mor.routing == "token" else ", or mor.aux=loss with mor.aux_weight above 0"
        raise ConfigError(
            f"{ungated[0]} leaves the router of mor.routing={mor.routing} without anything to learn from: no gate "
            "carries a gradient to it.",
            f"Use mor.combine=delta and mor.gate=auto{way}.",
        )


def routing_needs_a_block(mor: MorConfig, config: Any, origin: Origin) -> None:
    scheme = config.backbone.sharing
    if not scheme.endswith("cycle") and mor.routing != "none":
        raise ConfigError(
            f"backbone.sharing={scheme} repeats each layer in place: there is no block for a token to leave.",
            f"Use backbone.sharing={scheme.replace('sequence', 'cycle')}, or mor.routing=none.",
        )


def smaller_depths_need_a_block(mor: MorConfig, config: Any, origin: Origin) -> None:
    scheme = config.backbone.sharing
    smaller = config.depth < config.train_depth or (config.eval.curve and config.train_depth > 1)
    if not scheme.endswith("cycle") and (smaller or {mor.kv, mor.kv_mode} != {"recursion"}):
        raise ConfigError(
            f"backbone.sharing={scheme} repeats each layer in place: there is no depth but the whole, and no "
            "earlier keys of the same layer.",
            f"Use backbone.sharing={scheme.replace('sequence', 'cycle')}, or eval.curve=false with mor.kv=recursion "
            f"and depth={config.train_depth}.",
        )


def one_capacity_per_recursion(mor: MorConfig, config: Any, origin: Origin) -> None:
    mor.shares(config.train_depth)


def mean_depth_within_reach(mor: MorConfig, config: Any, origin: Origin) -> None:
    if mor.mean_depth is not None and not 1 <= mor.mean_depth <= config.depth:
        raise ConfigError(
            f"mor.mean_depth={mor.mean_depth:g} cannot be spent: a token takes 1 to {config.depth} recursions.",
            f"Set it between 1 and {config.depth}.",
        )


ROUTES = {
    "expert": ("threshold", "topk", "fixed"),
    "token": ("token", "fixed"),
    "random": ("fixed",),
    "none": ("fixed",),
}


def route_fits_the_routing(mor: MorConfig, config: Any, origin: Origin) -> None:
    fit = ROUTES[mor.routing]
    if mor.route not in ("auto", *fit):
        raise ConfigError(
            f"mor.route={mor.route} does not go with mor.routing={mor.routing}.",
            f"Choose from auto, {', '.join(fit)}.",
        )


def one_budget(mor: MorConfig, config: Any, origin: Origin) -> None:
    if mor.profile != "default" and mor.mean_depth is not None:
        raise ConfigError(
            f"mor.profile={mor.profile} and mor.mean_depth={mor.mean_depth:g} both say how much to spend.",
            "Leave one of them out.",
        )


def thresholds_to_move(mor: MorConfig, config: Any, origin: Origin) -> None:
    by_threshold = mor.routing == "expert" and mor.route in ("auto", "threshold")
    for name in ("mean_depth", "shift", "profile"):
        if getattr(mor, name) not in (None, 0, "default") and not by_threshold:
            raise ConfigError(
                f"mor.{name} moves thresholds, and mor.routing={mor.routing} with mor.route={mor.route} has none.",
                "Leave it out, or use mor.routing=expert with mor.route=threshold.",
            )


def same_keys_as_trained(mor: MorConfig, config: Any, origin: Origin) -> None:
    if mor.kv_mode != mor.kv and not mor.force:
        raise ConfigError(
            f"The model was trained with mor.kv={mor.kv}; mor.gap={mor.gap} shows its tokens other keys and values.",
            "That can ruin it: allow it with mor.force=true, or train with it.",
        )


BASE_RULES = (no_depth_to_spend,)
RULES = (
    distillation_needs_a_source,
    tanh_shuts_a_source_out,
    router_needs_a_gradient,
    routing_needs_a_block,
    smaller_depths_need_a_block,
    one_capacity_per_recursion,
    mean_depth_within_reach,
    route_fits_the_routing,
    one_budget,
    thresholds_to_move,
    same_keys_as_trained,
)
