"""What Mixture-of-Recursions is trained for: next tokens, and routers that decide well without the future.

Bae et al., arXiv 2507.10524, section 2.2 and appendix. Everything is a sum and a count; the trainer divides, so a
batch cut into micro-batches or over ranks weighs the same. That is where the reference code differs: it adds
the routers' loss once per micro-batch, so that their weight grows with the accumulation. One term is no such sum:
token-choice's balancing loss multiplies by the loads, which are those of all ranks but of one micro-batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from reason.backbones.losses import IGNORED, linear_cross_entropy, linear_kl
from reason.methods.base import Losses, Step
from reason.methods.mor.config import MorConfig
from reason.methods.mor.flops import kept, warmed
from reason.methods.mor.router import foresee, z_loss
from reason.methods.mor.routes import AtRandom, Explored, Route, TopK

if TYPE_CHECKING:
    from reason.backbones.decoder import RecursiveDecoder
    from reason.methods.mor.network import MixtureOfRecursions, Routed

EXPLORED = 0.6  # share of training after which choices are no longer noisy
LEVELS = 8  # steps of a warm-up of capacities: each is another shape, which a compiler would have to meet


def losses(config: MorConfig, model: MixtureOfRecursions, batch: dict[str, Tensor], step: Step) -> Losses:
    """One micro-batch. batch: tokens (B, T), targets (B, T) with -100 where none, length (B,)."""
    tokens, targets, real = batch["tokens"], batch["targets"], batch["length"]
    routed = model(
        tokens, training_route(config, model.recursions, step), real=real, memory=config.kv,
        exits=config.exit_weight > 0,
    )  # fmt: skip
    hidden = model.read(routed.states).flatten(0, 1)
    found: Losses = {"text": next_tokens(model, hidden, targets)}
    count = found["text"][1]
    if config.distil:
        found["distil"] = (config.distil * from_teacher(model, hidden, tokens, targets), count)
    if model.decoder.corrections is not None:
        found["text"] = (found["text"][0] + untouched(model.decoder), count)
    if config.exit_weight and routed.exits:
        which = int(
            torch.randint(len(routed.exits), (), generator=step.generator, device=step.generator.device)
        )
        left = model.read(routed.exits[which]).flatten(0, 1)
        found["exit"] = (config.exit_weight * next_tokens(model, left, targets)[0], count)
    rise = min(step.step / config.capacity_warmup, 1.0) if config.capacity_warmup else 1.0
    return found | router_losses(config, model, routed, rise)


def counts(
    config: MorConfig, model: MixtureOfRecursions, batch: dict[str, Tensor], step: Step
) -> dict[str, float]:
    """The counts that ``losses`` would return, read off the batch. Draws from the step's generator what it would."""
    asked = float((batch["targets"] != IGNORED).sum())
    terms = ["text"] + ["distil"] * (config.distil > 0)
    terms += ["exit"] * (config.exit_weight > 0 and model.recursions > 1)
    found, real = dict.fromkeys(terms, asked), batch["length"].tolist()
    if model.by_step:
        taught = config.aux != "none" and config.aux_weight > 0
        names = ["foresee"] * taught + ["z"] * (config.z_weight > 0)
        among = real  # of each sequence, the tokens that a step's router scores
        for r, capacity in enumerate(drawn_capacities(config, model.recursions, step), 1):
            found |= {f"{name} {r}": float(sum(among)) for name in names}
            among = (
                [min(kept(capacity, n), k) if n else 0 for n, k in zip(real, among, strict=True)]
                if r > 1
                else real
            )
    if model.by_token is not None:
        names = ["balance"] * (config.balance == "loss" and config.balance_weight > 0) + ["z"] * (
            config.z_weight > 0
        )
        found |= dict.fromkeys(names, float(sum(real)))
    return found


