"""The training objective: the loss of next tokens, and the losses of routers.

Bae et al., arXiv 2507.10524, section 2.2 and appendix. Everything is a sum and a count; the trainer divides, so a
batch cut into micro-batches or over ranks weighs the same. That is where the reference code differs: it adds
the routers' loss once per micro-batch, so that their weight grows with the accumulation. One term is not such a sum:
token-choice's balancing loss multiplies by the loads, which are those of all ranks but of one micro-batch.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from reason.backbones.decoder import RecursiveDecoder
from reason.backbones.losses import IGNORED, linear_cross_entropy, linear_kl
from reason.methods.base import Losses, Step
from reason.methods.mor.config import MorConfig
from reason.methods.mor.flops import top_k_size, warmup_capacity
from reason.methods.mor.network import MixtureOfRecursions, RoutedOutput
from reason.methods.mor.router import auxiliary_loss, z_loss
from reason.methods.mor.token_selection import NoisyScores, RandomScores, Route, TopK

NOISE_UNTIL = 0.6  # share of training after which choices have no noise
WARMUP_STAGES = (
    8  # stages of a warm-up of capacities: each has other shapes, which a compiler would have to compile for
)


def losses(config: MorConfig, model: MixtureOfRecursions, batch: dict[str, Tensor], step: Step) -> Losses:
    """One micro-batch. batch: tokens (B, T), targets (B, T) with -100 where none, length (B,)."""
    tokens, targets, lengths = batch["tokens"], batch["targets"], batch["length"]
    routed = model(
        tokens, training_route(config, model.recursions, step), lengths=lengths, kv_mode=config.kv,
        exits=config.exit_weight > 0,
    )  # fmt: skip
    hidden = model.read(routed.states).flatten(0, 1)
    found: Losses = {"text": next_tokens(model, hidden, targets)}
    count = found["text"][1]
    if config.distil:
        found["distil"] = (config.distil * from_teacher(model, hidden, tokens, targets), count)
    if model.decoder.corrections is not None:
        found["text"] = (found["text"][0] + zero_touching_corrections(model.decoder), count)
    if config.exit_weight and routed.exits:
        which = int(
            torch.randint(len(routed.exits), (), generator=step.generator, device=step.generator.device)
        )
        early = model.read(routed.exits[which]).flatten(0, 1)
        found["exit"] = (config.exit_weight * next_tokens(model, early, targets)[0], count)
    warmup = min(step.step / config.capacity_warmup, 1.0) if config.capacity_warmup else 1.0
    return found | router_losses(config, model, routed, warmup)


def counts(
    config: MorConfig, model: MixtureOfRecursions, batch: dict[str, Tensor], step: Step
) -> dict[str, float]:
    """The counts that ``losses`` would return, read off the batch. Draws the same numbers from the step's generator."""
    n_targets = float((batch["targets"] != IGNORED).sum())
    terms = ["text"] + ["distil"] * (config.distil > 0)
    terms += ["exit"] * (config.exit_weight > 0 and model.recursions > 1)
    found, lengths = dict.fromkeys(terms, n_targets), batch["length"].tolist()
    if model.by_step:
        taught = config.aux != "none" and config.aux_weight > 0
        names = ["foresee"] * taught + ["z"] * (config.z_weight > 0)
        candidates = lengths  # of each sequence, the tokens that a step's router scores
        for r, capacity in enumerate(drawn_capacities(config, model.recursions, step), 1):
            found |= {f"{name} {r}": float(sum(candidates)) for name in names}
            candidates = (
                [
                    min(top_k_size(capacity, n), k) if n else 0
                    for n, k in zip(lengths, candidates, strict=True)
                ]
                if r > 1
                else lengths
            )
    if model.by_token is not None:
        names = ["balance"] * (config.balance == "loss" and config.balance_weight > 0) + ["z"] * (
            config.z_weight > 0
        )
        found |= dict.fromkeys(names, float(sum(lengths)))
    return found


