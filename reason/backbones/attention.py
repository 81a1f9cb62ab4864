"""Attention over token tries: one rule, and the kernel that obeys it cheapest.

The rule is that of `reason.backbones.trie`: a query at row q sees the key of row k
iff ``k <= q < exit[k]``. `trie_attention` applies it to any trie and picks a kernel
by predicted cost:

    dense   a boolean mask for scaled_dot_product_attention: any queries, any keys; the oracle
    tree    plain SDPA calls on pieces of root paths, which skip what is hidden (CPU)
    flex    FlexAttention with a BlockMask computed from ``exit`` by arithmetic (CUDA)

`comb_attention` is the same rule on `Trie.comb`, one generation of branch tokens at a
time and without a mask: what latent steps under every prefix of a history need.

There is no attention dropout. This module knows no projections, models or tokens.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.weak import WeakTensorKeyDictionary

from reason.backbones.trie import visible

KERNELS = ("auto", "dense", "tree", "flex")
BLOCK = 128  # rows of a FlexAttention tile
PIECE = 128  # longest stretch of queries in one SDPA call of the tree kernel


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
    kernel: "auto" takes the cheapest by `predict_cost`. "tree" and "flex" serve a whole pass (Q = S, both
        indices at their defaults); "tree" needs one trie for the whole batch and S rows of it.
    scale: factor on the dot products; default 1/sqrt(D).

    Give every layer of a pass the same ``exit`` tensor: what is derived from it is kept with it.

    Returns (B, H, Q, D). A query that sees no key gets zeros (dense, flex).

    Raises:
        ValueError: unknown kernel, or one that cannot serve these inputs.
    """
    if kernel not in KERNELS:
        raise ValueError(f"unknown attention kernel {kernel!r}: choose one of {', '.join(KERNELS)}")
    Q, S = query.shape[-2], key.shape[-2]
    whole = Q == S and query_index is None and key_index is None
    if kernel in ("tree", "flex") and not whole:
        raise ValueError(
            f"the {kernel} kernel serves whole passes only: use dense for {Q} queries over {S} keys"
        )
    if kernel == "auto":
        kernel = _cheapest(query, key, exit) if whole and S else "dense"
    if kernel == "tree":
        return _tree(query, key, value, exit, scale)
    if kernel == "flex":
        return _flex(query, key, value, exit, scale)
    if query_index is None:
        rows = torch.arange(S, device=key.device) if key_index is None else key_index
        query_index = rows[..., S - Q :]
    return _dense(query, key, value, visible(exit, query_index, key_index), scale)


# --- which kernel -----------------------------------------------------------------------------------

# Seconds per unit of work, forward only and forward + backward. CPU: fitted to SDPA in float32 on one
# thread of an AVX-512 server core (torch 2.13), S = 16..1024, D = 32..128: SDPA itself within a factor of
# 1.5, the tree's gathers only within 4 at batch 8. What decides is their ratio: a call weighs as much as
# about 4,000 pairs at H * D = 64. CUDA: orders of magnitude only, not yet fitted on a device: masked SDPA
# visits every pair at a third of FlexAttention's rate, which in turn pays for tens of small launches that
# build the BlockMask.
_PAIR = {"cpu": (60e-12, 220e-12), "cuda": (3e-15, 10e-15)}  # per query-key pair and channel
_ROW = {"cpu": (0.5e-9, 2.0e-9), "cuda": (1e-12, 3e-12)}  # per gathered row and channel
_CALL = {"cpu": (20e-6, 120e-6), "cuda": (20e-6, 50e-6)}  # per SDPA call with its gathers
_MASK = 1e-9  # per pair of a dense mask that is built
_FLEX = (200e-6, 400e-6)  # a compiled FlexAttention call with its BlockMask
_FLEX_RATE = 1 / 3  # of _PAIR


