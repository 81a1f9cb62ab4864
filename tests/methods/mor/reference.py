"""Mixture-of-Recursions the slow way: every step computes every token, masks and ``where`` decide what counts.

Bae et al., arXiv 2507.10524, section 2, one sequence and one step at a time, for the fast paths to be held against.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, sees: Tensor) -> Tensor:
    """One sequence. q: (T, h, d); k, v: (S, h_kv, d); sees: (T, S) bool. Rows that see nothing answer 0."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    score = torch.einsum("thd,shd->hts", q, k) / math.sqrt(q.shape[-1])
    score = score.masked_fill(~sees, -torch.inf)
    share = torch.where(sees.any(-1)[:, None], score.softmax(-1), 0.0)
    return torch.einsum("hts,shd->thd", share.nan_to_num(0.0), v)


def sets(
    model, step: int, logits: Tensor, active: Tensor, route, real: int, tokens_depth: Tensor | None
) -> Tensor:
    """(T,) bool: who takes this step."""
    if step == 0:
        return active
    kind, value = route
    if kind == "topk":
        order = sorted((t for t in range(len(active)) if active[t]), key=lambda t: (-logits[t].item(), t))
        chosen = order[: max(1, math.floor(value[step] * real + 1e-9))]
        return torch.tensor([t in chosen for t in range(len(active))])
    if kind == "above":
        return active & (logits > value[step - 1])
    depth = tokens_depth if kind == "token" else torch.full_like(active, int(value), dtype=torch.int64)
    return active & (depth > step)


def forward(model, tokens: Tensor, route, real: int, kv_mode: str = "recursion", cap: int | None = None):
    """One sequence (T,) -> states after the loop (T, D), depth (T,)."""
    decoder, config, T = model.decoder, model.config, len(tokens)
    rope = decoder.rope(torch.arange(T))
    causal = torch.ones(T, T).tril().bool()
    x = decoder.embed(tokens)
    if decoder.first is not None:
        x = decoder.first(x, rope, lambda q, k, v: attend(q, k, v, causal))
    entry, active = x, torch.arange(T) < real
    depth = torch.zeros(T, dtype=torch.int64)
    scores = wanted = None
    if model.by_token is not None:
        logits = model.by_token(x)
        kind = "softmax" if config.gate == "auto" else config.gate
        scores = (logits.softmax(-1) if kind == "softmax" else logits.sigmoid()) * (config.alpha or 1.0)
        wanted = (scores + model.bias).argmax(-1) + 1
    first, latest = {}, {}
    for step in range(cap or model.recursions):
        s = model.by_step[step](x)[:, 0] if model.by_step else torch.zeros(T)
        active = sets(model, step, s, active, route, real, wanted)
        f, before = x, x
        for j, layer in enumerate(decoder.block):
            q = layer.queries(f, rope)
            k, v = layer.keys_values(f, rope)
            took = active[:, None, None]
            if kv_mode == "recursion" or step == 0:
                sees = causal & active
            else:
                sees = causal & (torch.arange(T) < real)
                if kv_mode == "sharing":
                    k, v = first[j]
                elif kv_mode == "hybrid":
                    k, v = torch.where(took, k, first[j][0]), torch.where(took, v, first[j][1])
                elif kv_mode == "deepest":
                    k, v = torch.where(took, k, latest[j][0]), torch.where(took, v, latest[j][1])
                elif kv_mode == "propagate":
                    gone_k, gone_v = layer.keys_values(before, rope)
                    k, v = torch.where(took, k, gone_k), torch.where(took, v, gone_v)
            if step == 0:
                first[j] = k, v
            latest[j] = k, v
            f = layer.finish(f, attend(q, k, v, sees))
        if model.by_step and config.combine != "replace":
            g = (config.alpha or 0.1) * s.sigmoid()[:, None]
            f = x + g * (f - x if config.combine == "delta" else f)
        x = torch.where(active[:, None], f, x)
        depth = torch.where(active, step + 1, depth)
    if scores is not None and config.combine != "replace":
        w = scores.gather(1, (depth - 1).clamp_min(0)[:, None])
        x = entry + w * (x - entry if config.combine == "delta" else x)
    return x, depth
