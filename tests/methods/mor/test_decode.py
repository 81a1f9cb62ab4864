"""Decoding with a cache against the network that sees the whole text at once."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reason.backbones.generation import Sampler, Sampling
from reason.errors import ConfigError
from reason.methods.mor.cache import MoRCache, OutOfPages
from reason.methods.mor.decode import backfill, prefill, step
from reason.methods.mor.generate import GenerationRequest, generate
from reason.methods.mor.halting import HaltingRule
from reason.methods.mor.token_selection import AboveThreshold, KnownDepths, RandomScores, TopK
from reason.methods.mor.visible_keys import KV_MODES

_spec = importlib.util.spec_from_file_location("mor_small", Path(__file__).with_name("small.py"))
small = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(small)

LENGTH = 26
DEPTHS = torch.randint(1, 4, (LENGTH,), generator=torch.Generator().manual_seed(5))
WAYS = {  # keys of the network, and the route
    "thresholds": ({}, AboveThreshold([0.1, -0.2])),
    "fixed": ({}, KnownDepths(2)),
    "replay": ({}, KnownDepths(DEPTHS)),
    "token": ({"routing": "token"}, None),
    "foreseen": ({"aux": "router"}, AboveThreshold([0.0, 0.1])),
    "all": ({"routing": "none"}, None),
}
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def in_pieces(model, tokens, route, sizes, kv_mode="recursion", cap=None):
    """Logits of all tokens, read in pieces of these sizes, then one by one; and the past."""
    past = MoRCache(model, kv_mode, page_size=4).open()
    rule, answers, a = HaltingRule(model, route, cap), [], 0
    for size in sizes:
        answers.append(prefill(model, past, tokens[a : a + size], rule, read="all"))
        a += size
    answers += [step(model, [past], [token], [rule]) for token in tokens[a:]]
    return torch.cat(answers), past


@pytest.mark.parametrize("kv_mode", KV_MODES)
@pytest.mark.parametrize("way", WAYS)
@given(data=st.data())
@settings(max_examples=8, deadline=None)
def test_a_cache_changes_nothing(kv_mode, way, data):
    keys, route = WAYS[way]
    combine = data.draw(st.sampled_from(["paper", "delta", "replace"]))
    sharing = data.draw(st.sampled_from(["middle_cycle", "cycle"]))
    cap = data.draw(st.sampled_from([None, 1, 2]))
    model = small.network(
        sharing=sharing, kv_heads=data.draw(st.sampled_from([1, 2, 4])), combine=combine, **keys
    )
    tokens = small.text(LENGTH, data.draw(st.integers(0, 99)))
    sizes = data.draw(st.lists(st.integers(1, 12), max_size=4).filter(lambda sizes: sum(sizes) <= LENGTH))
    want, depth = small.at_once(model, tokens, route, kv_mode=kv_mode, cap=cap)
    got, past = in_pieces(model, tokens, route, sizes, kv_mode, cap)
    assert past.depth.tolist() == depth.tolist()
    torch.testing.assert_close(got, want, **CLOSE)


def test_the_ways_do_decide():
    """That the test above can fail: depths differ, and each kv_mode shows its tokens something else."""
    for way in ("thresholds", "replay", "token", "foreseen"):
        keys, route = WAYS[way]
        assert len(set(small.at_once(small.network(**keys), small.text(LENGTH), route)[1])) > 1, way
    model, tokens = small.network(), small.text(LENGTH)
    found = [small.at_once(model, tokens, KnownDepths(DEPTHS), kv_mode=kv_mode)[0] for kv_mode in KV_MODES]
    assert all(not torch.allclose(a, b, **CLOSE) for i, a in enumerate(found) for b in found[:i])


@given(chunk=st.integers(1, LENGTH + 3), kv_mode=st.sampled_from(KV_MODES))
@settings(max_examples=15, deadline=None)
def test_chunks_of_any_size_answer_the_same(chunk, kv_mode):
    model, tokens, route = small.network(), small.text(LENGTH), AboveThreshold([0.1, -0.2])
    want, depth = small.at_once(model, tokens, route, kv_mode=kv_mode)
    for read, rows in (("all", slice(None)), ("last", slice(-1, None)), ("none", slice(0))):
        past = MoRCache(model, kv_mode).open()
        torch.testing.assert_close(
            prefill(model, past, tokens, route, chunk=chunk, read=read), want[rows], **CLOSE
        )
        assert past.depth.tolist() == depth.tolist()


@pytest.mark.parametrize("kv_mode", KV_MODES)
@pytest.mark.parametrize("way", ["thresholds", "token"])
def test_a_batch_of_sequences_is_each_of_them_alone(kv_mode, way):
    keys, route = WAYS[way]
    model, cache = small.network(**keys), MoRCache(small.network(**keys), kv_mode)
    texts = [small.text(n, n) for n in (9, 3, 14, 6)]
    caps = [None, 1, 2, None]
    rules = [HaltingRule(model, route, cap) for cap in caps]
    pasts = [cache.open() for _ in texts]
    for past, text, rule in zip(pasts, texts, rules, strict=True):
        prefill(model, past, text[:-2], rule)
    got = [step(model, pasts, [text[i] for text in texts], rules) for i in (-2, -1)][-1]
    for row, past, text, cap in zip(got, pasts, texts, caps, strict=True):
        want, depth = small.at_once(model, text, route, kv_mode=kv_mode, cap=cap)
        torch.testing.assert_close(row, want[-1], **CLOSE)
        assert past.depth.tolist() == depth.tolist()
    assert step(model, [], [], []).shape == (0, small.VOCAB)


def test_a_step_that_is_not_taken_is_not_computed():
    model, tokens, rows = small.network(), small.text(LENGTH), Counter()
    for name, layer in (("first", model.decoder.first), ("block", model.decoder.block[0])):
        layer.gate.register_forward_hook(lambda _, x, y, name=name: rows.update({name: len(x[0])}))
    past = in_pieces(model, tokens, KnownDepths(DEPTHS), [7])[1]
    assert rows["block"] == past.depth.sum() == DEPTHS.sum() and rows["first"] == LENGTH


@pytest.mark.parametrize("kv_mode", KV_MODES)
def test_going_back_and_forking(kv_mode):
    model, route, tokens, others = (
        small.network(),
        AboveThreshold([0.1, -0.2]),
        small.text(20),
        small.text(20, 2),
    )
    past = MoRCache(model, kv_mode, page_size=4).open()
    prefill(model, past, tokens, route)
    past.truncate(9)
    fork = past.fork()
    for mine, rest in ((past, others), (fork, tokens)):
        text = tokens[:9] + rest[9:]
        want, depth = small.at_once(model, text, route, kv_mode=kv_mode)
        torch.testing.assert_close(prefill(model, mine, text[9:], route, read="all"), want[9:], **CLOSE)
        assert mine.depth.tolist() == depth.tolist()


@pytest.mark.parametrize("kv_mode", KV_MODES)
def test_a_cap_is_raised_in_the_middle_of_a_text(kv_mode):
    """Backfilled tokens have the depths of the higher cap, earlier ones keep theirs; all as if decided so at once."""
    model, route, tokens = small.network(), AboveThreshold([-1.0, -2.0]), small.text(24)
    past = MoRCache(model, kv_mode).open()
    prefill(model, past, tokens[:16], route, cap=1)
    assert past.depth.max() == 1
    backfill(model, past, tokens[:16], 5, route)
    got = prefill(model, past, tokens[16:], route, read="all")
    depth = past.depth
    assert depth[:5].tolist() == [1] * 5 and depth[5:16].max() == 3
    want, _ = small.at_once(
        model, tokens, KnownDepths(torch.from_numpy(depth.astype(np.int64))), kv_mode=kv_mode
    )
    torch.testing.assert_close(got, want[16:], **CLOSE)


@pytest.mark.parametrize("routing", ["expert", "token"])
def test_a_broken_router_costs_time_and_not_text(routing):
    model, tokens = small.network(routing=routing), small.text(9)
    with torch.no_grad():
        for router in [*model.by_step, *([model.by_token] if model.by_token else [])]:
            router.layers[0].weight.fill_(torch.nan)
    route = AboveThreshold([0.0, 0.0]) if routing == "expert" else None
    got, past = in_pieces(model, tokens, route, [4])
    assert (past.depth == 3).all()
    torch.testing.assert_close(got, small.at_once(model, tokens, route)[0], **CLOSE)


@pytest.mark.parametrize("limit", [20, 30, 44])
def test_a_full_cache_leaves_the_past_as_it_was(limit):
    model, route, tokens = small.network(), KnownDepths(DEPTHS), small.text(LENGTH)
    past = MoRCache(model, page_size=2, limit=limit).open()
    prefill(model, past, tokens[:3], route)
    used = past.cache.used
    with pytest.raises(OutOfPages):
        prefill(model, past, tokens[3:], route, chunk=6)
    assert past.length == 3 and past.cache.used == used
    got = step(model, [past], [tokens[3]], [HaltingRule(model, route)])
    torch.testing.assert_close(got[0], small.at_once(model, tokens[:4], route)[0][3], **CLOSE)


# --- what is refused -----------------------------------------------------------------------------------


def test_top_k_is_refused_with_the_reason():
    for route in (TopK([1, 0.5, 0.25]), RandomScores(TopK([1, 0.5, 0.25]), torch.Generator())):
        with pytest.raises(ConfigError, match="looks ahead"):
            HaltingRule(small.network(), route)


def test_what_cannot_be_read_token_by_token_is_refused():
    model = small.network()
    with pytest.raises(ConfigError, match="RandomScores"):
        HaltingRule(model, RandomScores(AboveThreshold([0.0, 0.0]), torch.Generator()))
    with pytest.raises(ConfigError, match="1 thresholds for 2 decisions"):
        HaltingRule(model, AboveThreshold([0.0]))
    assert HaltingRule(model, AboveThreshold([0.0]), cap=2).cap == 2
    with pytest.raises(ConfigError, match="cap is 0"):
        HaltingRule(model, cap=0)
    with pytest.raises(ConfigError, match="known for 3 tokens"):
        prefill(model, MoRCache(model).open(), small.text(4), KnownDepths(torch.tensor([1, 2, 3])))


# --- writing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_greedy_text_is_what_the_whole_network_says_each_time(way):
    keys, route = WAYS[way]
    model, tokens = small.network(**keys), small.text(5)
    got = generate(model, GenerationRequest(tokens, 12, route), chunk=3)
    for _ in range(12):
        logits, depth = small.at_once(model, tokens, route)
        tokens.append(int(logits[-1].argmax()))
    assert got.tokens == tokens[5:] and not got.stopped and got.depth.tolist() == depth.tolist()


def test_a_text_is_written_again_by_its_depths():
    model, request = (
        small.network(),
        GenerationRequest(
            small.text(5), 12, AboveThreshold([0.1, -0.2]), sampling=Sampling(1.0, 0.9), seed=3
        ),
    )
    first = generate(model, request)
    known = KnownDepths(torch.from_numpy(first.depth))
    again = generate(model, GenerationRequest(request.prompt, 12, known, sampling=request.sampling, seed=3))
    assert first.tokens == again.tokens and first.depth.tolist() == again.depth.tolist()
    assert len(set(first.depth.tolist())) > 1


def test_a_stop_token_ends_the_text():
    model, prompt = small.network(), small.text(5)
    free = generate(model, GenerationRequest(prompt, 9))
    cache = MoRCache(model)
    got = generate(model, GenerationRequest(prompt, 9, stop=frozenset({free.tokens[4]})), cache=cache)
    first = free.tokens.index(free.tokens[4])
    assert got.tokens == free.tokens[:first] and got.stopped and len(got.depth) == 5 + first
    assert cache.used == 0


def test_seeds_decide_what_is_drawn():
    model, prompt = small.network(), small.text(5)
    texts = [
        generate(model, GenerationRequest(prompt, 12, sampling=Sampling(1.5), seed=s)).tokens
        for s in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.5, 1.0), (2.0, 0.7), (1.0, 0.05)])
def test_draws_have_the_shares_they_should(temperature, top_p):
    logits = torch.tensor([2.0, 0.5, 1.5, -1.0, 2.0])
    share = (logits / temperature).softmax(-1)
    kept, mass = [], 0.0
    for token in sorted(range(5), key=lambda t: (-share[t].item(), t)):
        if mass < top_p:
            kept.append(token)
        mass += share[token].item()
    want = torch.zeros(5).index_copy(0, torch.tensor(kept), share[kept])
    draw = Sampler(Sampling(temperature, top_p), 1)
    n = 4000
    got = torch.bincount(torch.tensor([draw(logits) for _ in range(n)]), minlength=5) / n
    torch.testing.assert_close(got, want / want.sum(), rtol=0, atol=4 * 0.5 / n**0.5)
    assert not got[want == 0].any()


def test_requests_that_mean_nothing_are_refused():
    for make in (
        lambda: GenerationRequest([], 3), lambda: GenerationRequest([1], 0), lambda: Sampling(-1.0), lambda: Sampling(float("nan")),
        lambda: Sampling(1.0, 0.0), lambda: Sampling(1.0, 1.5),
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            make()