def predict_cost(
    kernel: str,
    *,
    pairs: int,
    channels: int,
    rows: int = 0,
    calls: int = 1,
    device: str = "cpu",
    grad: bool = False,
) -> float:
    """Seconds that a kernel is expected to take; good for choosing, not for reporting.

    pairs: query-key pairs it touches, hidden ones included where it does not skip them.
    channels: batch x heads x head width. rows: key and query rows it copies together. calls: SDPA calls.
    grad: whether a backward pass will follow.
    """
    side = int(grad)
    place = "cpu" if device == "cpu" else "cuda"
    pair, row, call = _PAIR[place][side], _ROW[place][side], _CALL[place][side]
    if kernel == "flex":
        return _FLEX[side] + pairs * channels * pair * _FLEX_RATE
    mask = pairs * _MASK if kernel == "dense" and place == "cpu" else 0.0
    return calls * call + pairs * channels * pair + rows * channels * row + mask


def _cheapest(query: Tensor, key: Tensor, exit: Tensor) -> str:
    """The kernel for a whole pass. Looks at the contents of ``exit`` on CPU only (no sync on CUDA)."""
    B, H, S, D = key.shape
    device = query.device.type
    grad = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)
    predict = functools.partial(predict_cost, channels=B * H * D, device=device, grad=grad)
    dense = predict("dense", pairs=S * S)
    if device == "cpu":
        least = predict("tree", pairs=S * (S + 1) // 2 if S > PIECE else S * 2, rows=3 * S)
        if exit.dim() > 1 or least > dense:
            return "dense"
        plan = _plan_for(exit, S, grad, B * H * D)
        if plan is None:
            return "dense"
        tree = predict("tree", pairs=plan.pairs, rows=plan.rows, calls=len(plan.pieces))
        return "tree" if tree < dense else "dense"
    # Half the tiles of a causal pass are empty; a trie only empties more.
    return "flex" if device == "cuda" and predict("flex", pairs=S * S // 2 + S * BLOCK) < dense else "dense"


# --- what is derived from exit, kept as long as exit lives ------------------------------------------

_derived: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _remember(exit: Tensor, name: Any, build: Callable[[], Any]) -> Any:
    """``build()``, once per ``exit`` tensor, version and name. The value must not refer to ``exit`` itself."""
    cached = _derived.get(exit)
    version = None if exit.is_inference() else exit._version  # inference tensors count no versions
    if cached is None or cached["version"] != version:
        cached = {"version": version}
        _derived[exit] = cached
    if name not in cached:
        cached[name] = build()
    return cached[name]


# --- dense ------------------------------------------------------------------------------------------


def _dense(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    if mask.dim() == 3:
        mask = mask.unsqueeze(1)  # (B, 1, Q, S)
    blind = ~mask.any(-1, keepdim=True)  # queries that see nothing: not every backend returns zeros there
    if query.device.type == "cpu" and not blind.any():
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask | blind, scale=scale)
    return out.masked_fill(blind, 0.0)


# --- tree: SDPA calls on pieces of root paths -------------------------------------------------------


@dataclass
class _Pieces:
    """Stretches of root paths that one SDPA call serves: G of them, padded to one shape.

    Each stretch is m consecutive tokens of a root path, with the p tokens above them as further keys.
    Short paths are padded in front, short stretches behind.
    """

    query: Tensor  # (G, m) rows
    key: Tensor  # (G, p + m) rows
    mask: Tensor  # (G or 1, m, p + m) bool
    real: Tensor  # (G, m) bool, false where padded


@dataclass
class _Plan:
    pieces: list[_Pieces]
    order: Tensor  # (S,) where each row's result lies when all results are put end to end
    pairs: int = 0
    rows: int = 0


def _plan_for(exit: Tensor, S: int, grad: bool, channels: int) -> _Plan | None:
    """The plan of a trie, or None if ``exit`` is not one over S rows. A call's overhead in pairs is rounded
    to a power of two so that few different plans arise."""
    overhead = _CALL["cpu"][grad] / (_PAIR["cpu"][grad] * channels)
    spare = 2 ** max(0, round(math.log2(max(overhead, 1.0))))
    return _remember(exit, ("plan", spare), lambda: _make_plan(exit.tolist(), S, spare))


def _make_plan(exit: list[int], S: int, spare: int) -> _Plan | None:
    stretches = _stretches(exit, S)
    if stretches is None:
        return None
    stretches.sort(key=lambda s: (len(s[1]), len(s[0])))
    groups: list[list[tuple[list[int], list[int]]]] = []
    wide = [0, 0, 0]  # count, longest path, longest stretch of the open group
    for path, own in stretches:
        p, m = len(path), len(own)
        if groups:
            count, top, long = wide
            both = (count + 1) * max(long, m) * (max(top, p) + max(long, m))
            if both <= count * long * (top + long) + m * (p + m) + spare:
                groups[-1].append((path, own))
                wide = [count + 1, max(top, p), max(long, m)]
                continue
        groups.append([(path, own)])
        wide = [1, p, m]

    plan = _Plan([], torch.empty(S, dtype=torch.int64))
    start = 0
    for group in groups:
        p, m = max(len(path) for path, _ in group), max(len(own) for _, own in group)
        query = torch.tensor([own + own[-1:] * (m - len(own)) for _, own in group])
        above = torch.tensor([own[:1] * (p - len(path)) + path for path, own in group], dtype=torch.int64)
        step, ahead = torch.arange(m), torch.arange(p)
        real = step < torch.tensor([[len(own)] for _, own in group])  # (G, m)
        causal = (step <= step.unsqueeze(-1)).expand(len(group), m, m)
        reach = (ahead >= p - torch.tensor([[len(path)] for path, _ in group])).unsqueeze(1)  # (G, 1, p)
        mask = torch.cat([reach.expand(len(group), m, p), causal], -1)
        if all(len(path) == p for path, _ in group):
            mask = mask[:1]
        pieces = _Pieces(query, torch.cat([above, query], -1), mask.contiguous(), real)
        plan.pieces.append(pieces)
        plan.order[query[real]] = start + real.flatten().nonzero().squeeze(-1)
        start += query.numel()
        plan.pairs += query.numel() * (p + m)
        plan.rows += 2 * pieces.key.numel() + 2 * query.numel()
    return plan


def _stretches(exit: list[int], S: int) -> list[tuple[list[int], list[int]]] | None:
    """Cut a trie into stretches of root paths: (rows above, own rows), own rows at most PIECE long.

    A token goes on with its last child; every other child starts a branch. None if the subtrees are
    not nested, or a row hides from itself: then ``exit`` is a mask but no trie.
    """
    if len(exit) != S:
        return None
    found: list[tuple[list[int], list[int]]] = []
    open_path: list[int] = []  # ancestors of the row at hand
    stretch_of: dict[int, tuple[list[int], list[int]]] = {}
    for row in range(S):
        end = min(exit[row], S)
        while open_path and min(exit[open_path[-1]], S) <= row:
            open_path.pop()
        if end <= row or (open_path and end > exit[open_path[-1]]):
            return None
        last_child = open_path and min(exit[open_path[-1]], S) == end
        stretch = stretch_of[open_path[-1]] if last_child else None
        if stretch is None or len(stretch[1]) >= PIECE:
            stretch = (open_path.copy(), [])
            found.append(stretch)
        stretch[1].append(row)
        stretch_of[row] = stretch
        open_path.append(row)
    return found


def _tree(query: Tensor, key: Tensor, value: Tensor, exit: Tensor, scale: float | None) -> Tensor:
    B, H, S, D = key.shape
    if exit.dim() > 1:
        raise ValueError(
            "the tree kernel needs one trie shared by the batch (exit of shape (S,)): use dense or flex"
        )
    if S == 0:
        return query
    grad = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)
    plan = _plan_for(exit, S, grad, B * H * D)
    if plan is None:
        raise ValueError(
            "the tree kernel needs nested exits, one per row and beyond it: use dense for other masks"
        )
    parts = []
    for piece in plan.pieces:
        G, m = piece.query.shape
        shape = (B * H, G, -1, D)
        q = query.index_select(2, piece.query.flatten().to(query.device)).reshape(shape)
        rows = piece.key.flatten().to(key.device)
        k, v = key.index_select(2, rows).reshape(shape), value.index_select(2, rows).reshape(shape)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=piece.mask.to(q.device).unsqueeze(0), scale=scale
        )
        parts.append(out.reshape(B, H, G * m, D))
    return torch.cat(parts, 2).index_select(2, plan.order.to(query.device))


