"""The CUDA side of attention: compiled FlexAttention and the comb against the dense oracle."""

from __future__ import annotations

import pytest
import torch

from reason.backbones.attention import block_mask, comb_attention, trie_attention
from reason.backbones.losses import linear_cross_entropy, pairwise_kl
from reason.backbones.trie import Trie

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TOLERANCE = {torch.float32: 5e-3, torch.bfloat16: 4e-2}  # TF32 products in the compiled kernel


def layout(turns: int, question: int, thought: int, answer: int) -> Trie:
    parent: list[int] = []
    spine = -1
    for _ in range(turns):
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


def leaves(*shapes, dtype) -> list[torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    return [torch.randn(s, device="cuda", generator=generator).to(dtype).requires_grad_() for s in shapes]


def agree(found, expected, inputs, tolerance):
    g = torch.randn_like(expected)
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
    for a, b in zip(
        torch.autograd.grad(found, inputs, g), torch.autograd.grad(expected, inputs, g), strict=True
    ):
        assert (a - b).float().norm() <= tolerance * b.float().norm() + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["turns", "comb", "pack", "per row"])
def test_flex_equals_dense_forward_and_backward(name, dtype):
    tries = {
        "turns": layout(4, 30, 90, 30),
        "comb": Trie.comb(50, 2),
        "pack": Trie.pack([Trie.chain(200), layout(2, 9, 50, 9), Trie.chain(1)]),
    }
    if name == "per row":
        exit = torch.stack([Trie.chain(150).exit, Trie.comb(50, 2).exit]).cuda()
    else:
        exit = tries[name].exit.cuda()
    S = exit.shape[-1]
    inputs = leaves(*[(2, 2, S, 64)] * 3, dtype=dtype)
    flex = trie_attention(*inputs, exit=exit, kernel="flex")
    dense = trie_attention(*inputs, exit=exit, kernel="dense")
    agree(flex, dense, inputs, TOLERANCE[dtype])


def test_new_values_do_not_recompile():
    inputs = leaves(*[(1, 2, 256, 64)] * 3, dtype=torch.bfloat16)
    trie_attention(*inputs, exit=Trie.chain(256).exit.cuda(), kernel="flex")
    with torch.compiler.set_stance("fail_on_recompile"):
        trie_attention(*inputs, exit=Trie.comb(64, 3).exit.cuda(), kernel="flex")


def test_block_mask_is_built_on_the_device():
    exit = layout(3, 40, 200, 40).exit
    here, there = block_mask(exit), block_mask(exit.cuda())
    assert torch.equal(here.to_dense(), there.to_dense().cpu())


def test_a_query_that_sees_nothing_gets_zeros():
    inputs = leaves(*[(1, 2, 5, 64)] * 3, dtype=torch.bfloat16)
    out = trie_attention(*inputs, exit=torch.tensor([0, 5, 5, 5, 5], device="cuda"), kernel="dense")
    assert not out[:, :, 0].any()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_comb_equals_the_trie(dtype):
    B, H, G, T, J, D = 4, 2, 2, 50, 2, 32
    inputs = leaves(
        (B, H, G, T, D), (B, H, T, D), (B, H, T, D), (B, H, G, T, J, D), (B, H, G, T, J, D), dtype=dtype
    )
    query, trunk_key, trunk_value, branch_key, branch_value = inputs
    exit, newest = Trie.comb(T, J).exit.cuda(), torch.arange(T, device="cuda") * (J + 1) + J
    expected = [
        trie_attention(
            query[:, :, g],
            torch.cat([trunk_key.unsqueeze(3), branch_key[:, :, g]], 3).flatten(2, 3),
            torch.cat([trunk_value.unsqueeze(3), branch_value[:, :, g]], 3).flatten(2, 3),
            exit=exit,
            query_index=newest,
            kernel="dense",
        )
        for g in range(G)
    ]
    agree(comb_attention(*inputs), torch.stack(expected, 2), inputs, TOLERANCE[dtype])


def test_losses_on_the_device_equal_those_on_the_cpu():
    hidden, weight = torch.randn(300, 16), torch.randn(90, 16)
    target = torch.randint(0, 90, (300,))
    target[::4] = -100
    results = []
    for device in ("cpu", "cuda"):
        h = hidden.to(device, copy=True).requires_grad_()
        w = weight.to(device, copy=True).requires_grad_()
        loss = linear_cross_entropy(h, w, target.to(device), scale=2.0, chunk=64)
        spread = pairwise_kl(h.view(100, 3, 16), w, scale=0.5, bound=3.0, chunk=16)
        results.append([x.cpu() for x in (loss, spread, *torch.autograd.grad(loss - spread, (h, w)))])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-3)
