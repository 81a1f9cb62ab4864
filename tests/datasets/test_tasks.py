"""Tasks with known levels: slow evaluators, which read nothing but the text, agree on answers and levels."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reason.datasets.documents import Documents
from reason.datasets.tasks import load, settled
from reason.datasets.textconfig import ChainsConfig, HopConfig, ListOpsConfig, MixedStreamConfig
from reason.errors import ConfigError, DataError

FEW = {"train_documents": 150, "valid_documents": 20, "test_documents": 20}
SEEDS = st.integers(0, 2**31)


def pages(documents: Documents) -> list[list[tuple[str, int | None]]]:
    """Each document as words with their level (None = not supervised)."""
    assert documents.levels is not None
    found = []
    for text, spans in zip(documents.text, documents.levels, strict=True):
        assert all(a < b <= len(text) for a, b, _ in spans)
        assert all(b < c for (_, b, _), (c, _, _) in itertools.pairwise(spans))
        page, start = [], 0
        for word in text.split(" "):
            end = start + len(word)
            inside = [level for a, b, level in spans if a < end and b > start]
            assert word and all(a <= start and end <= b for a, b, _ in spans if a < end and b > start)
            page.append((word, inside[0] if inside else None))
            start = end + 1
        found.append(page)
    return found


def all_pages(data) -> list[list[tuple[str, int | None]]]:
    assert data.text().words
    return [page for part in data.corpus.parts.values() for page in pages(part)]


# --- p-hop --------------------------------------------------------------------------------------------


def check_hops(head: list[str], questions: list[list[tuple[str, int | None]]], hops: int) -> None:
    """Answers follow the map; no shorter way is left, be it back along the map or by an earlier answer."""
    leads = dict(zip(head[::2], head[1::2], strict=True))
    assert len(leads) == len(head) // 2 and set(leads.values()) == set(leads)
    edges = [frozenset(pair) for pair in leads.items()]
    for question in questions:
        (mark, _), (count, _), (start, _), (equals, sight), (answer, level) = question
        assert (mark, equals, sight) == ("?", "=", 0) and level == int(count) <= hops
        assert [asked for _, asked in question[:3]] == [None] * 3
        place = start
        for _ in range(int(count)):
            place = leads[place]
        assert place == answer
        reached, steps = {start}, 0
        while answer not in reached:
            reached |= {symbol for edge in edges if edge & reached for symbol in edge}
            steps += 1
        assert steps == level
        edges.append(frozenset((start, answer)))


@settings(max_examples=8, deadline=None)
@given(seed=SEEDS, hops=st.integers(1, 5), extra=st.integers(0, 6))
def test_hops(seed, hops, extra):
    symbols = max(3, 2 * hops) + extra
    queries = min(4, 1 + (symbols - 1) // max(1, hops - 1))
    data = load(HopConfig(symbols=symbols, hops=hops, queries=queries, seed=seed, **FEW))
    for page in all_pages(data):
        words = [word for word, _ in page]
        first = words.index("?")
        assert first == 2 * symbols and len(page) == first + 5 * queries
        check_hops(words[:first], [page[i : i + 5] for i in range(first, len(page), 5)], hops)
        assert all(level is None for _, level in page[:first])


def test_all_levels_occur_about_as_often():
    data = load(HopConfig(train_documents=800))
    levels = Counter(level for page in pages(data.corpus.train) for _, level in page if level)
    assert sorted(levels) == [1, 2, 3, 4] and max(levels.values()) < 1.25 * min(levels.values())


# --- chains -------------------------------------------------------------------------------------------


@settings(max_examples=8, deadline=None)
@given(seed=SEEDS, depth=st.integers(1, 6), modulus=st.sampled_from([2, 3, 10, 12, 17]))
def test_chains(seed, depth, modulus):
    config = ChainsConfig(depth=depth, modulus=modulus, chains=3, seed=seed, **FEW)
    for page in all_pages(load(config)):
        words = [word for word, _ in page]
        first = words.index("?")
        known: dict[str, int] = {}
        length: dict[str, int] = {}
        used: set[str] = set()
        for assignment in " ".join(words[:first]).removesuffix(" ;").split(" ; "):
            name, expression = assignment.split(" = ")
            before = expression.split(" ")[0]
            assert name not in known and before not in used
            known[name] = eval(expression, {}, known) % modulus
            length[name] = 1 + length.get(before, 0)
            used |= {before} & set(known)
            # Reversible: no value is lost on the way, so none can be skipped.
            if before in known:
                images = {eval(expression, {}, {before: v}) % modulus for v in range(modulus)}
                assert len(images) == modulus
        questions = [page[i : i + 4] for i in range(first, len(page), 4)]
        assert len(questions) == 3 and {q[1][0] for q in questions} == set(known) - used
        for (mark, _), (name, _), (equals, sight), (answer, level) in questions:
            assert (mark, equals, sight) == ("?", "=", 0)
            assert int(answer) == known[name] and level == length[name] <= depth
        assert all(level is None for _, level in page[:first])


# --- listops ------------------------------------------------------------------------------------------

BY_HAND = {
    "[MAX": max,
    "[MIN": min,
    "[MED": lambda values: sorted(values)[(len(values) - 1) // 2],
    "[SUM": sum,
}


def parse(words: list[str]):
    """Nested tuples (operator, argument ...) of the expression that ``words`` begin with; they are consumed."""
    word = words.pop(0)
    if not word.startswith("["):
        return int(word)
    found = [word]
    while words[0] != "]":
        found.append(parse(words))
    words.pop(0)
    return tuple(found)


def evaluate(tree, modulus: int) -> int:
    if isinstance(tree, int):
        return tree
    return BY_HAND[tree[0]]([evaluate(t, modulus) for t in tree[1:]]) % modulus


def level_of(tree, modulus: int) -> int:
    """The least height that settles the value, by trying every value of what is higher up."""
    if isinstance(tree, int):
        return 0
    value = evaluate(tree, modulus)
    heights = [level_of(t, modulus) for t in tree[1:]]
    for height in sorted(set(heights)):
        choices = [
            [evaluate(t, modulus)] if h <= height else range(modulus)
            for t, h in zip(tree[1:], heights, strict=True)
        ]
        if all(BY_HAND[tree[0]](values) % modulus == value for values in itertools.product(*choices)):
            return height + 1
    raise AssertionError("the whole tree settles its value")


@settings(max_examples=6, deadline=None)
@given(seed=SEEDS, depth=st.integers(1, 4), modulus=st.integers(3, 5), arguments=st.integers(2, 4))
def test_listops(seed, depth, modulus, arguments):
    keys = {"train_documents": 60, "valid_documents": 5, "test_documents": 5, "seed": seed}
    config = ListOpsConfig(depth=depth, modulus=modulus, arguments=arguments, expressions=2, **keys)
    try:
        data = load(config)
    except DataError as error:
        assert "but in no training document" in error.message
        return
    seen = set()
    for page in all_pages(data):
        words = [word for word, _ in page]
        levels = [level for _, level in page]
        for _ in range(2):
            before = len(words)
            tree = parse(words)
            size = before - len(words)
            assert levels[:size] == [None] * size and levels[size] == 0
            assert words[0] == "=" and int(words[1]) == evaluate(tree, modulus)
            assert levels[size + 1] == level_of(tree, modulus) <= depth
            seen.add(levels[size + 1])
            words, levels = words[2:], levels[size + 2 :]
        assert not words
    assert seen == set(range(1, depth + 1))


@given(
    operator=st.sampled_from(["MAX", "MIN", "MED", "SUM"]),
    values=st.lists(st.one_of(st.none(), st.integers(0, 3)), min_size=1, max_size=5),
)
def test_settled_is_what_trying_all_values_says(operator, values):
    choices = [range(4) if v is None else [v] for v in values]
    results = {BY_HAND[f"[{operator}"](several) % 4 for several in itertools.product(*choices)}
    assert settled(operator, values, 4) == (len(results) == 1)


# --- mixed-stream -------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [{}, {"length": 60, "share": 0.5, "filler": 2}, {"hops": 1, "length": 30}])
def test_mixed_stream(keys):
    config = MixedStreamConfig(**{**FEW, **keys})
    rule: dict[tuple[str, str], set[str]] = {}
    hard = 0
    for page in all_pages(load(config)):
        words = [word for word, _ in page]
        head = words.index("|")
        assert len(page) == head + 1 + config.length and all(level is None for _, level in page[: head + 1])
        stream, questions = page[head + 1 :], []
        run: list[str] = []
        while stream:
            if stream[0][0] == "?":
                questions.append(stream[:5])
                stream, run = stream[5:], []
                continue
            word, level = stream.pop(0)
            assert word.startswith("w") and level == (0 if len(run) >= 2 else None)
            if level == 0:
                rule.setdefault((run[-2], run[-1]), set()).add(word)
            run.append(word)
        check_hops(words[:head], questions, config.hops)
        assert len(questions) == config.queries
        hard += 5 * len(questions)
    total = sum(FEW.values()) * config.length
    assert abs(hard / total - config.share) < 2.5 / config.length
    assert all(len(after) == 1 for after in rule.values()) and len(rule) > config.filler / 2


def test_the_rule_of_the_filler_follows_the_seed():
    texts = [load(MixedStreamConfig(**FEW, seed=seed)).corpus.test.text for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


# --- all of them --------------------------------------------------------------------------------------

TASKS = [HopConfig, ChainsConfig, ListOpsConfig, MixedStreamConfig]


@pytest.mark.parametrize("task", TASKS)
def test_documents_differ_and_do_not_depend_on_what_is_asked_for_beside_them(task):
    data = load(task(**FEW))
    texts = [text for part in data.corpus.parts.values() for text in part.text]
    assert len(set(texts)) == len(texts) == sum(FEW.values())
    assert data.digest == load(task(**FEW)).digest != load(task(**FEW, seed=1)).digest
    more = load(task(**{**FEW, "train_documents": 170}))
    assert more.corpus.test == data.corpus.test and more.corpus.valid == data.corpus.valid
    assert more.digest != data.digest and more.corpus.train.text[:150] == data.corpus.train.text
    assert data.info["train_documents"] == 150 and data.info["levels"].startswith("0 to ")


def test_splits_stay_apart_where_documents_are_few():
    """72 maps and questions in all: nearly every document that is drawn was drawn before."""
    config = {"symbols": 3, "hops": 1, "queries": 1, "valid_documents": 10, "test_documents": 10}
    data = load(HopConfig(train_documents=16, **config))
    texts = [text for part in data.corpus.parts.values() for text in part.text]
    assert len(set(texts)) == len(texts) == 36  # 2 cycles x 6 orders of pairs x 3 questions
    with pytest.raises(DataError, match="few more than 36 different") as caught:
        load(HopConfig(train_documents=17, **config))
    assert "train_documents" in caught.value.message and "fewer documents" in caught.value.hint


def test_a_word_that_training_lacks_is_refused():
    with pytest.raises(DataError, match="in no training document") as caught:
        load(ChainsConfig(modulus=1000, train_documents=2, valid_documents=20, test_documents=20))
    assert "train_documents" in caught.value.hint


@pytest.mark.parametrize(
    "task, keys",
    [
        (HopConfig, {"hops": 0}), (HopConfig, {"symbols": 7}), (HopConfig, {"symbols": 513}), (HopConfig, {"queries": 0}),
        (HopConfig, {"queries": 7}), (ChainsConfig, {"depth": 0}), (ChainsConfig, {"chains": 65}),
        (ChainsConfig, {"modulus": 1}), (ListOpsConfig, {"depth": 13}), (ListOpsConfig, {"arguments": 1}),
        (ListOpsConfig, {"expressions": 0}), (ListOpsConfig, {"modulus": 2}), (MixedStreamConfig, {"length": 9}),
        (MixedStreamConfig, {"filler": 1}), (MixedStreamConfig, {"share": 0.6}), (MixedStreamConfig, {"length": 500}),
        *((task, {"valid_documents": 0}) for task in TASKS),
    ],
)  # fmt: skip
def test_keys_out_of_bounds(task, keys):
    (key,) = keys
    with pytest.raises(ConfigError, match=rf"dataset\.{key}") as caught:
        task(**keys)
    assert caught.value.hint


def test_the_mend_of_too_many_questions_is_enough():
    with pytest.raises(ConfigError, match="7 questions of up to 4 hops do not fit") as caught:
        HopConfig(queries=7)
    symbols = int(caught.value.hint.split("dataset.symbols to ")[1].split(" ")[0])
    assert symbols == 19
    HopConfig(queries=7, symbols=symbols)
    with pytest.raises(ConfigError, match="do not fit"):
        HopConfig(queries=7, symbols=symbols - 1)