# --- flex: FlexAttention with an analytic BlockMask -------------------------------------------------


def block_mask(exit: Tensor, block: int = BLOCK) -> BlockMask:
    """The BlockMask of a trie, from reductions over blocks of ``exit``: O(S + (S / block)^2).

    exit: (S,) or (B, S). S is padded up to a multiple of ``block``; padding rows see themselves only.
    A tile below the diagonal is empty iff its first query lies past every exit of its keys, and full
    iff its last query lies before all of them; tiles on the diagonal are partial.

    Same tiles as `torch.nn.attention.flex_attention.create_block_mask`, which evaluates the rule at all
    S x S pairs. The rule reads ``exit`` as a captured tensor, so new values do not recompile a kernel.
    """
    rows = exit if exit.dim() == 2 else exit.unsqueeze(0)
    B, S = rows.shape
    count = -(-S // block)
    padded = torch.arange(1, count * block + 1, device=exit.device).expand(B, -1).clone()
    padded[:, :S] = rows
    tiles = padded.view(B, count, block)
    latest, earliest = tiles.amax(-1).unsqueeze(1), tiles.amin(-1).unsqueeze(1)  # (B, 1, key blocks)
    number = torch.arange(count, device=exit.device)
    first = (number * block).unsqueeze(-1)  # (query blocks, 1)
    below = number.unsqueeze(-1) > number
    full = below & (first + block <= earliest)
    partial = (below & (first < latest) & ~full) | torch.eye(count, dtype=torch.bool, device=exit.device)

    shared = padded[0]

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (q < padded[b, k])

    def all_see(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:  # one trie for the whole batch
        return (k <= q) & (q < shared[k])

    return BlockMask.from_kv_blocks(
        *_listed(partial),
        *_listed(full),
        BLOCK_SIZE=block,
        mask_mod=sees if exit.dim() == 2 else all_see,
        seq_lengths=(count * block, count * block),
    )


def _listed(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """(B, R, C) bool -> how many key blocks each query block has (B, 1, R) and which come first (B, 1, R, C)."""
    tiles = tiles.unsqueeze(1)
    order = tiles.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return tiles.sum(-1).to(torch.int32), order.to(torch.int32)


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(flex_attention)


def _flex(query: Tensor, key: Tensor, value: Tensor, exit: Tensor, scale: float | None) -> Tensor:
    S = query.shape[-2]
    mask = _remember(exit, "flex", lambda: block_mask(exit))
    spare = mask.seq_lengths[0] - S
    q, k, v = (F.pad(x, (0, 0, 0, spare)) if spare else x for x in (query, key, value))
    if query.device.type == "cuda":
        return _compiled_flex()(q, k, v, block_mask=mask, scale=scale)[:, :, :S]
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        raise ValueError(
            "FlexAttention has no backward pass on CPU: use the tree or dense kernel to train there"
        )
    with warnings.catch_warnings():  # it says that it is slow uncompiled; here it only serves checks
        warnings.filterwarnings("ignore", message=".*flex_attention.*")
        return flex_attention(q, k, v, block_mask=mask, scale=scale)[:, :, :S]  # type: ignore[index]


# --- comb: one generation under every trunk position ------------------------------------------------


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
    (B, H, G, T, J, D), trunk still (B, H, T, D). Rows of different length are padded at the end: no
    real query sees the padding.

    Returns the shape of ``query``. Same numbers as `trie_attention` on ``Trie.comb``, from T * (T + J)
    pairs instead of T * T * (J + 1). First-order gradients only.
    """
    if query.dim() == 4:
        query, branch_key, branch_value = (x.unsqueeze(2) for x in (query, branch_key, branch_value))
        return comb_attention(query, trunk_key, trunk_value, branch_key, branch_value, scale=scale).squeeze(2)
    device = query.device.type
    inputs = (query, trunk_key, trunk_value, branch_key, branch_value)
    if torch.is_autocast_enabled(device):
        inputs = tuple(x.to(torch.get_autocast_dtype(device)) for x in inputs)
    with torch.autocast(device, enabled=False):
        return _Comb.apply(*inputs, query.shape[-1] ** -0.5 if scale is None else scale)


class _Comb(torch.autograd.Function):
    """Trunk scores by one matrix product per head, branch scores by elementwise products, one softmax
    over both in place. Per branch key there is one pass over contiguous rows: products of a batch of
    1 x D by D x J matrices are several times slower, and broadcasting over J twice."""

    @staticmethod
    def forward(ctx, query, trunk_key, trunk_value, branch_key, branch_value, scale):
        B, H, G, T, D = query.shape
        J = branch_key.shape[-2]
        heads = B * H
        q = (query * scale).reshape(heads, G * T, D)
        key, value = trunk_key.reshape(heads, T, D), trunk_value.reshape(heads, T, D)
        future = torch.full((T, T), -math.inf, dtype=q.dtype, device=q.device).triu(1)
        p = q.new_empty(B, H, G, T, T + J)
        torch.add(torch.bmm(q, key.transpose(1, 2)).view(B, H, G, T, T), future, out=p[..., :T])
        q = q.view(B, H, G, T, D)
        for j in range(J):
            torch.sum(q * branch_key[..., j, :], -1, out=p[..., T + j])
        torch.softmax(p, -1, out=p)
        out = torch.bmm(p[..., :T].reshape(heads, G * T, T), value).view(B, H, G, T, D)
        for j in range(J):
            out.addcmul_(p[..., T + j, None], branch_value[..., j, :])
        ctx.save_for_backward(query, trunk_key, trunk_value, branch_key, branch_value, p)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        query, trunk_key, trunk_value, branch_key, branch_value, p = ctx.saved_tensors
        B, H, G, T, D = query.shape
        J = branch_key.shape[-2]
        heads = B * H
        q, g = query.contiguous(), g.contiguous()
        q_flat, g_flat = q.view(heads, G * T, D), g.view(heads, G * T, D)
        key, value = trunk_key.reshape(heads, T, D), trunk_value.reshape(heads, T, D)
        d_branch_key = branch_key.new_empty(branch_key.shape)
        d_branch_value = branch_value.new_empty(branch_value.shape)

        d_p = torch.empty_like(p)
        d_p[..., :T] = torch.bmm(g_flat, value.transpose(1, 2)).view(B, H, G, T, T)
        for j in range(J):
            torch.sum(g * branch_value[..., j, :], -1, out=d_p[..., T + j])
            torch.mul(g, p[..., T + j, None], out=d_branch_value[..., j, :])
        d_value = torch.bmm(p[..., :T].reshape(heads, G * T, T).transpose(1, 2), g_flat)
        d_score = torch.ops.aten._softmax_backward_data(d_p, p, -1, p.dtype).mul_(ctx.scale)
        d_trunk = d_score[..., :T].reshape(heads, G * T, T)
        d_key = torch.bmm(d_trunk.transpose(1, 2), q_flat)
        d_query = torch.bmm(d_trunk, key).view(B, H, G, T, D)
        for j in range(J):
            own = d_score[..., T + j, None]
            d_query.addcmul_(own, branch_key[..., j, :])
            torch.mul(own, q, out=d_branch_key[..., j, :])
        return d_query, d_key.view(B, H, T, D), d_value.view(B, H, T, D), d_branch_key, d_branch_value, None