def next_tokens(model: MixtureOfRecursions, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the next tokens in nats, summed, and how many there are. hidden: (B T, D) that the head reads."""
    return linear_cross_entropy(hidden, model.head_weight, targets.flatten()), (targets != IGNORED).sum()


def from_teacher(model: MixtureOfRecursions, hidden: Tensor, tokens: Tensor, targets: Tensor) -> Tensor:
    """KL(source || ours) of the next token in nats, summed over where there is a target. hidden: (B T, D) that the head
    reads."""
    assert model.teacher is not None
    has_target = (targets != IGNORED).flatten()
    theirs = model.teacher.states(tokens).flatten(0, 1)[has_target]
    return linear_kl(hidden[has_target], model.head_weight, theirs, model.teacher.head_weight)


def zero_touching_corrections(decoder: RecursiveDecoder) -> Tensor:
    """0, with a gradient of zeros for every correction: on several ranks each parameter has to take part in each step, also
    one that no token needed."""
    assert decoder.corrections is not None
    ends = [p.flatten()[0] for step in decoder.corrections for one in step for p in one.parameters()]
    return 0.0 * torch.stack(ends).sum()


def router_losses(
    config: MorConfig, model: MixtureOfRecursions, routed: RoutedOutput, warmup: float = 1.0
) -> Losses:
    """Each a sum over the tokens that a router scored; a term a step, because steps score different numbers.

    warmup: share of the weight of the auxiliary loss, which is worth little while all tokens are kept.
    """
    found: Losses = {}
    for step, routing in enumerate(routed.steps if model.by_step else [], 1):
        n = float(len(routing.logits))
        if config.aux != "none" and config.aux_weight:
            chosen = torch.ones_like(routing.logits, dtype=torch.bool)
            if routing.chosen is not None:
                chosen = torch.zeros_like(chosen).index_fill(0, routing.chosen, True)
            found[f"foresee {step}"] = (
                config.aux_weight * warmup * auxiliary_loss(routing.deciding, chosen),
                n,
            )
        if config.z_weight:
            found[f"z {step}"] = (config.z_weight * z_loss(routing.logits[:, None]), n)
    if routed.entry is not None:
        n = len(routed.entry)
        if config.balance == "bias":
            model.add_load(depth_counts(routed, model.recursions))
        if config.balance == "loss" and config.balance_weight:
            found["balance"] = (config.balance_weight * _balance(model, routed), float(n))
        if config.z_weight:
            found["z"] = (config.z_weight * z_loss(routed.entry), float(n))
    return found


def _balance(model: MixtureOfRecursions, routed: RoutedOutput) -> Tensor:
    """n times the balancing loss. The shares f_i have no gradient and are those of all ranks; P_i is linear in tokens."""
    load = depth_counts(routed, model.recursions)
    if dist.is_initialized():
        dist.all_reduce(load)
    assert routed.entry is not None
    score = model.gates(routed.entry) / model.config.alpha
    return model.recursions * (score * (load / load.sum())).sum()


@torch.no_grad()
def depth_counts(routed: RoutedOutput, recursions: int) -> Tensor:
    """(N_r,) float: tokens that exited after 1, 2, ... recursions."""
    depth = routed.depth.flatten()
    return torch.bincount(depth, minlength=recursions + 1)[1:].float()


# --- the route of a training step -------------------------------------------------------------------


def training_route(config: MorConfig, recursions: int, step: Step) -> Route | None:
    """The route of a training step; None: what a token-choice router chooses."""
    if config.routing in ("token", "none"):
        return None
    top = TopK(drawn_capacities(config, recursions, step))
    if config.routing == "random":
        return RandomScores(top, step.generator)
    scale = config.explore * (1 - step.progress / NOISE_UNTIL)
    return NoisyScores(top, step.generator, scale) if scale > 0 else top


def drawn_capacities(config: MorConfig, recursions: int, step: Step) -> list[float]:
    """Capacities of a training step: as configured, on their way there (warm-up), or random (``mor.elastic``)."""
    capacities = config.shares(recursions)
    if config.elastic and _draw(step) < config.elastic:
        free = sorted((_draw(step) for _ in capacities[1:]), reverse=True)
        return [1.0, *(0.1 + 0.9 * c for c in free)]
    if config.capacity_warmup:
        warm = config.capacity_warmup
        at = step.step // -(-warm // WARMUP_STAGES) * -(-warm // WARMUP_STAGES)
        capacities = [warmup_capacity(c, at, warm) for c in capacities]
    return capacities


def _draw(step: Step) -> float:
    return float(torch.rand((), generator=step.generator, device=step.generator.device))
