"""The cache against a plain record of what was put into it, and against the paper's count of rows."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reason.errors import ConfigError
from reason.methods.mor import decode
from reason.methods.mor.cache import MoRCache, OutOfPages
from reason.methods.mor.halting import HaltingRule
from reason.methods.mor.token_selection import AboveThreshold
from reason.methods.mor.visible_keys import KV_MODES

_spec = importlib.util.spec_from_file_location("mor_small", Path(__file__).with_name("small.py"))
small = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(small)

MODEL = small.network()  # 3 recursions of 2 layers, 2 key heads of width 4
N, B = 3, 2


def row(mark, position, step, layer):
    """What a token writes: no two rows are the same."""
    value = torch.full((2, 4), float(mark * 10**6 + position * 100 + step * 10 + layer))
    return value, -value - 0.5


def put(past, mark, depths, width=1):
    """Tokens of these depths, ``width`` at a time, step by step as a pass through the network does it."""
    for first in range(0, len(depths), width):
        some = np.array(depths[first : first + width])
        start = past.length
        past.append(len(some))
        for layer in range(2):
            pairs = [row(mark, start + i, 9, layer) for i in range(len(some))]
            past.ends.write(layer, *(torch.stack(x) for x in zip(*pairs, strict=True)))
        for step in range(N):
            gone = start + np.flatnonzero(some == step)
            if step and len(gone) and (run := past.exit(gone)) is not None:
                write(run, mark, gone, 8)
            at = start + np.flatnonzero(some > step)
            if len(at):
                past.enter(step, at)
                if past.writes(step):
                    write(past.spans[step], mark, at, step)
    return past


def write(run, mark, at, step):
    for layer in range(B):
        run.write(
            layer, *(torch.stack(x) for x in zip(*(row(mark, p, step, layer) for p in at), strict=True))
        )


def plainly(kv_mode, marks, depths, step):
    """(mark, position, step written) of the keys that are seen at a step, in no order."""
    seen = set()
    for position, (mark, depth) in enumerate(zip(marks, depths, strict=True)):
        if kv_mode == "sharing":
            seen.add((mark, position, 0))
        elif depth > step:
            seen.add((mark, position, step))
        elif kv_mode != "recursion":
            seen.add((mark, position, {"hybrid": 0, "deepest": depth - 1, "propagate": 8}[kv_mode]))
    return seen


def check(cache, sequences):
    """sequences: (past, marks, depths) each."""
    stores = [run.storage for past, *_ in sequences for run in (past.ends, *past.spans)]
    assert cache.bytes() == sum(s.nbytes for s in stores) == cache.used * cache.page_size * cache.row_bytes
    assert cache.used == sum(cache.pages_needed(depths) for _, _, depths in sequences)
    for past, marks, depths in sequences:
        assert past.length == len(depths) and past.depth.tolist() == depths
        for step in range(N):
            took = [p for p, d in enumerate(depths) if d > step]
            if cache.kv_mode == "sharing" and step:
                assert past.count(step) == 0 and len(past.spans) == 1
            else:
                assert past.count(step) == len(took) and past.spans[step].positions.tolist() == took
            wanted = plainly(cache.kv_mode, marks, depths, step)
            for layer in range(B):
                keys, values = past.view(step, layer)
                assert keys.shape == (2, len(wanted), 4)
                theirs = torch.tensor([row(*w, layer)[0][0, 0] for w in wanted])
                assert torch.equal(keys[0, :, 0].sort().values, theirs.sort().values)
                assert torch.equal(-keys - 0.5, values) and torch.equal(keys, keys[:1, :, :1].expand_as(keys))
        for layer in range(2):
            keys, _ = past.ends.view(layer)
            mine = [row(m, p, 9, layer)[0][0, 0] for p, m in enumerate(marks)]
            assert torch.equal(keys[0, 0, :, 0], torch.tensor(mine))


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_history_is_what_a_plain_record_says(data):
    kv_mode = data.draw(st.sampled_from(KV_MODES))
    cache = MoRCache(MODEL, kv_mode, page_size=data.draw(st.sampled_from([1, 3, 4])))
    sequences = [(cache.open(), [], [])]
    for turn in range(data.draw(st.integers(1, 6))):
        past, marks, depths = data.draw(st.sampled_from(sequences))
        act = data.draw(st.sampled_from(["put", "put", "truncate", "fork", "free", "open"]))
        if act == "put":
            more = data.draw(st.lists(st.integers(1, N), min_size=1, max_size=9))
            put(past, turn + 1, more, data.draw(st.integers(1, 9)))
            marks += [turn + 1] * len(more)
            depths += more
        elif act == "truncate":
            length = data.draw(st.integers(0, len(depths) + 1))
            past.truncate(length)
            del marks[length:], depths[length:]
        elif act == "fork":
            sequences.append((past.fork(), marks.copy(), depths.copy()))
        elif act == "free":
            past.free()
            marks.clear(), depths.clear()
        else:
            sequences.append((cache.open(), [], []))
        check(cache, sequences)
    for past, *_ in sequences:
        past.free()
    assert cache.used == cache.bytes() == 0


@pytest.mark.parametrize("kv_mode", KV_MODES)
def test_a_full_cache_changes_nothing(kv_mode):
    cache = MoRCache(MODEL, kv_mode, page_size=2)
    past = put(cache.open(), 1, [1, 3, 2])
    used = cache.used
    cache.limit = 2 * used - 1
    with pytest.raises(OutOfPages, match=f"{used} of {cache.limit} pages"):
        past.append(16)
    with pytest.raises(OutOfPages):
        past.fork()
    check(cache, [(past, [1] * 3, [1, 3, 2])])
    assert cache.used == used and cache.free_pages == used - 1
    past.free()
    check(cache, [(put(past, 2, [3, 1]), [2] * 2, [3, 1])])


@pytest.mark.parametrize(
    "kv_mode, rows", [("recursion", 22), ("hybrid", 22), ("deepest", 22), ("sharing", 12)]
)
def test_rows_per_token_are_those_of_the_paper(kv_mode, rows):
    """360M with three recursions: 2 + 10 sum(c) rows of 32, where c = 1, 2/3, 1/3; 2 + 10 if the first step's serve all."""
    cache = MoRCache(small.network(block=10), kv_mode)
    depth = [1, 2, 3] * 300
    assert cache.bytes_needed(depth) == rows * len(depth) * cache.row_bytes
    assert cache.pages_needed(depth) * cache.page_size * cache.row_bytes == pytest.approx(
        cache.bytes_needed(depth), rel=0.02
    )