def next_tokens(model: MixtureOfRecursions, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the next tokens in nats, summed, and how many there are. hidden: (B T, D) that the head reads."""
    return linear_cross_entropy(hidden, model.head_weight, targets.flatten()), (targets != IGNORED).sum()


def from_teacher(model: MixtureOfRecursions, hidden: Tensor, tokens: Tensor, targets: Tensor) -> Tensor:
    """KL(source || ours) of the next token in nats, summed over where there is a target. hidden: (B T, D) that the head
    reads."""
    assert model.teacher is not None
    asked = (targets != IGNORED).flatten()
    theirs = model.teacher.states(tokens).flatten(0, 1)[asked]
    return linear_kl(hidden[asked], model.head_weight, theirs, model.teacher.head_weight)


def untouched(decoder: RecursiveDecoder) -> Tensor:
    """0, with a gradient of zeros for every correction: what no token needed takes part too, as several ranks must."""
    assert decoder.corrections is not None
    ends = [p.flatten()[0] for step in decoder.corrections for one in step for p in one.parameters()]
    return 0.0 * torch.stack(ends).sum()


def router_losses(config: MorConfig, model: MixtureOfRecursions, routed: Routed, rise: float = 1.0) -> Losses:
    """Each a sum over the tokens that a router scored; a term a step, because steps score different numbers.

    rise: share of the weight of foreseeing, which is worth little while all tokens are kept.
    """
    found: Losses = {}
    for step, scored in enumerate(routed.scored if model.by_step else [], 1):
        n = float(len(scored.logits))
        if config.aux != "none" and config.aux_weight:
            chosen = torch.ones_like(scored.logits, dtype=torch.bool)
            if scored.places is not None:
                chosen = torch.zeros_like(chosen).index_fill(0, scored.places, True)
            heard = scored.logits if scored.foreseen is None else scored.foreseen
            found[f"foresee {step}"] = (config.aux_weight * rise * foresee(heard, chosen), n)
        if config.z_weight:
            found[f"z {step}"] = (config.z_weight * z_loss(scored.logits[:, None]), n)
    if routed.entry is not None:
        n = len(routed.entry)
        if config.balance == "bias":
            model.note_load(loads(routed, model.recursions))
        if config.balance == "loss" and config.balance_weight:
            found["balance"] = (config.balance_weight * _balance(model, routed), float(n))
        if config.z_weight:
            found["z"] = (config.z_weight * z_loss(routed.entry), float(n))
    return found


def _balance(model: MixtureOfRecursions, routed: Routed) -> Tensor:
    """n times the balancing loss. The shares f_i have no gradient and are those of all ranks; P_i is linear in tokens."""
    load = loads(routed, model.recursions)
    if dist.is_initialized():
        dist.all_reduce(load)
    assert routed.entry is not None
    score = model.gates(routed.entry) / model.config.alpha
    return model.recursions * (score * (load / load.sum())).sum()


@torch.no_grad()
def loads(routed: Routed, recursions: int) -> Tensor:
    """(N_r,) float: tokens that left after 1, 2, ... recursions."""
    depth = routed.depth.flatten()
    return torch.bincount(depth, minlength=recursions + 1)[1:].float()


# --- who is chosen while training -------------------------------------------------------------------


def training_route(config: MorConfig, recursions: int, step: Step) -> Route | None:
    """The route of a training step; None: what a token-choice router says."""
    if config.routing in ("token", "none"):
        return None
    top = TopK(drawn_capacities(config, recursions, step))
    if config.routing == "random":
        return AtRandom(top, step.generator)
    scale = config.explore * (1 - step.progress / EXPLORED)
    return Explored(top, step.generator, scale) if scale > 0 else top


def drawn_capacities(config: MorConfig, recursions: int, step: Step) -> list[float]:
    """Of a training step: as configured, on their way there, or drawn."""
    capacities = config.shares(recursions)
    if config.elastic and _draw(step) < config.elastic:
        free = sorted((_draw(step) for _ in capacities[1:]), reverse=True)
        return [1.0, *(0.1 + 0.9 * c for c in free)]
    if config.capacity_warmup:
        warm = config.capacity_warmup
        at = step.step // -(-warm // LEVELS) * -(-warm // LEVELS)
        capacities = [warmed(c, at, warm) for c in capacities]
    return capacities


def _draw(step: Step) -> float:
    return float(torch.rand((), generator=step.generator, device=step.generator.device))
