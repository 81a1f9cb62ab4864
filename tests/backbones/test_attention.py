"""Every kernel against a slow softmax over the ancestors, and the kernels against each other."""

from __future__ import annotations

import math
import random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask

from reason.backbones import attention
from reason.backbones.attention import block_mask, comb_attention, predict_cost, trie_attention
from reason.backbones.trie import Trie


def forest(size: int, seed: int) -> Trie:
    """A random forest with long stretches, branches and several roots."""
    rng = random.Random(seed)
    parent, path = [-1], [0]
    for row in range(1, size):
        draw = rng.random()
        up = path[-1] if draw < 0.8 else rng.choice(path) if draw < 0.97 else -1
        while path and path[-1] != up:
            path.pop()
        parent.append(up)
        path.append(row)
    return Trie.from_parents(parent)


def turns(count: int, question: int, thought: int, answer: int) -> Trie:
    """The layout of one-pass reasoning: a spine of questions and answers, a branch of thought per turn."""
    parent: list[int] = []
    spine = -1
    for _ in range(count):
        for _ in range(question):
            parent.append(spine)
            spine = len(parent) - 1
        up = spine
        for _ in range(thought + answer):
            parent.append(up)
            up = len(parent) - 1
        for _ in range(answer):
            parent.append(spine)
            spine = len(parent) - 1
    return Trie.from_parents(parent)


def tensors(
    batch: int, heads: int, size: int, width: int, seed: int = 0, grad: bool = False
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, heads, size, width, generator=generator).requires_grad_(grad) for _ in range(3)
    ]


