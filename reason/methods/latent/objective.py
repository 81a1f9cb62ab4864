"""What latent reasoning is trained for: the losses of ReaRec over all prefixes of a batch of histories.

Tang et al., arXiv 2503.22675: ERL (section 3.3) and PRL (section 3.4), in the form of the reference
code where the two differ, with two departures. The diversity of ERL is bounded, because minus-KL has
no floor and the reference runs into NaN. And the negatives of a state in PRL's contrast are the states
of *other users* after as many items and steps: prefixes of one history are near-duplicates and would
be false negatives.

Everything here is a sum over prefixes and a count; the trainer divides. Across ranks the negatives
are gathered with gradient, so that a batch means the same however it is spread.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from reason.backbones.losses import IGNORED, linear_cross_entropy, pairwise_kl
from reason.methods.base import Losses

if TYPE_CHECKING:
    from reason.backbones.encoder import SequenceEncoder
    from reason.methods.latent.config import LatentConfig


def temperatures(config: LatentConfig, steps: int) -> list[float]:
    """Temperature of the scores after step 0..steps. PRL: ``tau * alpha ** (K - k)``, falling to tau."""
    ratio = config.alpha if config.loss == "prl" else 1.0
    return [config.tau * ratio ** (steps - k) for k in range(steps + 1)]


def read(config: LatentConfig, states: Tensor) -> Tensor:
    """The state that answers, from the states r_0..r_k: (..., k + 1, d) -> (..., d)."""
    return states.mean(-2) if reads_mean(config) else states[..., -1, :]


def reads_mean(config: LatentConfig) -> bool:
    """Whether the mean of all states answers, or the last one."""
    return config.readout == "mean" or (config.readout == "auto" and config.loss == "erl")


def terms(config: LatentConfig, steps: int) -> list[str]:
    """Names of the terms of the loss of a model with so many steps."""
    if not steps:
        return ["rec"]
    parts = {
        "prl": ["steps"] * (config.step_weight > 0) + ["contrast"] * (config.contrast_weight > 0),
        "erl": ["diversity"] * (config.kl_weight > 0),
        "ce": [],
    }
    return ["rec", *parts[config.loss]] + ["anytime"] * (config.anytime > 0)


def losses(
    config: LatentConfig,
    model: SequenceEncoder,
    batch: dict[str, Tensor],
    noise: Tensor | None = None,
    stop: int = 0,
) -> Losses:
    """Every term of ``terms`` as (sum over prefixes, number of prefixes), weights included.

    Args:
        batch: items (B, T), targets (B, T) with -100 where there is none, user (B,).
        noise: (K, B, T, d), for the term "contrast".
        stop: the step after which the term "anytime" reads.
    """
    depth, names = model.steps, terms(config, model.steps)
    items = model.item_vectors()  # once: what goes in and what is scored carry the same randomness
    clean, noisy = model.reason(batch["items"], noise=noise, vectors=items)  # (B, T, K + 1, d), (B, T, K, d)
    real = batch["targets"] != IGNORED  # (B, T)
    prefix = real.flatten().nonzero().squeeze(1)  # (M,)
    states = clean.flatten(0, 1).index_select(0, prefix)  # (M, K + 1, d)
    target = batch["targets"].flatten().index_select(0, prefix)  # (M,)
    tau = temperatures(config, depth)

    def cross_entropy(state: Tensor, tau: float) -> Tensor:
        return linear_cross_entropy(state, items, target, scale=1 / tau)

    sums = {}
    if config.loss == "prl":  # the annealed chain always ends in r_K; the readout plays no part in it
        sums["rec"] = cross_entropy(states[:, -1], config.tau)
    else:
        sums["rec"] = cross_entropy(read(config, states), config.tau)
    if "steps" in names:
        scale = states.new_tensor([1 / t for t in tau[:-1]]).repeat(len(states))  # (M * K,)
        early = states[:, :-1].flatten(0, 1)  # (M * K, d)
        share = config.step_weight / depth
        label = target.repeat_interleave(depth)
        sums["steps"] = share * linear_cross_entropy(early, items, label, scale=scale)
    if "contrast" in names:
        assert noisy is not None, "the contrastive term needs the noisy branch"
        sums["contrast"] = config.contrast_weight * contrast(
            noisy,
            clean[:, :, 1:],
            batch["user"],
            real,
            tau=config.contrast_tau,
            cosine=config.similarity == "cosine",
        )
    if "diversity" in names:
        apart = pairwise_kl(states, items, scale=1 / config.tau, bound=config.kl_bound)
        sums["diversity"] = -config.kl_weight * apart
    if "anytime" in names:
        sums["anytime"] = config.anytime * cross_entropy(read(config, states[:, : stop + 1]), tau[stop])
    assert list(sums) == names
    return {name: (total, len(prefix)) for name, total in sums.items()}


# --- the contrastive term ---------------------------------------------------------------------------


def contrast(noisy: Tensor, clean: Tensor, user: Tensor, real: Tensor, *, tau: float, cosine: bool) -> Tensor:
    """PRL's reasoning-aware contrast: each noisy state should know its own clean state.

    The anchor is the noisy state of history b after t items and k steps, the positive the clean one of
    the same place, the negatives the clean ones of other users at the same (t, k). An anchor without
    negatives contributes 0.

    Args:
        noisy, clean: (B, T, K, d). user: (B,), whose history it is. real: (B, T), which places count.
        tau: temperature of the similarity, which is the cosine or else the dot product.

    Returns:
        the sum over real places of the mean over steps; a scalar in float32 or wider.
    """
    width = noisy.shape[1]
    with torch.autocast(noisy.device.type, enabled=False):
        wide = torch.promote_types(noisy.dtype, torch.float32)
        noisy, clean = noisy.to(wide), clean.to(wide)
        if cosine:
            noisy, clean = F.normalize(noisy, dim=-1), F.normalize(clean, dim=-1)
        rivals, rival_user, rival_real, first = _everywhere(clean, user, real)  # (C, T, K, d), (C,), (C, T)
        own = torch.arange(first, first + len(user), device=user.device)
        other = (user[:, None] != rival_user).expand(width, -1, -1) & rival_real[:, :width].T[
            :, None
        ]  # (T, B, C)
        other = other.scatter(2, own[None, :, None].expand(width, -1, 1), True)
        score = torch.einsum("btkd,ctkd->ktbc", noisy, rivals[:, :width]) / tau
        score = score.masked_fill(~other, -torch.inf)
        positive = score[:, :, torch.arange(len(own), device=own.device), own]  # (K, T, B)
        surprise = (score.logsumexp(-1) - positive).mean(0)  # (T, B)
        return surprise.masked_fill(~real.T, 0.0).sum()


def _everywhere(clean: Tensor, user: Tensor, real: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """The states, users and real places of all ranks, and where this rank's rows begin.

    Ranks may differ in rows and width; what is missing is filled up with places that are not real.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return clean, user, real, 0
    sizes = _gathered(torch.tensor(real.shape, device=real.device)[None])  # (R, 2)
    rows, width = sizes.amax(0).tolist()
    short, narrow = rows - real.shape[0], width - real.shape[1]
    clean = _Gather.apply(F.pad(clean, (0, 0, 0, 0, 0, narrow, 0, short)))
    user = _gathered(F.pad(user, (0, short)))
    real = _gathered(F.pad(real, (0, narrow, 0, short)).to(torch.uint8)).bool()
    return clean, user, real, dist.get_rank() * rows


def _gathered(x: Tensor) -> Tensor:
    """(n, ...) of each rank -> (R * n, ...), in rank order."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


class _Gather(torch.autograd.Function):
    """``_gathered`` with gradient: what any rank's loss wants of my rows comes back to me."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.rows = len(x)
        return _gathered(x)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> Tensor:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        return total[dist.get_rank() * ctx.rows :][: ctx.rows]
