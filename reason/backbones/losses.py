"""Losses over a large catalogue whose logits are never all alive.

All functions walk over the rows in chunks that fit the cache. Where gradients are
wanted they are formed in the same walk, while a chunk's softmax is at hand, so the
(rows, items) matrix is neither stored nor computed twice.

They know states, an item table and targets: no model, no method.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    scale: float | Tensor = 1.0,
    row_weight: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Sum over rows of ``row_weight * CE(scale * hidden @ weight.T, target)``, a scalar in float32 or wider.

    hidden: (M, d); weight: (N, d); target: (M,) int64, -100 marks a row without a target.
    scale: a number or (M,): the inverse temperature of each row. row_weight: (M,), default 1.
    chunk: rows handled at a time; default: as many as keep a chunk of logits in the cache.

    Gradients reach hidden, weight, scale and row_weight, and are first order only. Products run in the
    autocast dtype where autocast is on; softmax and sums in float32 at least.
    """
    scale = torch.as_tensor(scale, device=hidden.device)
    if row_weight is None:
        row_weight = torch.ones((), device=hidden.device)
    chunk = chunk or _chunk_rows(weight.shape[0], hidden.device)
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in (hidden, weight, scale, row_weight))
    return _LinearCrossEntropy.apply(
        hidden, weight, target, scale, row_weight, chunk, grad, _product_dtype(hidden)
    )


def pairwise_kl(
    states: Tensor, weight: Tensor, *, scale: float, bound: float, chunk: int | None = None
) -> Tensor:
    """ERL's diversity, summed over rows: how far the step distributions of one row lie apart.

    states: (M, J, d), the J states of a row; weight: (N, d). With p_j = softmax(scale * states_j @ weight.T),

        sum over rows of the mean over ordered pairs i != j of min(KL(p_j || stopgrad(p_i)), bound)

    in nats. A pair at the bound has no gradient: minus-KL has no floor of its own. J = 1 gives 0.
    Source: Tang et al., arXiv 2503.22675, section on ERL, in the ordered-pair form of the released code.
    """
    if states.shape[1] < 2:
        return (states.sum() + weight.sum()) * 0.0
    chunk = chunk or _chunk_rows(weight.shape[0] * states.shape[1], states.device)
    grad = torch.is_grad_enabled() and (states.requires_grad or weight.requires_grad)
    return _PairwiseKL.apply(states, weight, scale, bound, chunk, grad, _product_dtype(states))


def linear_kl(
    hidden: Tensor, weight: Tensor, other: Tensor, other_weight: Tensor, *, chunk: int | None = None
) -> Tensor:
    """Sum over rows of KL(softmax(other @ other_weight.T) || softmax(hidden @ weight.T)), nats, in float32 or wider.

    hidden: (M, d); weight: (N, d), which learn; other: (M, e); other_weight: (N, e), which do not and whose products
    are not lowered by autocast. Gradients are first order only.
    """
    chunk = chunk or _chunk_rows(weight.shape[0], hidden.device)
    grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _LinearKL.apply(
        hidden, weight, other.detach(), other_weight.detach(), chunk, grad, _product_dtype(hidden)
    )


