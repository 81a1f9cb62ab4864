"""Attention over token tries: one rule, four kernels.

The rule is that of `reason.backbones.trie`: a query at row q sees the key of row k
iff ``k <= q < exit[k]``. `trie_attention` applies it to any trie and picks a kernel
by predicted cost:

    dense   a boolean mask for scaled_dot_product_attention: any queries, any keys; the oracle
    tree    plain SDPA calls, one spine and its branches, that never touch a hidden pair (CPU)
    flex    FlexAttention with a BlockMask computed from ``exit`` by arithmetic (CUDA)

`comb_attention` is the same rule on `Trie.comb`, one generation of branch tokens at a
time, without the mask: what latent steps under every prefix of a history need.

There is no attention dropout. This module knows no projections, heads or models.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from reason.backbones.trie import visible

KERNELS = ("auto", "dense", "tree", "flex")


def trie_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    exit: Tensor,
    query_index: Tensor | None = None,
    key_index: Tensor | None = None,
    kernel: str = "auto",
    scale: float | None = None,
) -> Tensor:
    """Softmax attention in which query q sees key k iff ``key_index <= query_index < exit``.

    query: (B, H, Q, D); key, value: (B, H, S, D); exit: (S,) or (B, S), one per key.
    key_index: physical row of each key, (S,) or (B, S); default 0..S-1.
    query_index: physical row of each query, (Q,) or (B, Q); default the rows of the last Q keys.
    scale: factor on the dot products; default 1/sqrt(D).

    Returns (B, H, Q, D). A query that sees no key gets zeros.
    """
    if query_index is None:
        Q, S = query.shape[-2], key.shape[-2]
        rows = torch.arange(S, device=key.device) if key_index is None else key_index
        query_index = rows[..., S - Q :]
    mask = visible(exit, query_index, key_index)
    return _dense(query, key, value, mask, scale)


def _dense(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    if mask.dim() == 3:
        mask = mask.unsqueeze(1)  # (B, 1, Q, S)
    blind = ~mask.any(-1, keepdim=True)  # queries that see nothing: not every backend returns zeros there
    if query.device.type == "cpu" and not blind.any():
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask | blind, scale=scale)
    return out.masked_fill(blind, 0.0)


def comb_attention(
    query: Tensor,
    trunk_key: Tensor,
    trunk_value: Tensor,
    branch_key: Tensor,
    branch_value: Tensor,
    *,
    scale: float | None = None,
) -> Tensor:
    """One generation of a comb: the newest branch token under every trunk position attends at once.

    query: (B, H, T, D); trunk_key, trunk_value: (B, H, T, D), query t sees trunk keys <= t;
    branch_key, branch_value: (B, H, T, J, D), query t sees all J keys of its own branch (its own
    included). Several branches may share one trunk: query (B, H, G, T, D), branches
    (B, H, G, T, J, D), trunk still (B, H, T, D).

    Returns the shape of ``query``. Same numbers as `trie_attention` on ``Trie.comb``, in
    T * (T + J) pairs instead of T * T * (J + 1).
    """
    if query.dim() == 4:
        out = comb_attention(
            query.unsqueeze(2), trunk_key, trunk_value, branch_key.unsqueeze(2), branch_value.unsqueeze(2), scale=scale
        )
        return out.squeeze(2)
    T, D = query.shape[-2:]
    q = query * (D**-0.5 if scale is None else scale)
    future = torch.full((T, T), -math.inf, dtype=q.dtype, device=q.device).triu(1)
    trunk = torch.einsum("bhgtd,bhsd->bhgts", q, trunk_key) + future
    own = (q.unsqueeze(-2) * branch_key).sum(-1)  # (B, H, G, T, J)
    p = torch.cat([trunk, own], -1).softmax(-1)
    mixed = torch.einsum("bhgts,bhsd->bhgtd", p[..., :T], trunk_value)
    return mixed + (p[..., T:].unsqueeze(-1) * branch_value).sum(-2)
