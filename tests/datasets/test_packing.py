"""Windows and cases: every token a target exactly once, after the token before it; spans land on their tokens."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from reason.backbones.tokens import Tokens
from reason.datasets import packing, tasks
from reason.datasets.documents import Documents
from reason.datasets.packing import IGNORE, Cases, Encoded, Windows, encode
from reason.datasets.textconfig import MixedStreamConfig
from reason.errors import ConfigError, DataError

EOS = 0


class Numbered:
    """A tokenizer of characters in which no two tokens of a corpus are the same: 1, 2, 3 ..."""

    eos = EOS

    def __init__(self):
        self.next = 1

    def encode(self, texts):
        found = []
        for text in texts:
            found.append(
                (list(range(self.next, self.next + len(text))), [(i, i + 1) for i in range(len(text))])
            )
            self.next += len(text)
        return found


def numbered(lengths: list[int], levels=None) -> Encoded:
    texts = ["x" * n for n in lengths]
    return encode(Documents([f"d{i}" for i in range(len(texts))], texts, levels), Numbered())


def before(data: Encoded) -> dict[int, int]:
    """What comes before each token of a document: the one before it, or EOS."""
    found = {}
    for a, b in zip(data.offsets[:-1], data.offsets[1:], strict=True):
        own = data.ids[a:b].tolist()
        found |= dict(zip(own, [EOS, *own], strict=False))
    return found


def rows_of(batch, *names):
    return zip(*(batch[name].tolist() for name in names), strict=True)


LENGTHS = st.lists(st.integers(0, 30), min_size=1, max_size=12)


# --- windows ------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(lengths=LENGTHS, context=st.integers(1, 20))
def test_plain_text_is_one_stream(lengths, context):
    assume(sum(lengths) >= context)
    data = numbered(lengths)
    windows = Windows(data, context)
    batch = windows.batch(np.arange(len(windows)))
    stream = []
    for a, b in zip(data.offsets[:-1], data.offsets[1:], strict=True):
        stream += [EOS, *data.ids[a:b].tolist()]
    inputs, targets = stream[:-1], stream[1:]
    pad = -len(inputs) % context
    assert batch["tokens"].flatten().tolist() == inputs + [EOS] * pad
    assert batch["targets"].flatten().tolist() == targets + [IGNORE] * pad
    assert batch["level"].flatten().tolist() == [0] * len(targets) + [-1] * pad
    assert batch["tokens"].shape == (len(windows), context) and windows.tokens == sum(lengths)
    assert windows.split == 0
    for name in ("tokens", "targets", "level"):
        assert batch[name].dtype == torch.int64
        index = np.arange(len(windows))[::-2]
        assert torch.equal(windows.batch(index)[name], batch[name][index.copy()])


@settings(max_examples=150, deadline=None)
@given(lengths=LENGTHS, context=st.integers(1, 40))
def test_documents_with_levels_stay_whole(lengths, context):
    assume(sum(lengths))
    data = numbered(lengths, [[(0, n, i % 3)] if n else [] for i, n in enumerate(lengths)])
    windows = Windows(data, context)
    batch = windows.batch(np.arange(len(windows)))
    level = dict(zip(data.ids.tolist(), data.level.tolist(), strict=True))
    seen: Counter[int] = Counter()
    homes: dict[int, set[int]] = {}
    owner = dict(zip(data.ids.tolist(), np.repeat(np.arange(len(data)), data.tokens).tolist(), strict=True))
    for home, (tokens, targets, levels) in enumerate(rows_of(batch, "tokens", "targets", "level")):
        for token, target, steps in zip(tokens, targets, levels, strict=True):
            if target == IGNORE:  # a pad, or the end of a document
                assert steps == -1
                continue
            assert token == before(data)[target] and steps == level[target]
            seen[target] += 1
            homes.setdefault(owner[target], set()).add(home)
    assert seen == Counter(data.ids.tolist())
    assert all(len(found) == 1 for d, found in homes.items() if lengths[d] <= context)
    assert windows.split == sum(n > context for n in lengths)


@given(lengths=st.lists(st.integers(1, 40), min_size=2, max_size=40))
def test_no_two_windows_could_be_one(lengths):
    windows = Windows(numbered(lengths, [[(0, n, 0)] for n in lengths]), 64)
    targets = windows.batch(np.arange(len(windows)))["targets"].numpy()
    used = 2 + np.array([np.flatnonzero(row != IGNORE).max() for row in targets])  # a token more than inputs
    assert len(used) == 1 or np.sort(used)[:2].sum() > 65


def test_documents_without_a_span_ask_for_nothing():
    windows = Windows(numbered([5, 3], [[], []]), 6)
    assert (windows.batch(np.arange(len(windows)))["targets"] == IGNORE).all() and len(windows) == 2


def test_order_is_a_seeded_permutation():
    data = numbered([25, 30, 10])
    for examples in (Windows(data, 4), Cases(data, 4)):
        order = examples.order(np.random.default_rng(1), 2)
        assert sorted(order.tolist()) == list(range(len(examples)))
        assert (order == examples.order(np.random.default_rng(1), 2)).all()
    orders = [Windows(data, 4).order(np.random.default_rng(seed), 2).tolist() for seed in range(5)]
    assert len({tuple(order) for order in orders}) > 1


# --- cases --------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(lengths=LENGTHS, context=st.integers(1, 20), levelled=st.booleans(), seed=st.integers(0, 99))
def test_cases_cover_each_document(lengths, context, levelled, seed):
    assume(sum(lengths))
    levels = [[(i, i + 1, i) for i in range(0, n, 2)] for n in lengths] if levelled else None
    data = numbered(lengths, levels)
    cases = Cases(data, context)
    index = np.random.default_rng(seed).permutation(len(lengths))[: 1 + seed % len(lengths)]
    batch = cases.batch(index)
    width = batch["tokens"].shape[1]
    assert width == max([min(lengths[i], context) for i in index])
    found: dict[int, list[int]] = {row: [] for row in range(len(index))}
    for tokens, targets, level, length, case in rows_of(
        batch, "tokens", "targets", "level", "length", "case"
    ):
        document = index[case]
        own = data.ids[data.offsets[document] : data.offsets[document + 1]].tolist()
        own_level = data.level[data.offsets[document] : data.offsets[document + 1]].tolist()
        done = len(found[case])
        assert tokens == ([EOS, *own][done : done + length]) + [EOS] * (width - length)
        assert level == own_level[done : done + length] + [-1] * (width - length)
        wanted = [t if s >= 0 else IGNORE for t, s in zip(own, own_level, strict=True)]
        assert targets == wanted[done : done + length] + [IGNORE] * (width - length)
        assert length == context or done + length == len(own)
        found[case] += own[done : done + length]
    for row, document in enumerate(index):
        assert len(found[row]) == cases.tokens[document] == lengths[document] == cases.bytes[document]
        assert (batch["case"] == row).sum() == cases.windows[document]
    assert (np.diff(batch["case"]) >= 0).all()


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=12), most=st.integers(1, 12))
def test_batches_keep_to_a_number_of_windows(lengths, most):
    cases = Cases(numbered(lengths), 7)
    index = np.arange(len(lengths))[::-1]
    runs = list(cases.batches(index, most))
    assert np.concatenate(runs).tolist() == index.tolist()
    assert all(len(run) == 1 or cases.windows[run].sum() <= most for run in runs)
    for run, after in itertools.pairwise(runs):  # none could have been longer
        assert cases.windows[run].sum() + cases.windows[after[0]] > most


@given(
    lengths=st.lists(st.integers(1, 30), min_size=2, max_size=12),
    context=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_some_documents_are_the_same_documents(lengths, context, seed):
    cases = Cases(numbered(lengths, [[(0, n, i)] for i, n in enumerate(lengths)]), context)
    index = np.random.default_rng(seed).permutation(len(lengths))[: 1 + seed % len(lengths)]
    some = cases.take(index)
    assert some.id.tolist() == cases.id[index].tolist() and len(some) == len(index)
    assert some.bytes.tolist() == cases.bytes[index].tolist()
    assert some.tokens.tolist() == cases.tokens[index].tolist()
    assert some.levels == cases.levels and some.context == context, (
        "columns of results do not depend on the part"
    )
    whole, few = cases.batch(index), some.batch(np.arange(len(index)))
    assert all(torch.equal(whole[name], few[name]) for name in whole)
    runs = [index[run].tolist() for run in some.batches(np.arange(len(index)), 4)]
    assert runs == [run.tolist() for run in cases.batches(index, 4)]
    assert some.find(some.id[0]) == 0 and len(cases) == len(lengths)
    mask = cases.tokens > 10
    assert cases.take(mask).id.tolist() == cases.id[mask].tolist()


def test_find():
    cases = Cases(numbered([3, 4]), 7)
    assert cases.find("d1") == 1
    with pytest.raises(DataError, match="no document 'd2'") as caught:
        cases.find("d2")
    assert "Did you mean" in caught.value.hint


# --- encoding -----------------------------------------------------------------------------------------

TEXT = st.text(alphabet="ab é😀\n", max_size=25)


@settings(max_examples=60, deadline=None)
@given(
    text=TEXT,
    cuts=st.lists(st.integers(0, 25), max_size=8, unique=True),
    kind=st.sampled_from(["bpe", "byte"]),
)
def test_spans_land_on_the_tokens_that_overlap_them(text, cuts, kind):
    cuts = sorted(c for c in cuts if c <= len(text))
    spans = [(a, b, i + 1) for i, (a, b) in enumerate(zip(cuts[::2], cuts[1::2], strict=False))]
    tokens = Tokens.train(["ab ab é 😀\n" * 20], kind, 280, cache=False)
    data = encode(Documents(["a", "b"], [text, "aab"], [spans, [(1, 2, 5)]]), tokens)
    ((_, places), _) = tokens.encode([text, "aab"])
    for (start, end), level in zip(places, data.level.tolist(), strict=False):
        over = [steps for a, b, steps in spans if a < end and b > start]
        assert level == max(over, default=-1)
    assert data.bytes.tolist() == [len(text.encode()), 3] and len(data.level) == len(data.ids)
    assert tokens.decode(data.ids[: data.offsets[1]].tolist()) == text
    plain = encode(Documents(["a", "b"], [text, "aab"]), tokens)
    assert (plain.level == 0).all() and (plain.ids == data.ids).all() and not plain.levelled


def test_a_span_below_zero_asks_for_nothing():
    data = numbered([4], [[(0, 2, -1), (2, 4, 1)]])
    assert data.level.tolist() == [-1, -1, 1, 1]


def test_more_text_than_is_encoded_at_once(monkeypatch):
    monkeypatch.setattr(packing, "AT_ONCE", 5)
    lengths = [2, 3, 9, 1, 0, 4, 1, 0]
    data = numbered(lengths, [[(0, n, i)] if n else [] for i, n in enumerate(lengths)])
    assert data.ids.tolist() == list(range(1, 21)) and data.tokens.tolist() == lengths
    assert data.level.tolist() == np.repeat(np.arange(8), lengths).tolist()


def test_many_documents():
    data = numbered([2] * 2500, [[(1, 2, i % 7)] for i in range(2500)])
    assert data.level[1::2].tolist() == [i % 7 for i in range(2500)] and len(data) == 2500


def test_a_task_through_its_own_tokenizer():
    """Answers are targets with their level; the word before each of them is ``=``."""
    corpus = tasks.load(MixedStreamConfig(train_documents=40, valid_documents=4, test_documents=4)).text()
    tokens = Tokens.train(corpus.train.text, "word", 1000, cache=False)
    windows = Windows(encode(corpus.train, tokens), 256)
    assert len(windows) == 40 and windows.split == 0
    batch = windows.batch(np.arange(40))
    hard = batch["level"] > 0
    words = [tokens.decode([i]) for i in range(tokens.size)]
    assert hard.sum() == 40 * 8
    assert {words[i] for i in batch["tokens"][hard].tolist()} == {"="}
    assert {words[i][0] for i in batch["targets"][hard].tolist()} == {"s"}
    assert (batch["targets"][batch["level"] < 0] == IGNORE).all()
    cases = Cases(encode(corpus.test, tokens), 100)
    assert (cases.tokens == 249).all() and (cases.windows == 3).all()
    assert int((cases.batch(np.arange(4))["level"] > 0).sum()) == 4 * 8


# --- refusals -----------------------------------------------------------------------------------------


def test_too_little_text_and_windows_that_make_no_sense():
    with pytest.raises(DataError, match=r"hold 9 tokens, fewer than one window takes \(10\)") as caught:
        Windows(numbered([4, 5]), 10)
    assert "backbone.context" in caught.value.hint
    assert len(Windows(numbered([4, 5]), 9)) == 2  # the end of the first document is a target too
    assert len(Windows(numbered([4, 5], [[], []]), 10)) == 1
    for data in (numbered([0, 0]), numbered([0], [[]])):
        with pytest.raises(DataError, match="hold 0 tokens"):
            Windows(data, 1)
        with pytest.raises(DataError, match="hold 0 tokens"):
            Cases(data, 4)
    for examples in (Windows, Cases):
        with pytest.raises(ConfigError, match="context of 0"):
            examples(numbered([4]), 0)
