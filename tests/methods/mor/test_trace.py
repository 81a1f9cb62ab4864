"""Traces: what a forward pass decided, as it says itself."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from reason.methods.mor.generate import GenerationRequest, generate
from reason.methods.mor.router import CERTAIN
from reason.methods.mor.token_selection import AboveThreshold, KnownDepths
from reason.methods.mor.trace import fallback_tokens, trace

_spec = importlib.util.spec_from_file_location("mor_small", Path(__file__).with_name("small.py"))
small = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(small)

BARS = [-0.3, 0.1]


def text(rows, length, seed=1):
    return torch.tensor([small.text(length, seed + i) for i in range(rows)])


@torch.no_grad()
def observed(model, route=None, lengths=None, **how):
    routed = model(text(3, 12), route, lengths=lengths, **how)
    return routed, trace(model, routed, route)


@pytest.mark.parametrize("keys", [{}, {"aux": "router"}, {"combine": "replace"}])
def test_an_expert_trace_says_who_was_scored_and_who_went_on(keys):
    model, lengths = small.network(**keys), torch.tensor([12, 7, 1])
    routed, got = observed(model, AboveThreshold(BARS), lengths)
    depth = routed.depth
    assert got.depth.dtype == torch.int8 and torch.equal(got.depth.long(), depth)
    assert got.logits.shape == got.gate.shape == (3, 3, 12) and got.thresholds == tuple(BARS)
    for step in range(3):
        candidate = depth >= max(step, 1)
        assert torch.equal(~got.logits[:, step].isnan(), candidate)
        went = depth > step
        assert torch.equal(got.counts[:, step].long(), went.sum(1))
        if step:  # who went on is who scored above the bar
            assert torch.equal(got.logits[:, step].float() > BARS[step - 1], went)
        assert torch.equal(got.gate[:, step] > 0, went)
    routing = routed.steps[1]
    gates = torch.zeros(36).index_copy(0, routing.candidates.index, model.gates(routing.logits)).view(3, 12)
    want = torch.ones(3, 12) if keys.get("combine") == "replace" else gates
    torch.testing.assert_close(
        got.gate[:, 1].float(), torch.where(depth > 1, want, 0.0), atol=1e-3, rtol=1e-3
    )
    assert not got.fallback.any()


def test_a_token_choice_trace_has_all_scores_and_one_gate():
    model = small.network(routing="token")
    routed, got = observed(model)
    assert torch.equal(got.logits.transpose(1, 2).reshape(36, 3), routed.entry.half())
    assert ((got.gate > 0).sum(1) == 1).all() and got.thresholds is None
    assert torch.equal(got.gate.argmax(1) + 1, routed.depth)


def test_a_known_route_without_routers_has_no_scores():
    _, got = observed(small.network(routing="none"), KnownDepths(2))
    assert got.logits.isnan().all() and got.counts.tolist() == [[12, 12, 0]] * 3
    assert (got.gate[:, :2] == 1).all() and not got.gate[:, 2].any()


@pytest.mark.parametrize("keys", [{}, {"aux": "router"}, {"routing": "token"}])
def test_broken_answers_are_remembered(keys):
    model = small.network(**keys)
    router = model.by_token or (model.foreseers or model.by_step)[1]
    whole, _ = observed(model, None if "routing" in keys else AboveThreshold(BARS))
    with torch.no_grad():
        router.layers[0].weight.fill_(torch.nan)
    routed, got = observed(model, None if "routing" in keys else AboveThreshold(BARS))
    want = torch.ones(3, 12) if "routing" in keys else whole.depth >= 1
    assert torch.equal(fallback_tokens(routed), want.bool()) and torch.equal(
        got.fallback, fallback_tokens(routed)
    )
    assert (routed.depth[want.bool()] >= 2).all()
    logits = got.logits[:, -1 if "routing" in keys else 1]
    assert (logits == CERTAIN).all()


def test_decoding_counts_them():
    model = small.network()
    request = GenerationRequest(small.text(5), 6, AboveThreshold(BARS))
    generate(model, request)
    assert model.fallbacks == 0
    with torch.no_grad():
        model.by_step[1].layers[0].weight[0, 0] = torch.nan
    done = generate(model, request)
    assert model.fallbacks == len(done.depth) and (done.depth >= 2).all()
    by_token = small.network(routing="token")
    generate(by_token, GenerationRequest(small.text(5), 6))
    assert by_token.fallbacks == 0
    with torch.no_grad():
        by_token.by_token.layers[0].weight.fill_(torch.inf)
    assert (
        generate(by_token, GenerationRequest(small.text(5), 6)).depth == 3
    ).all() and by_token.fallbacks == 10