@torch.no_grad()
@pytest.mark.parametrize("kv_mode", KV_MODES)
def test_a_text_that_was_read_and_written_has_the_rows_of_its_depths(kv_mode):
    """A pool holds those that took its step; with sharing nothing is written after the first."""
    cache = MoRCache(MODEL, kv_mode, page_size=2)
    past, rule = cache.open(), HaltingRule(MODEL, AboveThreshold([0.0, 0.3]))
    decode.prefill(MODEL, past, small.text(17), rule, chunk=5)
    for token in small.text(9, seed=3):
        decode.step(MODEL, [past], [token], [rule])
    depth = past.depth
    assert len(depth) == 26 and set(depth) == {1, 2, 3}
    took = [int((depth > r).sum()) for r in range(N)]
    assert [past.count(r) for r in range(N)] == ([26, 0, 0] if kv_mode == "sharing" else took)
    assert past.pages == cache.used == cache.pages_needed(depth)
    assert cache.bytes() == cache.used * cache.page_size * cache.row_bytes >= cache.bytes_needed(depth)


def test_without_ends_there_is_only_the_loop():
    cache = MoRCache(small.network(sharing="cycle"), "recursion", page_size=4)
    past = cache.open()
    past.append(5)
    past.enter(0, range(5))
    past.enter(1, [2])
    assert cache.used == B * (2 + 1) and cache.bytes_needed([1, 1, 2, 1, 1]) == B * 6 * cache.row_bytes


def test_half_precision_takes_half():
    model = small.network().to(torch.bfloat16)
    assert MoRCache(model).row_bytes * 2 == MoRCache(MODEL).row_bytes


def test_what_means_nothing_is_refused():
    with pytest.raises(ConfigError, match="recursion"):
        MoRCache(MODEL, "recursive")
    with pytest.raises(ValueError, match="page"):
        MoRCache(MODEL, page_size=0)
