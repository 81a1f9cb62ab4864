"""The trie: ancestors, packing, merging, and the worked example of two turns."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reason.backbones.trie import Trie, visible


@st.composite
def parents(draw, least: int = 1, most: int = 40) -> list[int]:
    """A random forest in depth-first order: each row hangs under some row of the last root path."""
    parent, path = [-1], [0]
    for row in range(1, draw(st.integers(least, most))):
        keep = draw(st.integers(0, len(path)))  # length of the root path that stays open
        del path[keep:]
        parent.append(path[-1] if path else -1)
        path.append(row)
    return parent


def ancestors(parent: list[int], row: int) -> set[int]:
    found = set()
    while row >= 0:
        found.add(row)
        row = parent[row]
    return found


@given(parents())
@settings(max_examples=100, deadline=None)
def test_a_row_sees_itself_and_its_ancestors(parent):
    trie = Trie.from_parents(parent)
    seen = trie.visible()
    for row in range(len(parent)):
        expected = ancestors(parent, row)
        assert set(seen[row].nonzero().flatten().tolist()) == expected
        assert trie.depth[row] == len(expected) - 1
        assert trie.path(row).tolist() == sorted(expected)
    assert trie.pairs() == int(seen.sum())
    assert torch.equal(seen.sum(-1), trie.depth + 1)


@pytest.mark.parametrize("parent", [[0], [1, -1], [-1, 0, 0, 1], [-1, -1, 0], [-1, 0, 5], [-1, -2], [-1, 1]])
def test_an_order_that_is_not_depth_first_is_refused(parent):
    with pytest.raises(ValueError, match="depth-first"):
        Trie.from_parents(parent)


@given(st.lists(parents(most=12), min_size=1, max_size=5))
@settings(max_examples=50, deadline=None)
def test_packed_tries_do_not_see_each_other(forests):
    tries = [Trie.from_parents(p) for p in forests]
    packed = Trie.pack(tries)
    assert torch.equal(packed.visible(), torch.block_diag(*[t.visible().int() for t in tries]).bool())
    again = Trie.from_parents(packed.parent)
    assert torch.equal(again.exit, packed.exit) and torch.equal(again.depth, packed.depth)


@given(st.integers(1, 9), st.integers(0, 4))
@settings(deadline=None)
def test_comb_is_the_trie_of_its_parents(trunk, branch):
    comb = Trie.comb(trunk, branch)
    same = Trie.from_parents(comb.parent)
    assert torch.equal(comb.exit, same.exit) and torch.equal(comb.depth, same.depth)
    width = branch + 1
    for t in range(trunk):
        root_path = [s * width for s in range(t + 1)]
        for k in range(width):
            assert comb.path(t * width + k).tolist() == root_path + [t * width + j for j in range(1, k + 1)]


def test_chain_is_causal():
    assert torch.equal(Trie.chain(6).visible(), torch.ones(6, 6, dtype=torch.bool).tril())


sequences = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=7), min_size=1, max_size=8)


@given(sequences)
@settings(max_examples=100, deadline=None)
def test_merged_sequences_are_the_smallest_trie(samples):
    trie, tokens, leaves = Trie.from_sequences(samples)
    prefixes = {tuple(s[: n + 1]) for s in samples for n in range(len(s))}
    assert len(trie) == len(tokens) == len(prefixes)
    for sample, leaf in zip(samples, leaves.tolist(), strict=True):
        assert tokens[trie.path(leaf)].tolist() == sample
    # The child with the longest remaining path comes last.
    height = [int(trie.depth[row : trie.exit[row]].max() - trie.depth[row]) for row in range(len(trie))]
    for up in {-1, *range(len(trie))}:
        children = (trie.parent == up).nonzero().flatten().tolist()
        assert [height[c] for c in children] == sorted(height[c] for c in children)


def test_an_empty_sequence_is_refused():
    with pytest.raises(ValueError, match="sequence 1 is empty"):
        Trie.from_sequences([[1], []])


def test_two_turns_of_reasoning():
    """Goru et al., arXiv 2504.18246: h=2 t=3 r=2, then h=1 t=2 r=2; history drops the reasoning."""
    h1, t1, r1, h2, t2, r2 = [1, 2], [3, 4, 5], [6, 7], [8], [9, 10], [11, 12]
    trie, tokens, leaves = Trie.from_sequences([h1 + t1 + r1, h1 + r1 + h2 + t2 + r2])
    assert tokens.tolist() == h1 + t1 + r1 + r1 + h2 + t2 + r2
    assert trie.depth.tolist() == [0, 1, 2, 3, 4, 5, 6, 2, 3, 4, 5, 6, 7, 8]
    assert trie.exit.tolist() == [14, 14, 7, 7, 7, 7, 7, 14, 14, 14, 14, 14, 14, 14]
    assert trie.pairs() == 70
    picture = ["".join(".#"[int(cell)] for cell in row) for row in trie.visible()]
    assert picture[6] == "#######......."
    assert picture[7] == "##.....#......"
    assert picture[9] == "##.....###...."
    assert picture[13] == "##.....#######"

    weight = torch.zeros(len(trie))
    for leaf, labelled in zip(leaves, (5, 4), strict=True):
        weight[trie.path(int(leaf))[-labelled:]] += 1.0
    parent_row, target, w = trie.triples(tokens, weight)
    assert target.tolist() == t1 + r1 + t2 + r2
    assert parent_row.tolist() == [1, 2, 3, 4, 5, 9, 10, 11, 12]
    assert w.tolist() == [1.0] * 9


def test_two_labelled_children_share_a_parent_row():
    """What a shifted label row cannot say."""
    trie, tokens, _ = Trie.from_sequences([[1, 2], [1, 3], [1, 4]])
    parent_row, target, _ = trie.triples(tokens, torch.tensor([1.0, 1.0, 1.0, 1.0]))
    assert parent_row.tolist() == [0, 0, 0] and target.tolist() == [2, 3, 4]


def test_batched_parents_keep_their_shape():
    trie = Trie.from_parents([[-1, 0, 0], [-1, 0, 1]])
    assert trie.exit.tolist() == [[3, 2, 3], [3, 3, 3]]
    assert trie.visible().shape == (2, 3, 3)


def test_rule_on_chosen_rows():
    trie = Trie.comb(4, 2)
    queries, keys = torch.tensor([2, 5, 11]), torch.tensor([0, 1, 2, 6, 9])
    assert torch.equal(visible(trie.exit[keys], queries, keys), trie.visible()[queries][:, keys])