def slow(query, key, value, trie: Trie, scale: float | None = None) -> torch.Tensor:
    """Row by row over the root path."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    rows = []
    for row in range(len(trie)):
        path = trie.path(row)
        weight = (query[:, :, row : row + 1] @ key[:, :, path].transpose(-1, -2) * scale).softmax(-1)
        rows.append(weight @ value[:, :, path])
    return torch.cat(rows, 2)


@pytest.mark.parametrize("kernel", ["dense", "tree", "flex", "auto"])
@pytest.mark.parametrize("size", [1, 3, 40])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_kernels_attend_to_ancestors(kernel, size, scale):
    trie = forest(size, seed=size)
    q, k, v = tensors(2, 3, size, 8)
    out = trie_attention(q, k, v, exit=trie.exit, kernel=kernel, scale=scale)
    torch.testing.assert_close(out, slow(q, k, v, trie, scale), atol=1e-5, rtol=1e-5)


TRIES = {
    "chain of one": Trie.chain(1),
    "chain longer than a piece": Trie.chain(attention.PIECE * 2 + 7),
    "comb": Trie.comb(12, 3),
    "turns": turns(4, 9, 30, 8),
    "pack with padding": Trie.pack([Trie.chain(20), Trie.comb(5, 2), *[Trie.chain(1)] * 11]),
    "forest": forest(300, seed=4),
}


@pytest.mark.parametrize("name", TRIES)
def test_tree_equals_dense_with_gradients(name):
    trie = TRIES[name]
    inputs = tensors(2, 2, len(trie), 8, grad=True)
    g = torch.randn(2, 2, len(trie), 8)
    results = []
    for kernel in ("dense", "tree"):
        out = trie_attention(*inputs, exit=trie.exit, kernel=kernel)
        results.append((out, *torch.autograd.grad(out, inputs, g)))
    for dense, tree in zip(*results, strict=True):
        torch.testing.assert_close(tree, dense, atol=1e-5, rtol=1e-5)


def test_tree_touches_few_hidden_pairs():
    trie = turns(6, 10, 40, 10)
    plan = attention._plan_for(trie.exit, len(trie), True, 64)
    assert plan is not None
    assert trie.pairs() <= plan.pairs < len(trie) ** 2 / 2
    assert len(plan.pieces) <= 8  # one call per turn at most, not one per row


def test_tree_needs_nested_exits():
    q, k, v = tensors(1, 1, 4, 4)
    for exit in ([2, 3, 4, 4], [4, 1, 4, 4]):  # crossing subtrees; a row hidden from itself
        exit = torch.tensor(exit)
        with pytest.raises(ValueError, match="nested"):
            trie_attention(q, k, v, exit=exit, kernel="tree")
        trie_attention(q, k, v, exit=exit)  # auto falls back


def test_one_trie_per_row():
    tries = [Trie.chain(9), Trie.pack([Trie.comb(3, 2)]), forest(9, seed=1)]
    exit = torch.stack([t.exit for t in tries])
    q, k, v = tensors(3, 2, 9, 4)
    expected = torch.cat([slow(q[i : i + 1], k[i : i + 1], v[i : i + 1], t) for i, t in enumerate(tries)])
    for kernel in ("auto", "dense", "flex"):
        out = trie_attention(q, k, v, exit=exit, kernel=kernel)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="one trie shared"):
        trie_attention(q, k, v, exit=exit, kernel="tree")


def test_chosen_queries_and_keys():
    trie = forest(50, seed=9)
    q, k, v = tensors(2, 2, 50, 8)
    whole = trie_attention(q, k, v, exit=trie.exit, kernel="dense")
    # The default queries are the last rows.
    torch.testing.assert_close(trie_attention(q[:, :, -7:], k, v, exit=trie.exit), whole[:, :, -7:])
    # A cache that holds the root path of row 42 alone, in any order.
    path = trie.path(42).flip(0)
    one = trie_attention(
        q[:, :, 42:43],
        k[:, :, path],
        v[:, :, path],
        exit=trie.exit[path],
        key_index=path,
        query_index=torch.tensor([42]),
    )
    torch.testing.assert_close(one, whole[:, :, 42:43], atol=1e-5, rtol=1e-5)


def test_a_query_that_sees_nothing_gets_zeros_and_no_gradient():
    inputs = tensors(1, 2, 5, 4, grad=True)
    exit = torch.tensor([0, 5, 5, 5, 5])  # row 0 hides from itself: query 0 sees nothing
    out = trie_attention(*inputs, exit=exit, kernel="dense")
    assert torch.equal(out[:, :, 0], torch.zeros(1, 2, 4))
    grads = torch.autograd.grad(out.sum(), inputs)
    assert all(g.isfinite().all() for g in grads)
    assert not grads[0][:, :, 0].any() and not grads[2][:, :, 0].any()


@pytest.mark.parametrize("kernel", ["dense", "tree"])
def test_what_is_hidden_leaks_nothing(kernel):
    trie = turns(2, 3, 4, 2)
    branch = range(3, 9)  # thought and answer of the first turn
    q, k, v = tensors(1, 2, len(trie), 4)
    before = trie_attention(q, k, v, exit=trie.exit, kernel=kernel)
    k[:, :, branch], v[:, :, branch] = 7.0, -7.0
    after = trie_attention(q, k, v, exit=trie.exit, kernel=kernel)
    assert torch.equal(before[:, :, 9:], after[:, :, 9:])
    assert not torch.allclose(before[:, :, 3:9], after[:, :, 3:9])


def test_unknown_kernel_and_wrong_use():
    q, k, v = tensors(1, 1, 4, 4, grad=True)
    exit = Trie.chain(4).exit
    with pytest.raises(ValueError, match="choose one of"):
        trie_attention(q, k, v, exit=exit, kernel="sparse")
    with pytest.raises(ValueError, match="whole passes"):
        trie_attention(q[:, :, -1:], k, v, exit=exit, kernel="tree")
    with pytest.raises(ValueError, match="no backward pass on CPU"):
        trie_attention(q, k, v, exit=exit, kernel="flex")


def test_a_changed_exit_is_noticed():
    q, k, v = tensors(1, 1, 6, 4)
    exit = Trie.chain(6).exit
    trie_attention(q, k, v, exit=exit, kernel="tree")
    exit.copy_(Trie.pack([Trie.chain(3), Trie.chain(3)]).exit)
    for kernel in ("tree", "flex"):
        out = trie_attention(q, k, v, exit=exit, kernel=kernel)
        torch.testing.assert_close(out, trie_attention(q, k, v, exit=exit, kernel="dense"))


# --- flex: the analytic BlockMask -------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(1, 70), st.integers(0, 10**6)), min_size=1, max_size=3))
@settings(max_examples=25, deadline=None)
def test_block_mask_has_the_tiles_that_evaluation_finds(layout):
    trie = Trie.pack([forest(size, seed) for size, seed in layout])
    block = 16
    size = -(-len(trie) // block) * block
    exit = torch.arange(1, size + 1)
    exit[: len(trie)] = trie.exit
    expected = create_block_mask(
        lambda b, h, q, k: (k <= q) & (q < exit[k]), None, None, size, size, device="cpu", BLOCK_SIZE=block
    )
    found = block_mask(trie.exit, block)
    for kind in ("kv", "full_kv", "q", "full_q"):
        assert tiles(found, kind) == tiles(expected, kind), kind
    assert torch.equal(found.to_dense(), expected.to_dense())


def tiles(mask, kind: str) -> list[list[int]]:
    """The listed blocks of each row; what lies beyond the count is filling."""
    counts, indices = getattr(mask, f"{kind}_num_blocks")[0, 0], getattr(mask, f"{kind}_indices")[0, 0]
    return [sorted(row[:n].tolist()) for n, row in zip(counts.tolist(), indices, strict=True)]


def test_block_mask_skips_and_fills():
    """Two long chains in a pack: the second never visits the first, and far tiles are full."""
    mask = block_mask(Trie.pack([Trie.chain(64), Trie.chain(64)]).exit, 16)
    assert tiles(mask, "kv") == [[i] for i in range(8)]
    assert tiles(mask, "full_kv") == [list(range(i % 4 and i - i % 4, i)) if i % 4 else [] for i in range(8)]


def test_padding_rows_see_themselves_only():
    mask = block_mask(Trie.chain(5).exit, 8)
    rows = torch.arange(8)
    sees = mask.mask_mod(torch.tensor(0), torch.tensor(0), rows.unsqueeze(-1), rows)
    assert torch.equal(sees[5:], torch.eye(8, dtype=torch.bool)[5:])
    assert torch.equal(sees[:5, :5], Trie.chain(5).visible())


def test_flex_equals_dense_beyond_one_tile():
    trie = Trie.pack([turns(2, 9, 50, 9), Trie.comb(20, 2), forest(70, seed=3)])
    q, k, v = tensors(2, 2, len(trie), 16)
    dense = trie_attention(q, k, v, exit=trie.exit, kernel="dense")
    flex = trie_attention(q, k, v, exit=trie.exit, kernel="flex")
    torch.testing.assert_close(flex, dense, atol=1e-5, rtol=1e-5)


# --- the choice -------------------------------------------------------------------------------------


def choice(trie: Trie, batch: int = 1, grad: bool = True) -> str:
    q, k, _ = tensors(batch, 4, len(trie), 48, grad=grad)
    return attention._cheapest(q, k, trie.exit)


def test_short_tries_go_dense_and_long_branches_go_tree():
    assert choice(Trie.comb(20, 2)) == "dense"
    assert choice(Trie.comb(50, 2), batch=8) == "dense"
    assert choice(turns(1, 8, 16, 8)) == "dense"
    assert choice(turns(8, 32, 96, 32)) == "tree"
    assert choice(Trie.pack([Trie.chain(64)] * 8)) == "tree"
    assert choice(Trie.chain(1024), grad=False) == "tree"


@pytest.mark.parametrize("kernel", ["dense", "tree", "flex"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_cost_grows_with_work(kernel, device):
    base = {"pairs": 10_000, "channels": 256, "rows": 100, "calls": 2, "device": device}
    cost = predict_cost(kernel, **base)
    assert cost > 0
    assert predict_cost(kernel, **base | {"pairs": 10**7}) > cost
    assert predict_cost(kernel, **base | {"channels": 4096}) > cost
    assert predict_cost(kernel, **base, grad=True) > cost
    if kernel == "tree":
        assert predict_cost(kernel, **base | {"rows": 10**6}) > cost
        assert predict_cost(kernel, **base | {"calls": 20}) > cost


# --- comb -------------------------------------------------------------------------------------------


def comb_inputs(B, H, G, T, J, D, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(B, H, G, T, D), (B, H, T, D), (B, H, T, D), (B, H, G, T, J, D), (B, H, G, T, J, D)]
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]


def comb_by_trie(query, trunk_key, trunk_value, branch_key, branch_value, scale=None):
    """The newest generation of ``Trie.comb(T, J)`` under the dense kernel, one branch set at a time."""
    G, T, J = query.shape[2], query.shape[3], branch_key.shape[-2]
    trie = Trie.comb(T, J)
    newest = torch.arange(T) * (J + 1) + J
    out = []
    for g in range(G):
        key = torch.cat([trunk_key.unsqueeze(3), branch_key[:, :, g]], 3).flatten(2, 3)
        value = torch.cat([trunk_value.unsqueeze(3), branch_value[:, :, g]], 3).flatten(2, 3)
        out.append(
            trie_attention(
                query[:, :, g], key, value, exit=trie.exit, query_index=newest, kernel="dense", scale=scale
            )
        )
    return torch.stack(out, 2)


@pytest.mark.parametrize("G", [1, 2])
@pytest.mark.parametrize("J", [1, 2, 3])
@pytest.mark.parametrize("scale", [None, 1.7])
def test_comb_equals_the_trie_with_gradients(G, J, scale):
    inputs = comb_inputs(2, 3, G, 7, J, 8)
    g = torch.randn(2, 3, G, 7, 8)
    results = []
    for attend in (comb_attention, comb_by_trie):
        out = attend(*inputs, scale=scale)
        results.append((out, *torch.autograd.grad(out, inputs, g)))
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, atol=1e-5, rtol=1e-5)


def test_comb_with_one_set_of_branches_needs_no_axis_for_it():
    inputs = comb_inputs(2, 2, 1, 5, 2, 4)
    squeezed = [x.squeeze(2) if x.dim() > 4 else x for x in inputs]
    out = comb_attention(*squeezed)
    assert out.shape == (2, 2, 5, 4)
    assert torch.equal(out, comb_attention(*inputs).squeeze(2))


def test_comb_gradients_by_finite_differences():
    inputs = comb_inputs(1, 2, 2, 3, 2, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(comb_attention, inputs)


def test_comb_reads_views_as_well():
    """Heads split off by a transpose, branches stacked elsewhere: nothing is contiguous."""
    inputs = comb_inputs(2, 3, 2, 5, 2, 4)
    views = [x.detach().transpose(1, -2).contiguous().transpose(1, -2).requires_grad_() for x in inputs]
    out, expected = comb_attention(*views), comb_attention(*inputs)
    torch.testing.assert_close(out, expected)
    g = torch.randn(2, 3, 2, 4, 5).transpose(-1, -2)
    for a, b in zip(
        torch.autograd.grad(out, views, g), torch.autograd.grad(expected, inputs, g), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_comb_survives_large_scores():
    q, k, v, bk, bv = (x.detach() for x in comb_inputs(1, 1, 1, 6, 2, 4))
    out = comb_attention(q * 1e4, k, v, bk, bv)
    assert out.isfinite().all()
    assert out.abs().max() <= max(v.abs().max(), bv.abs().max()) + 1e-5  # a mean of values


def test_comb_under_autocast_runs_low_and_keeps_gradients_wide():
    inputs = comb_inputs(2, 2, 2, 6, 2, 8)
    exact = comb_attention(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = comb_attention(*inputs)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), exact, atol=0.05, rtol=0.05)
    for low, wide in zip(
        torch.autograd.grad(out.float().sum(), inputs), torch.autograd.grad(exact.sum(), inputs), strict=True
    ):
        assert low.dtype == torch.float32
        torch.testing.assert_close(low, wide, atol=0.1, rtol=0.1)


def test_comb_trunk_is_causal():
    """Trunk positions after t, padding among them, reach no query up to t."""
    q, k, v, bk, bv = (x.detach() for x in comb_inputs(1, 2, 2, 8, 2, 4))
    before = comb_attention(q, k, v, bk, bv)
    k[:, :, 5:], v[:, :, 5:], bk[:, :, :, 5:] = 9.0, math.pi, -9.0
    after = comb_attention(q, k, v, bk, bv)
    assert torch.equal(before[:, :, :, :5], after[:, :, :, :5])
    assert not torch.allclose(before[:, :, :, 5:], after[:, :, :, 5:])


def test_chain_equals_causal_sdpa():
    q, k, v = tensors(2, 2, 200, 8)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    for kernel in ("dense", "tree", "flex"):
        out = trie_attention(q, k, v, exit=Trie.chain(200).exit, kernel=kernel)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
