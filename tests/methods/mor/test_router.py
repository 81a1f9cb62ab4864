"""Routers, their routes and what teaches them, each against its definition."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reason.methods.mor.outcomes import decoder_flops
from reason.methods.mor.router import (
    Router,
    auxiliary_loss,
    balance_bias,
    gate,
    max_violation,
    normalised_entropy,
    top_k,
    z_loss,
)

_spec = importlib.util.spec_from_file_location("mor_small", Path(__file__).with_name("small.py"))
small = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(small)


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=1, max_size=12), st.integers(1, 12))
def test_top_k_is_sorted_and_ties_go_to_the_earlier(scores, k):
    k = min(k, len(scores))
    want = sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k])
    assert top_k(torch.tensor([scores]), k).tolist() == [want]


def test_router_is_a_product_in_float32_whatever_surrounds_it():
    router = Router(8, 3, "linear", 1.0)
    x = torch.randn(5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        got = router(x)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, x @ router.layers[0].weight.T)
    assert router.flops == 2 * 24 and Router(8, 3, "mlp", 1.0).flops == 2 * (8 * 16 + 16 * 3)
    assert sum(p.numel() for p in Router(8, 3, "mlp", 1.0).parameters()) == 8 * 16 + 16 * 3


def test_gates():
    s = torch.tensor([[-1.0, 0.0, 2.0]])
    torch.testing.assert_close(gate(s, "sigmoid", 0.1), 0.1 / (1 + torch.exp(-s)))
    torch.testing.assert_close(gate(s, "tanh", 0.1), 0.1 * torch.tanh(s))
    assert gate(s, "softmax", 1.0).sum() == pytest.approx(1) and (gate(s, "none", 0.3) == 0.3).all()


def test_z_loss_of_one_logit_is_its_square():
    s = torch.tensor([0.5, -2.0, 3.0])
    torch.testing.assert_close(z_loss(s[:, None]), (s**2).sum())
    two = torch.tensor([[1.0, 2.0]])
    torch.testing.assert_close(z_loss(two), two.exp().sum().log() ** 2)


def test_foreseeing_is_binary_cross_entropy():
    s, chosen = torch.tensor([2.0, -1.0]), torch.tensor([True, False])
    want = -math.log(1 / (1 + math.exp(-2))) - math.log(1 - 1 / (1 + math.exp(1)))
    assert float(auxiliary_loss(s, chosen)) == pytest.approx(want, rel=1e-6)


def test_bias_moves_towards_even_loads():
    moved = balance_bias(torch.zeros(3), torch.tensor([9.0, 3.0, 6.0]), 0.01)
    torch.testing.assert_close(moved, torch.tensor([-0.01, 0.01, 0.0]))


def test_load_statistics():
    assert max_violation([4, 4, 4]) == 0 and normalised_entropy([4, 4, 4]) == pytest.approx(1)
    assert max_violation([6, 0]) == 1 and normalised_entropy([6, 0]) == 0 and normalised_entropy([3]) == 1


@pytest.mark.parametrize(
    "keys, extra",
    [({}, 3 * 16), ({"aux": "router"}, 2 * 3 * 16), ({"routing": "token"}, 3 * 16), ({"routing": "none"}, 0),
     ({"router": "mlp"}, 3 * (2 * 16 * 16 + 2 * 16))],
)  # fmt: skip
def test_routers_add_what_they_should(keys, extra):
    """N_r D parameters with a linear router for each step, or one of N_r outputs; the one that foresees as many again."""
    model = small.network(**keys)
    count = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in model.decoder.parameters())
    assert count == extra
    inside = sum(p.numel() for p in model.decoder.parameters()) - model.decoder.embed.weight.numel()
    assert inside == decoder_flops(model).parameters
