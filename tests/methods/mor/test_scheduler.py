"""The scheduler against one request after another: the same text and the same depths, whatever the schedule."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reason.backbones.generation import Sampling
from reason.errors import ConfigError
from reason.methods.mor.cache import MoRCache, OutOfPages
from reason.methods.mor.generate import GenerationRequest, generate
from reason.methods.mor.scheduler import Scheduler
from reason.methods.mor.token_selection import AboveThreshold, KnownDepths, TopK
from reason.methods.mor.visible_keys import KV_MODES

_spec = importlib.util.spec_from_file_location("mor_small", Path(__file__).with_name("small.py"))
small = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(small)

EXPERT, TOKEN, AUXILIARY = small.network(), small.network(routing="token"), small.network(aux="router")
ROUTES = {
    "expert": (EXPERT, [AboveThreshold([-0.3, -0.8]), AboveThreshold([0.1, 0.1]), KnownDepths(2)]),
    "token": (TOKEN, [None, KnownDepths(3)]),
    "foreseen": (AUXILIARY, [AboveThreshold([-0.2, 0.0]), KnownDepths(1)]),
}


def alone(model, kv_mode, requests):
    return [generate(model, request, cache=MoRCache(model, kv_mode)) for request in requests]


def same(got, want):
    for a, b in zip(got, want, strict=True):
        assert a.tokens == b.tokens and a.stopped == b.stopped and a.depth.tolist() == b.depth.tolist()


def some(route=None, n=8, most=10, **keys):
    return [GenerationRequest(small.text(3 + 5 * i % 11, i), most + i % 4, route, **keys) for i in range(n)]


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_the_schedule_changes_nothing(data):
    way, kv_mode = data.draw(st.sampled_from(sorted(ROUTES))), data.draw(st.sampled_from(KV_MODES))
    model, routes = ROUTES[way]
    requests = [
        GenerationRequest(
            small.text(data.draw(st.integers(1, 12)), data.draw(st.integers(0, 50))),
            data.draw(st.integers(1, 9)),
            data.draw(st.sampled_from(routes)),
            data.draw(st.sampled_from([None, None, 1, 2])),
            Sampling(data.draw(st.sampled_from([0.0, 0.0, 1.0])), data.draw(st.sampled_from([1.0, 0.8]))),
            frozenset(data.draw(st.lists(st.integers(0, small.VOCAB - 1), max_size=2))),
            i,
        )
        for i in range(data.draw(st.integers(1, 7)))
    ]  # fmt: skip
    want = alone(model, kv_mode, requests)
    size = data.draw(st.sampled_from([1, 4]))
    cache = MoRCache(model, kv_mode, page_size=size)
    fits = max(cache.pages_needed([3] * (len(r.prompt) + r.max_tokens)) for r in requests)
    if data.draw(st.booleans()):
        cache.limit = int(fits * data.draw(st.floats(1, 3)))
    scheduler = Scheduler(
        model, cache, rows=data.draw(st.integers(1, 6)), exits=data.draw(st.integers(1, 6)),
        max_sequences=data.draw(st.sampled_from([None, 1, 3, 8])), chunk=data.draw(st.integers(1, 20)),
        patience=data.draw(st.integers(0, 4)),
    )  # fmt: skip
    order = data.draw(st.permutations(range(len(requests))))
    numbers, done = {}, {}
    for i in order:  # they come in any order, some while others are under way
        numbers[i] = scheduler.submit(requests[i])
        for _ in range(data.draw(st.integers(0, 5))):
            done |= scheduler.tick()
    while not scheduler.idle:
        done |= scheduler.tick()
    same([done[numbers[i]] for i in range(len(requests))], want)
    assert cache.used == 0 and sorted(done) == sorted(numbers.values())


@pytest.mark.parametrize("kv_mode", KV_MODES)
@pytest.mark.parametrize("way", ROUTES)
def test_who_gives_way_writes_the_same(kv_mode, way):
    """Enough pages for two and a half texts, and eight at once: some have to be read again, in the middle."""
    model, routes = ROUTES[way]
    requests = some(routes[0], sampling=Sampling(1.0, 0.9), seed=4)
    cache = MoRCache(model, kv_mode, page_size=2)
    cache.limit = int(2.5 * max(cache.pages_needed([3] * (len(r.prompt) + r.max_tokens)) for r in requests))
    scheduler = Scheduler(model, cache, rows=4, max_sequences=8)
    for request in requests:
        scheduler.submit(request)
    done, most = {}, 0
    while not scheduler.idle:
        done |= scheduler.tick()
        most = max(most, cache.used)
    assert scheduler.stats.preempted > 0 and cache.limit * 0.7 < most <= cache.limit
    assert scheduler.stats.prefilled > sum(len(r.prompt) for r in requests)
    same([done[i] for i in range(len(requests))], alone(model, kv_mode, requests))


def test_a_record_of_depths_writes_the_texts_again():
    requests = some(AboveThreshold([-0.3, -0.8]))
    first = Scheduler(EXPERT, MoRCache(EXPERT), rows=3).run(requests)
    again = [
        GenerationRequest(r.prompt, r.max_tokens, KnownDepths(torch.from_numpy(g.depth)))
        for r, g in zip(requests, first, strict=True)
    ]
    same(Scheduler(EXPERT, MoRCache(EXPERT), rows=5, patience=0).run(again), first)
    assert len({d for g in first for d in g.depth.tolist()}) == 3


def test_passes_are_full():
    """Rows of a pass: what the tokens need, and no pass waits for a deepest row."""
    requests = some(AboveThreshold([-0.3, -0.8]), n=24, most=20)
    scheduler = Scheduler(EXPERT, MoRCache(EXPERT), rows=4)
    got = scheduler.run(requests)
    need = sum(int(g.depth[len(r.prompt) - 1 :].sum()) for r, g in zip(requests, got, strict=True))
    assert scheduler.stats.rows == need and scheduler.stats.preempted == 0
    assert need / 4 <= scheduler.stats.passes < 1.1 * need / 4


@pytest.mark.parametrize("patience", [0, 3])
def test_no_row_waits_for_ever(patience):
    """With room for two of ten rows the deepest go first, and yet each is let in by the time it is due."""
    scheduler = Scheduler(EXPERT, MoRCache(EXPERT), rows=2, max_sequences=10, patience=patience)
    for request in some(KnownDepths(3), n=10, most=12):
        scheduler.submit(request)
    longest = 0
    while not scheduler.idle:
        scheduler.tick()
        longest = max([longest, *(scheduler._tick - seq.since for seq in scheduler._looping.values())])
    assert longest <= patience + 10 // 2 + 1


def test_the_deepest_go_first_while_none_is_overdue():
    scheduler, mixed = Scheduler(EXPERT, MoRCache(EXPERT), rows=2, max_sequences=6, patience=100), 0
    for request in some(KnownDepths(3), n=6, most=12):
        scheduler.submit(request)
    while not scheduler.idle:
        scheduler.tick()
        depths = sorted((seq.step for seq in scheduler._looping.values()), reverse=True)
        assert sorted((seq.step for seq in scheduler._next_rows()), reverse=True) == depths[:2]
        mixed += depths[2:] != depths[:-2]
    assert mixed > 10


def test_a_text_that_never_fits_is_told_and_dropped():
    cache = MoRCache(EXPERT, page_size=2, limit=30)
    scheduler = Scheduler(EXPERT, cache, rows=2)
    small_one, big = (
        GenerationRequest([1, 2], 2, KnownDepths(1)),
        GenerationRequest([1, 2], 60, KnownDepths(3)),
    )
    first, second = scheduler.submit(big), scheduler.submit(small_one)
    done = {}
    with pytest.raises(OutOfPages, match="of 30 pages"):
        while not scheduler.idle:
            done |= scheduler.tick()
    while not scheduler.idle:
        done |= scheduler.tick()
    assert first not in done and cache.used == 0
    same([done[second]], alone(EXPERT, None, [small_one]))


def test_a_record_that_is_too_short_is_told():
    scheduler = Scheduler(EXPERT, MoRCache(EXPERT))
    with pytest.raises(ConfigError, match="known for 2 tokens"):
        scheduler.submit(GenerationRequest([1, 2, 3], 5, KnownDepths(torch.tensor([1, 2]))))
    scheduler.submit(GenerationRequest([1, 2, 3], 5, KnownDepths(torch.tensor([1, 2, 3, 1]))))
    other = scheduler.submit(GenerationRequest([4], 6, KnownDepths(2)))
    done = {}
    with pytest.raises(ConfigError, match="known for 4 tokens"):
        while not scheduler.idle:
            done |= scheduler.tick()
    while not scheduler.idle:
        done |= scheduler.tick()
    same([done[other]], alone(EXPERT, None, [GenerationRequest([4], 6, KnownDepths(2))]))


def test_what_means_nothing_is_refused():
    with pytest.raises(ConfigError, match="looks ahead"):
        Scheduler(EXPERT, MoRCache(EXPERT)).submit(GenerationRequest([1], 5, TopK([1, 0.5, 0.25])))
    for keys in ({"rows": 0}, {"exits": 0}, {"max_sequences": 0}, {"chunk": 0}, {"patience": -1}):
        with pytest.raises(ValueError, match="1 or more"):
            Scheduler(EXPERT, MoRCache(EXPERT), **keys)