class _LinearKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, other, other_weight, chunk, grad, dtype):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        h, w = hidden.to(dtype), weight.to(dtype)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        if grad:
            d_hidden, d_weight = torch.empty_like(h), torch.zeros_like(weight, dtype=wide)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(h), chunk):
                rows = slice(start, start + chunk)
                log_q = torch.mm(h[rows], w.T).to(wide).log_softmax(-1)  # (C, N)
                log_p = torch.mm(other[rows], other_weight.T).to(wide).log_softmax(-1)
                p = log_p.exp()
                total += (p * log_p.sub_(log_q)).sum()
                if not grad:
                    continue
                d = log_q.exp_().sub_(p).to(dtype)  # gradient at the logits
                d_hidden[rows] = torch.mm(d, w)
                d_weight += torch.mm(d.T, h[rows])
        if grad:
            ctx.save_for_backward(d_hidden, d_weight)
            ctx.like = (hidden.dtype, weight.dtype)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return *_kept(ctx, g), None, None, None, None, None


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, target, scale, row_weight, chunk, grad, dtype):
        M, N = hidden.shape[0], weight.shape[0]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        supervised = (target != IGNORED).nonzero().squeeze(-1)  # (R,) rows without a target cost nothing
        h, w = hidden[supervised].to(dtype), weight.to(dtype)
        label = target[supervised].unsqueeze(-1)  # (R, 1)
        s = scale.to(wide).expand(M)[supervised].unsqueeze(-1)  # (R, 1)
        c = row_weight.to(wide).expand(M)[supervised].unsqueeze(-1)  # (R, 1)
        loss = torch.empty_like(c)
        if grad:
            d_hidden, d_scale = torch.empty_like(h), torch.empty_like(c)
            d_weight = torch.zeros(N, weight.shape[1], dtype=wide, device=weight.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(supervised), chunk):
                rows = slice(start, start + chunk)
                z = torch.mm(h[rows], w.T).to(wide).mul_(s[rows])  # (C, N)
                top = z.amax(-1, keepdim=True)
                at_label = z.gather(-1, label[rows]) - top
                p = z.sub_(top).exp_()
                total = p.sum(-1, keepdim=True)
                loss[rows] = total.log() - at_label
                if not grad:
                    continue
                p.mul_(c[rows] / total)
                p.scatter_add_(-1, label[rows], -c[rows])  # c * (softmax - onehot)
                p = p.to(dtype)
                d = torch.mm(p, w)  # (C, d)
                d_scale[rows] = (d * h[rows]).sum(-1, keepdim=True, dtype=wide)
                d_hidden[rows] = d * s[rows]
                d_weight += torch.mm(p.T, (h[rows] * s[rows]).to(dtype))
        if grad:
            ctx.save_for_backward(supervised, d_hidden, d_weight, d_scale.squeeze(-1), loss.squeeze(-1))
            rest = ((x.shape, x.dtype) for x in (scale, row_weight))
            ctx.like = (hidden.shape, hidden.dtype, weight.dtype, *rest)
        return (loss * c).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        supervised, d_hidden, d_weight, d_scale, loss = ctx.saved_tensors
        hidden_shape, hidden_dtype, weight_dtype, scale, row_weight = ctx.like

        def spread(rows: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
            """Rows that count back among all rows, and down to what was broadcast."""
            full = rows.new_zeros(hidden_shape[0], *rows.shape[1:])
            return full.index_copy_(0, supervised, rows * g.to(rows.dtype)).sum_to_size(shape).to(dtype)

        d_hidden, d_weight = spread(d_hidden, hidden_shape, hidden_dtype), (d_weight * g).to(weight_dtype)
        return d_hidden, d_weight, None, spread(d_scale, *scale), spread(loss, *row_weight), None, None, None


class _PairwiseKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states, weight, scale, bound, chunk, grad, dtype):
        M, J, width = states.shape
        N = weight.shape[0]
        wide = torch.promote_types(states.dtype, torch.float32)
        x, w = states.to(dtype), weight.to(dtype)
        total = torch.zeros((), dtype=wide, device=states.device)
        share = 1.0 / (J * (J - 1))
        apart = ~torch.eye(J, dtype=torch.bool, device=states.device)
        if grad:
            d_states = torch.empty_like(x)
            d_weight = torch.zeros(N, width, dtype=wide, device=weight.device)
        with torch.autocast(states.device.type, enabled=False):
            for a in range(0, M, chunk):
                rows = slice(a, a + chunk)
                flat = x[rows].reshape(-1, width)
                log_p = (torch.mm(flat, w.T).to(wide) * scale).log_softmax(-1).view(-1, J, N)
                p = log_p.exp()
                # What all states share cancels in every difference: take it off first, and equal
                # states give exactly 0 instead of the difference of two large sums.
                log_p -= log_p.mean(1, keepdim=True)
                cross = torch.bmm(p, log_p.transpose(1, 2))  # (C, J, J): [j, i] = p_j . log p_i
                kl = cross.diagonal(dim1=1, dim2=2).unsqueeze(-1) - cross  # KL(p_j || p_i)
                total += (kl.clamp(0.0, bound) * apart).sum() * share
                if not grad:
                    continue
                live = ((kl < bound) & apart).to(wide) * share  # (C, J, J)
                count = live.sum(-1, keepdim=True)
                g = count * log_p - torch.bmm(live, log_p) - (live * kl).sum(-1, keepdim=True)
                g = (g * p).mul_(scale).to(dtype).view(-1, N)  # gradient at the J logit rows
                d_states[rows] = torch.mm(g, w).view(-1, J, width)
                d_weight += torch.mm(g.T, flat)
        if grad:
            ctx.save_for_backward(d_states, d_weight)
            ctx.like = (states.dtype, weight.dtype)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return *_kept(ctx, g), None, None, None, None, None


def _kept(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients that a forward pass kept, of a loss whose own gradient is ``g``, in the types of what they are of."""
    x, weight = ctx.saved_tensors
    return (x * g).to(ctx.like[0]), (weight * g).to(ctx.like[1])


def _product_dtype(x: Tensor) -> torch.dtype:
    """The dtype that matrix products run in: autocast's where it is on."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _chunk_rows(columns: int, device: torch.device) -> int:
    """Rows whose logits make about 1 MiB (CPU, where they stay in the cache) or 256 MiB in float32.

    Products of fewer than 64 rows are slow, in bf16 above all; that outweighs a cache missed.
    """
    size = 2**18 if device.type == "cpu" else 2**26
    return max(size // max(columns, 1), 64)
