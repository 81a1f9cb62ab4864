"""The keys of Mixture-of-Recursions. Free of torch: ``show``, ``--help`` and ``--dry-run`` read it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from reason.backbones.sharing import Sharing
from reason.errors import ConfigError
from reason.methods.base import evaluation_key
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
    """Sources: [P] Bae et al., arXiv 2507.10524; [C] its reference code; "ours" is a choice of this platform."""

    routing: Routing = (
        "expert"  # expert: a recursion picks tokens | token: a token its depth | random | none [P 2.2]
    )
    router: Literal["linear", "mlp"] = "linear"  # what scores a token; mlp has a hidden layer of 2D [P, C]
    gate: Gate = "auto"  # how a score enters the state; auto: sigmoid for expert, softmax for token [C]
    alpha: float = 0.0  # scale of the gate; 0 = 0.1 for expert, 1 for token [C]; with a source, what makes g = 1 at the start
    combine: Combine = (
        "auto"  # state after a step: paper x + g f(x) | delta x + g (f(x) - x) | replace f(x); auto: paper from
        # scratch, delta with a source, whose activations paper would scale away (ours)
    )
    capacities: str = (
        ""  # share of all tokens that each recursion keeps, by comma; "" = 1, (N-1)/N .. 1/N [P]
    )
    capacity_warmup: int = (
        0  # optimiser steps over which capacities fall from 1 and aux_weight rises from 0; 0 = off, which [P]
        # found better from scratch
    )
    explore: float = 0.0  # expert: noise in logits on whom training chooses, falling to 0 at 60% of it; try 1 with aux=none (ours)
    elastic: float = (
        0.0  # expert: share of steps with capacities drawn at random, so that depth bends later (ours)
    )
    exit_weight: float = 0.0  # weight of the loss after a random recursion, so that each depth answers (ours)

    aux: Literal["loss", "router", "none"] = (
        "loss"  # expert: what learns to foresee top-k without the future [P]
    )
    aux_weight: float = 0.01  # of that binary cross-entropy, summed over recursions ([P] 0.001)
    balance: Literal["loss", "bias", "none"] = "loss"  # token: how loads are evened; bias is "loss-free" [P]
    balance_weight: float = 0.1  # token: of the balancing loss [C]
    balance_rate: float = 0.001  # token: step of the selection bias after each optimiser step [P]
    z_weight: float = 0.0  # of the squared log-sum-exp of router logits [P: off for linear]

    init: Init = (
        "stepwise"  # source: layers that the block begins with, spread evenly | average of those it stands for | lower
        # or upper ones | random [C]
    )
    lora: int = (
        0  # rank of what each use of a shared layer has beyond it (Bae et al., arXiv 2410.20672); 0 = nothing
    )
    distil: float = (
        0.0  # source: weight of KL(source || ours) over next tokens, beside the text (arXiv 2410.20672)
    )

    kv: KV = "recursion"  # keys at a step: of those that took it | sharing: of step 1 | hybrid: own, else 1's [P 2.3]

    route: Route = evaluation_key("auto")  # who decides depth when judged; auto: threshold, token or fixed
    mean_depth: float | None = evaluation_key(None)  # recursions to spend on average; null = as trained
    shift: float = evaluation_key(0.0)  # added to every threshold, in logits (ours)
    profile: Profile = evaluation_key(
        "default"
    )  # thresholds as calibrated: default | economy, half the way to 1 recursion | max, all of them (ours)
    gap: Gap = evaluation_key("trained")  # what stands in for keys of those that left; trained = as kv says
    force: bool = evaluation_key(False)  # judge with other keys and values than it was trained with
    audit: float = evaluation_key(0.05)  # share of documents judged again at full depth, to find misrouting
    record: bool = evaluation_key(
        False
    )  # predict: keep each request in audit.jsonl, to be replayed exactly (ours)
    guard: bool = evaluation_key(
        False
    )  # predict: go to a safer profile when depths drift from validation's (ours)

    def __post_init__(self):
        for key in (
            "alpha", "capacity_warmup", "exit_weight", "aux_weight", "balance_weight", "balance_rate", "z_weight",
            "lora", "distil", "explore",
        ):  # fmt: skip
            if getattr(self, key) < 0:
                raise ConfigError(f"mor.{key} is {getattr(self, key)}; it must not be below 0.")
        for key in ("elastic", "audit"):
            if not 0 <= getattr(self, key) <= 1:
                raise ConfigError(f"mor.{key} is {getattr(self, key)}; it is a share, from 0 to 1.")
        if self.explore and self.routing != "expert":
            raise ConfigError(
                f"mor.explore={self.explore:g} is noise on whom a recursion chooses; with mor.routing={self.routing} none does.",
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
        recursions = max(config.train_depth, 1)
        scheme, source = config.backbone.sharing, config.backbone.source
        if not source:
            Sharing(scheme, config.backbone.layers, recursions)  # refuses what does not divide
        if not config.train_depth:  # the vanilla model: nothing here is read
            for key in ("mean_depth", "profile", "shift", "gap"):
                if origin.get(f"mor.{key}") == "command line":
                    raise ConfigError(
                        f"mor.{key} says how depth is spent, and train_depth=0 is the base, which has none to spend.",
                        f"Leave mor.{key} out, or name a run with recursions.",
                    )
            return
        if self.distil and not source:
            raise ConfigError(
                f"mor.distil={self.distil:g} learns from a source, and there is none.",
                "Name one: backbone.source=smollm2-135m, or leave mor.distil out.",
            )
        if source and self.gate == "tanh":
            raise ConfigError(
                "mor.gate=tanh begins at 0 where weights come from a source, and shuts its layers out.",
                "Use mor.gate=auto, whose gate begins at 1.",
            )
        shut = next(
            (f"{k}={v}" for k, v in (("combine", "replace"), ("gate", "none")) if getattr(self, k) == v), ""
        )
        foresees = self.routing != "token" and self.aux == "loss" and self.aux_weight > 0
        if self.routing != "none" and shut and not foresees:
            way = "" if self.routing == "token" else ", or mor.aux=loss with mor.aux_weight above 0"
            raise ConfigError(
                f"mor.{shut} leaves the router of mor.routing={self.routing} without anything to learn from: no gate "
                "carries a gradient to it.",
                f"Use mor.combine=delta and mor.gate=auto{way}.",
            )
        if not scheme.endswith("cycle") and self.routing != "none":
            raise ConfigError(
                f"backbone.sharing={scheme} repeats each layer in its place: there is no block that a token "
                "could leave.",
                f"Use backbone.sharing={scheme.replace('sequence', 'cycle')}, or mor.routing=none.",
            )
        early = config.depth < config.train_depth or (config.eval.curve and recursions > 1)
        if not scheme.endswith("cycle") and (early or {self.kv, self.memory} != {"recursion"}):
            raise ConfigError(
                f"backbone.sharing={scheme} repeats each layer in its place: there is no depth but the whole, and no "
                "earlier keys of the same layer.",
                f"Use backbone.sharing={scheme.replace('sequence', 'cycle')}, or eval.curve=false with mor.kv=recursion "
                f"and depth={config.train_depth}.",
            )
        self.shares(recursions)
        if self.mean_depth is not None and not 1 <= self.mean_depth <= config.depth:
            raise ConfigError(
                f"mor.mean_depth={self.mean_depth:g} cannot be spent: a token takes 1 to {config.depth} recursions.",
                f"Set it between 1 and {config.depth}.",
            )
        fits = {
            "expert": ("threshold", "topk", "fixed"),
            "token": ("token", "fixed"),
            "random": ("fixed",),
            "none": ("fixed",),
        }
        if self.route != "auto" and self.route not in fits[self.routing]:
            raise ConfigError(
                f"mor.route={self.route} means nothing to mor.routing={self.routing}.",
                f"Choose from auto, {', '.join(fits[self.routing])}.",
            )
        if self.profile != "default" and self.mean_depth is not None:
            raise ConfigError(
                f"mor.profile={self.profile} and mor.mean_depth={self.mean_depth:g} both say how much to spend.",
                "Leave one of them out.",
            )
        for key in ("mean_depth", "shift", "profile"):
            by_threshold = self.routing == "expert" and self.route in ("auto", "threshold")
            if getattr(self, key) not in (None, 0, "default") and not by_threshold:
                raise ConfigError(
                    f"mor.{key} moves thresholds, and mor.routing={self.routing} with mor.route={self.route} has none.",
                    "Leave it out, or use mor.routing=expert with mor.route=threshold.",
                )
        if self.memory != self.kv and not self.force:
            raise ConfigError(
                f"The model was trained with mor.kv={self.kv}; mor.gap={self.gap} shows its tokens other keys and values.",
                "That can ruin it: judge it so with mor.force=true, or train with it.",
            )

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
    def memory(self) -> str:
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
                f"mor.capacities={self.capacities} is no list of numbers.",
                "For example: mor.capacities=1,0.5",
            ) from None
        if not listed:
            return []
        if not all(0 < c <= 1 for c in listed):
            raise ConfigError(
                f"mor.capacities={self.capacities}: a share is above 0 and at most 1.",
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
