"""The packed network against the slow reference, and what the paper's equations say about its corner cases."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reason.backbones.config import RecursiveConfig
from reason.backbones.decoder import RecursiveDecoder
from reason.methods.mor.config import MorConfig
from reason.methods.mor.network import MixtureOfRecursions
from reason.methods.mor.token_selection import AboveThreshold, KnownDepths, TopK
from reason.methods.mor.visible_keys import KV_MODES

_spec = importlib.util.spec_from_file_location("mor_reference", Path(__file__).with_name("reference.py"))
reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)

VOCAB = 23


def network(recursions=3, sharing="middle_cycle", block=2, seed=0, **keys) -> MixtureOfRecursions:
    ends = 2 if sharing.startswith("middle") else 0
    config = RecursiveConfig(
        hidden=16,
        heads=4,
        kv_heads=2,
        ffn=24,
        layers=ends + block * recursions,
        sharing=sharing,
        init_std=0.3,
    )
    torch.manual_seed(seed)
    decoder = RecursiveDecoder(config, shape=config.shape(VOCAB), recursions=recursions)
    return MixtureOfRecursions(decoder, MorConfig(**keys), 0.5)


def text(batch, length, seed=1):
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def distinct(batch, length, seed=1):
    """No token twice in a text: one that begins with a repeated token has equal states, and rounding breaks the tie."""
    return torch.rand(batch, VOCAB, generator=torch.Generator().manual_seed(seed)).argsort(1)[:, :length]


def slowly(model, tokens, route, lengths=None, **how):
    lengths = [tokens.shape[1]] * len(tokens) if lengths is None else lengths.tolist()
    parts = [reference.forward(model, t, route, n, **how) for t, n in zip(tokens, lengths, strict=True)]
    return torch.stack([s for s, _ in parts]), torch.stack([d for _, d in parts])


ROUTES = {
    "topk": (TopK([1, 2 / 3, 1 / 3]), ("topk", [1, 2 / 3, 1 / 3])),
    "above": (AboveThreshold([0.1, -0.2]), ("above", [0.1, -0.2])),
    "fixed": (KnownDepths(2), ("fixed", 2)),
}


@pytest.mark.parametrize("kv_mode", KV_MODES)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("combine", ["paper", "delta", "replace"])
def test_packed_is_the_masked_reference(route, kv_mode, padded, combine):
    model, tokens = network(combine=combine), distinct(3, 11)
    lengths = torch.tensor([11, 4, 1]) if padded else None
    fast, slow = ROUTES[route]
    got = model(tokens, fast, lengths=lengths, kv_mode=kv_mode)
    want, depth = slowly(model, tokens, slow, lengths, kv_mode=kv_mode)
    assert torch.equal(got.depth, depth)
    observed = depth > 0
    torch.testing.assert_close(got.states[observed], want[observed], rtol=1e-5, atol=1e-5)
    weight = torch.randn(want.shape, generator=torch.Generator().manual_seed(2)) * observed[..., None]
    mine = torch.autograd.grad((got.states * weight).sum(), list(model.parameters()), allow_unused=True)
    theirs = torch.autograd.grad((want * weight).sum(), list(model.parameters()), allow_unused=True)
    for (name, _), a, b in zip(model.named_parameters(), mine, theirs, strict=True):
        assert (a is None or not a.any()) == (b is None or not b.any()), name
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(1.0, float(b.abs().max())), msg=name)


@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_packed_is_the_masked_reference_whatever_the_shapes(data):
    """States and gradients, of any batch, lengths and capacities."""
    batch, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))
    second, third = data.draw(st.floats(0.05, 1)), data.draw(st.floats(0.05, 1))
    capacities, seed = [1.0, second, second * third], data.draw(st.integers(0, 99))
    route = data.draw(st.sampled_from([("topk", capacities), ("above", [second - 0.5, third - 0.5])]))
    lengths = torch.tensor(data.draw(st.lists(st.integers(0, length), min_size=batch, max_size=batch)))
    model, tokens = network(block=1, seed=seed), distinct(batch, length, seed)
    got = model(tokens, {"topk": TopK, "above": AboveThreshold}[route[0]](route[1]), lengths=lengths)
    want, depth = slowly(model, tokens, route, lengths)
    assert torch.equal(got.depth, depth)
    observed = depth > 0
    torch.testing.assert_close(got.states[observed], want[observed], rtol=1e-5, atol=1e-5)
    if observed.any():
        weights = list(model.decoder.parameters())
        grads = [
            torch.autograd.grad(s[observed].sum(), weights, allow_unused=True) for s in (got.states, want)
        ]
        for a, b in zip(*grads, strict=True):
            if a is not None and b is not None:
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(1.0, float(b.abs().max())))


@pytest.mark.parametrize("combine", ["paper", "delta", "replace"])
@pytest.mark.parametrize("gate", ["auto", "sigmoid"])
@pytest.mark.parametrize("cap", [None, 2])
def test_token_choice_is_the_masked_reference(combine, gate, cap):
    model, tokens = network(routing="token", combine=combine, gate=gate), text(3, 9)
    model.bias.copy_(torch.tensor([0.1, -0.2, 0.05]))
    lengths = torch.tensor([9, 9, 5])
    got = model(tokens, lengths=lengths, cap=cap)
    want, depth = slowly(model, tokens, ("token", None), lengths, cap=cap)
    assert torch.equal(got.depth, depth) and len(depth.unique()) > 2
    torch.testing.assert_close(got.states[depth > 0], want[depth > 0], rtol=1e-5, atol=1e-5)


@given(
    batch=st.integers(1, 3), length=st.integers(1, 14), seed=st.integers(0, 9),
    second=st.floats(0.05, 1), third=st.floats(0.05, 1),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_top_k_keeps_what_it_should(batch, length, seed, second, third):
    model, tokens = network(block=1, seed=seed), text(batch, length, seed)
    capacities = [1.0, second, second * third]
    lengths = torch.randint(1, length + 1, (batch,), generator=torch.Generator().manual_seed(seed))
    got = model(tokens, TopK(capacities), lengths=lengths)
    inside = torch.arange(length) < lengths[:, None]
    assert not got.depth[~inside].any() and (got.depth[inside] >= 1).all()
    for step, capacity in enumerate(capacities):
        count = ((got.depth > step) & inside).sum(1)
        assert count.tolist() == [min(max(1, int(capacity * n + 1e-9)), n) for n in lengths.tolist()]
    for routing in got.steps:
        assert (routing.candidates.index.diff() > 0).all()
        if routing.chosen is not None:
            assert (routing.chosen.diff() > 0).all()


# --- what the equations say of corner cases -------------------------------------------------------------


def plain(model, tokens, depth=None):
    decoder = model.decoder
    return decoder(tokens, depth)


@pytest.mark.parametrize("sharing", ["cycle", "middle_cycle"])
def test_full_depth_replace_is_the_plain_recursive_model(sharing):
    model, tokens = network(sharing=sharing, combine="replace"), text(2, 8)
    for cap in (1, 2, 3):
        got = model.read(model(tokens, KnownDepths(3), cap=cap).states)
        torch.testing.assert_close(got, plain(model, tokens, cap), rtol=1e-5, atol=1e-5)


def test_delta_with_a_gate_of_one_is_the_plain_recursive_model():
    model, tokens = network(combine="delta", gate="none", alpha=1.0), text(2, 8)
    got = model.read(model(tokens, TopK([1, 1, 1])).states)
    torch.testing.assert_close(got, plain(model, tokens), rtol=1e-5, atol=1e-5)


def test_paper_at_full_capacity_is_a_loop_by_hand():
    model, tokens = network(), text(2, 8)
    decoder = model.decoder
    rope = decoder.rope(torch.arange(8))
    x = decoder.begin(tokens, rope)
    for router in model.by_step:
        x = x + 0.1 * torch.sigmoid(router(x)) * decoder.recurse(x, rope)
    torch.testing.assert_close(model(tokens, TopK([1, 1, 1])).states, x, rtol=1e-5, atol=1e-5)


def test_no_routing_is_the_plain_recursive_model():
    model, tokens = network(routing="none"), text(2, 8)
    torch.testing.assert_close(model.read(model(tokens).states), plain(model, tokens), rtol=1e-5, atol=1e-5)


def test_exits_are_the_states_of_smaller_caps():
    model, tokens = network(), text(2, 10)
    got = model(tokens, TopK([1, 0.6, 0.3]), exits=True)
    for cap, exit in enumerate(got.exits, 1):
        torch.testing.assert_close(
            exit, model(tokens, TopK([1, 0.6, 0.3]), cap=cap).states, rtol=1e-5, atol=1e-6
        )
    assert len(got.exits) == 2


@pytest.mark.parametrize("kv_mode", KV_MODES)
def test_the_past_does_not_feel_the_future(kv_mode):
    for model, route in (
        (network(), AboveThreshold([0.0, 0.0])),
        (network(), KnownDepths(2)),
        (network(routing="token"), None),
    ):
        tokens, other = text(2, 10), text(2, 10)
        other[:, 6:] = (other[:, 6:] + 1) % VOCAB
        a, b = (model.read(model(t, route, kv_mode=kv_mode).states) for t in (tokens, other))
        torch.testing.assert_close(a[:, :6], b[:, :6], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(a[:, 6:], b[:, 6:])


def test_top_k_does_feel_the_future():
    """Why it is not for decoding, and that the test above can fail."""
    model, route = network(), TopK([1, 0.3, 0.1])
    tokens = text(8, 10)
    other = tokens.clone()
    other[:, 6:] = (other[:, 6:] + 1) % VOCAB
    a, b = (model(t, route) for t in (tokens, other))
    assert not torch.equal(a.depth[:, :6], b.depth[:, :6]) and route.looks_ahead


def test_rows_do_not_feel_each_other():
    model, tokens = network(), text(4, 9)
    lengths = torch.tensor([9, 3, 6, 9])
    for route in (TopK([1, 0.5, 0.25]), AboveThreshold([0.0, 0.1])):
        whole = model(tokens, route, lengths=lengths)
        order = torch.tensor([2, 0, 3])
        part = model(tokens[order], route, lengths=lengths[order])
        assert torch.equal(whole.depth[order], part.depth)
        observed = part.depth > 0
        torch.testing.assert_close(whole.states[order][observed], part.states[observed], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kv_mode", KV_MODES)
@pytest.mark.parametrize("routing", ["topk", "above", "token"])
def test_padding_of_any_width_changes_nothing(routing, kv_mode):
    """On the right; texts cannot be padded on the left."""
    model = network(routing="token" if routing == "token" else "expert")
    route = None if routing == "token" else ROUTES[routing][0]
    tokens = text(2, 7)
    bare = model(tokens, route, kv_mode=kv_mode)
    for wide in (1, 6):
        padded = torch.cat([tokens, text(2, wide, seed=wide)], 1)
        got = model(padded, route, lengths=torch.tensor([7, 7]), kv_mode=kv_mode)
        assert torch.equal(got.depth[:, :7], bare.depth) and not got.depth[:, 7:].any()
        torch.testing.assert_close(got.states[:, :7], bare.states, rtol=1e-5, atol=1e-5)


def test_keys_of_all_who_took_the_step_are_keys_of_all():
    """Where nobody leaves, what gaps are filled with is not looked at; where all have left, neither."""
    model, tokens = network(), text(2, 9)
    kinds = [kind for kind in KV_MODES if kind != "sharing"]
    for route, same in ((KnownDepths(3), kinds), (KnownDepths(1), KV_MODES)):
        first, *others = (model(tokens, route, kv_mode=kind).states for kind in same)
        for other in others:
            torch.testing.assert_close(other, first, rtol=1e-5, atol=1e-5)
    a, b = (model(tokens, KnownDepths(3), kv_mode=kind).states for kind in ("recursion", "sharing"))
    assert not torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def test_subsets_are_rotated_by_their_places_in_the_text(monkeypatch):
    model, tokens = network(), text(2, 12)
    route = TopK([1, 0.5, 0.25])
    want = model(tokens, route).states
    monkeypatch.setattr(
        "reason.methods.mor.active.ActiveTokens.position",
        property(lambda self: torch.arange(len(self)) % (self.per_sequence or self.length)),
    )
    assert not torch.allclose(model(tokens, route).states, want, atol=1e-4)


def test_who_left_is_passed_through_unchanged():
    """The Jacobian of a row that a step did not take is the identity: its state is the one it left with."""
    model, tokens = network(), text(1, 9)
    got = model(tokens, TopK([1, 0.5, 0.2]), exits=True)
    left = (got.depth[0] == 1).nonzero().flatten()
    assert len(left) and torch.equal(got.states[0, left], got.exits[0][0, left])
    weights = list(model.parameters())
    late, early = (
        torch.autograd.grad(states[0, left].sum(), weights, retain_graph=True, allow_unused=True)
        for states in (got.states, got.exits[0])
    )
    for a, b in zip(late, early, strict=True):
        assert (a is None or not a.any()) if b is None else torch.equal(a, b)


@pytest.mark.parametrize("routing", ["expert", "token"])
def test_a_broken_router_costs_time_and_not_text(routing):
    model, tokens = network(routing=routing), text(2, 7)
    route = AboveThreshold([0.0, 0.0]) if routing == "expert" else None
    with torch.no_grad():
        for router in [*model.by_step, *([model.by_token] if model.by_token else [])]:
            router.layers[0].weight.fill_(torch.nan)
    got = model(tokens, route)
    assert (got.depth == 3).all() and got.states.isfinite().all()


def test_empty_and_single():
    model = network()
    assert (model(text(2, 6), AboveThreshold([99.0, 99.0])).depth == 1).all()
    assert model(text(1, 1), TopK([1, 0.5, 0.1])).depth.tolist() == [[3]]
    assert model(text(1, 4), TopK([1, 0.01, 0.01])).depth.sort().values.tolist() == [[1, 1, 1, 3]]
    padded = model(text(2, 5), AboveThreshold([0.0, 0.0]), lengths=torch.tensor([5, 0]))
    assert not padded.depth[1].any() and padded.states.isfinite().all()


@pytest.mark.parametrize("kv_mode", KV_MODES)
@pytest.mark.parametrize("routing", ["expert", "token"])
def test_a_batch_of_nothing_but_padding(routing, kv_mode):
    model, nobody = network(routing=routing), torch.zeros(2, dtype=torch.int64)
    for route in (None,) if routing == "token" else (TopK([1, 0.5, 0.2]), AboveThreshold([0.0, 0.0])):
        got = model(text(2, 5), route, lengths=nobody, kv_mode=kv_mode, exits=True)
        assert got.states.shape == (2, 5, 16) and got.states.isfinite().all()
        assert not got.depth.any() and not got.exits
