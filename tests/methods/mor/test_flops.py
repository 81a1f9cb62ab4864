"""The FLOP accounting gives every step count that the paper's release states, and agrees with counting one by one."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reason.methods.mor.flops import (
    DecoderFlops,
    balanced,
    executed,
    published,
    steps_within,
    top_k_size,
    warmup_capacity,
)
from reason.methods.mor.visible_keys import KV_MODES

TOKENS = 1024 * 2048  # of one optimiser step in the paper


@pytest.mark.parametrize(
    "expected, ends, block, capacities, shared",
    [
        (9438, 0, 32, [1], False),  # vanilla, and plain recursive of 32 layers
        (8883, 0, 34, [1], False),  # recursive of 34 layers
        (12619, 2, 15, balanced(2), False),
        (14161, 2, 10, balanced(3), False),
        (14216, 2, 8, balanced(4), False),
        (14672, 2, 10, balanced(3), True),
    ],
)
def test_published_steps(expected, ends, block, capacities, shared):
    per_token = published(960, 2560, 2048, ends=ends, block=block, capacities=capacities, shared=shared)
    assert round(steps_within(16.5e18, per_token, TOKENS)) == pytest.approx(expected, abs=1)


@pytest.mark.parametrize("recursions, block, expected", [(2, 15, 12.3), (3, 10, 11.0), (4, 8, 11.0)])
def test_published_budgets_at_equal_tokens(recursions, block, expected):
    per_token = published(960, 2560, 2048, ends=2, block=block, capacities=balanced(recursions))
    assert round(9438 * TOKENS * per_token / 1e18, 1) == expected


BASES = {  # layers; D, h, h_kv, d_h, F of the SmolLM sizes that the paper uses
    "135M": (30, 576, 9, 3, 64, 1536),
    "360M": (32, 960, 15, 5, 64, 2560),
    "730M": (26, 1536, 24, 8, 64, 4096),
    "1.7B": (24, 2048, 32, 32, 64, 8192),
}
CELLS = {  # layers of the looped block -> millions outside the embedding, for 2, 3 and 4 recursions
    "135M": (106.2, {14: 56.6, 10: 42.5, 9: 38.9, 7: 31.9}),
    "360M": (314.6, {15: 167.2, 10: 118.0, 8: 98.3}),
    "730M": (654.4, {12: 352.4, 8: 251.7, 6: 201.4}),
    "1.7B": (1610.7, {11: 872.5, 8: 671.1, 6: 536.9}),
}


@pytest.mark.parametrize("base", BASES)
def test_published_parameter_counts(base):
    layers, width, heads, kv_heads, head_dim, ffn = BASES[base]
    vanilla, looped = CELLS[base]
    shape = DecoderFlops(width, heads, kv_heads, head_dim, ffn, 49_152, block=layers, ends=0)
    assert round(shape.parameters / 1e6, 1) == vanilla
    for block, millions in looped.items():
        assert round(replace(shape, block=block, ends=2).parameters / 1e6, 1) == millions


def by_hand(shape, depths, kv_mode="recursion", router=0):
    """One token, one layer and one visible key at a time."""
    total = 0
    for t, depth in enumerate(depths):
        seen = t + 1
        total += shape.ends * (shape.layer + seen * shape.pair) + 2 * shape.width * shape.vocab
        for r in range(depth):
            if kv_mode == "recursion" or not r:
                seen = sum(d > r for d in depths[: t + 1])
            else:
                seen = t + 1
            made = 0 if kv_mode == "sharing" and r else shape.keys_values
            total += shape.block * (shape.layer - shape.keys_values + made + seen * shape.pair)
            total += router
        if depth < max(depths):
            total += router  # was scored, and left
            if kv_mode == "propagate":  # and has keys there that come of the state it left with
                total += shape.block * shape.keys_values
    return total


SHAPE = DecoderFlops(width=8, heads=4, kv_heads=2, head_dim=2, ffn=12, vocab=30, block=2, ends=2)


@given(st.lists(st.integers(1, 3), min_size=1, max_size=12))
def test_executed_is_the_sum_over_tokens(depths):
    counts = [sum(d > r for d in depths) for r in range(max(depths))]
    assert executed(SHAPE, len(depths), counts, router=5) == by_hand(SHAPE, depths, router=5)


@pytest.mark.parametrize("kv_mode", KV_MODES)
def test_executed_is_exact_for_every_memory_where_those_who_leave_are_spread_evenly(kv_mode):
    """A text read forwards and backwards: who stays looks at half of it on average, as is counted."""
    for one in ([3] * 7, [3, 1, 2, 1, 1, 2, 3], [1, 1, 2, 2, 2, 1, 1]):
        counts = [sum(d > r for d in one) for r in range(max(one))]
        both = (by_hand(SHAPE, one, kv_mode) + by_hand(SHAPE, one[::-1], kv_mode)) / 2
        assert executed(SHAPE, 7, counts, kv_mode=kv_mode) == both


@pytest.mark.parametrize(
    "capacity, tokens, expected", [(0.29, 100, 29), (1 / 3, 2048, 682), (0.1, 5, 1), (1, 7, 7)]
)
def test_kept(capacity, tokens, expected):
    assert top_k_size(capacity, tokens) == expected


@given(st.floats(0.05, 1), st.integers(1, 500))
def test_warm_up_falls_from_one_to_the_capacity(capacity, steps):
    path = [warmup_capacity(capacity, step, steps) for step in range(steps + 2)]
    assert path[0] == pytest.approx(1) and path[-1] == path[-2] == capacity
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(path))
    assert warmup_capacity(capacity, 0, 0) == capacity


def test_corrections_are_counted_where_they_are_used():
    """Two thin products beside each matrix of a looped layer; not those of keys that are shared."""
    plain = DecoderFlops(16, 4, 2, 4, 24, 23, 2, 2)
    relaxed = replace(plain, lora=3)
    thin = 2 * 3 * ((16 + 16) * 2 + (16 + 16) + (16 + 24) * 3)  # queries, out; keys and values; feed-forward
    assert relaxed.correction == thin
    assert executed(relaxed, 5, [5, 2]) - executed(plain, 5, [5, 2]) == 2 * 7 * thin
    shared = [executed(s, 5, [5, 2], kv_mode="sharing") for s in (plain, relaxed)]
    assert shared[1] - shared[0] == 2 * (7 * thin - 2 * 2 * 3 * (16 + 16))
