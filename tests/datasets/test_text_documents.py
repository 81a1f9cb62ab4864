"""Splitting, cutting and the digest of corpora, whatever they were read from."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reason.datasets.documents import Corpus, Documents, build, cut, digest
from reason.datasets.textconfig import CorpusKeys
from reason.errors import ConfigError, DataError


def made(count, prefix="d"):
    return Documents([f"{prefix}{i}" for i in range(count)], [f"text {prefix} {i}" for i in range(count)])


def rows(documents: Documents) -> set[tuple[str, str]]:
    return set(zip(documents.id, documents.text, strict=True))


@settings(max_examples=40, deadline=None)
@given(
    texts=st.lists(st.text(alphabet="ab \n", max_size=4), min_size=60, max_size=120),
    valid=st.floats(0.05, 0.4),
    test=st.floats(0.05, 0.4),
)
def test_each_text_is_in_one_split_and_none_is_lost(texts, valid, test):
    documents = Documents([f"{i:03d}" for i in range(len(texts))], texts)
    try:
        data = build({"train": documents}, CorpusKeys(valid=valid, test=test), "texts")
    except DataError as error:  # few texts and small shares
        assert any(
            said in error.message for said in ("none falls into", "only one document", "holds no text")
        )
        return
    parts = [set(part.text) for part in data.text().parts.values()]
    assert sum(map(len, parts)) == len(set().union(*parts)) == sum(map(len, data.corpus.parts.values()))
    assert set().union(*parts) == {t for t in texts if t.strip()}
    assert all(part.id == sorted(part.id) for part in data.corpus.parts.values())


@settings(max_examples=25, deadline=None)
@given(first=st.integers(100, 200), more=st.integers(1, 100), share=st.floats(0.1, 0.3))
def test_a_document_stays_in_its_split_when_others_are_added(first, more, share):
    keys = CorpusKeys(valid=share, test=0.2)
    few = build({"train": made(first)}, keys, "few").corpus
    many = build({"train": made(first + more)}, keys, "many").corpus
    for split, part in few.parts.items():
        assert rows(part) <= rows(many.parts[split])
    other = build({"train": made(first)}, CorpusKeys(valid=share + 0.1, test=0.2), "few").corpus
    assert other.test == few.test and rows(few.valid) <= rows(other.valid)
    other = build({"train": made(first)}, CorpusKeys(valid=share, test=0.3), "few").corpus
    assert other.valid == few.valid and rows(few.test) <= rows(other.test)


def test_shares_are_kept():
    data = build({"train": made(4000)}, CorpusKeys(valid=0.1, test=0.25), "texts")
    assert 320 < data.info["valid_documents"] < 480
    assert 900 < data.info["test_documents"] < 1100
    assert data.info["train_documents"] == 4000 - data.info["valid_documents"] - data.info["test_documents"]
    assert data.info["test_characters"] == sum(map(len, data.corpus.test.text))


def test_given_splits_stay_and_repeats_never_train_what_is_judged():
    found = {
        "train": Documents(["a", "b", "c", "e"], ["same", "only", "judged", "  \n"]),
        "valid": Documents(["v", "w"], ["same", "own"]),
        "test": Documents(["t"], ["judged"]),
    }
    data = build(found, CorpusKeys(), "files")
    assert rows(data.corpus.train) == {("b", "only")}
    assert rows(data.corpus.valid) == {("v", "same"), ("w", "own")} and rows(data.corpus.test) == {
        ("t", "judged")
    }
    assert data.notes == [
        "Documents without text were dropped: 1.",
        "Exact repeats of other documents were dropped: 2.",
    ]


def test_a_split_that_is_not_given_comes_out_of_training():
    valid = made(5, "v")
    data = build({"train": made(300), "valid": valid}, CorpusKeys(test=0.1), "files")
    assert data.corpus.valid == valid
    assert len(data.corpus.test) > 10 and rows(data.corpus.train) | rows(data.corpus.test) == rows(made(300))


def test_fewer_documents_to_train_on():
    whole = build({"train": made(300)}, CorpusKeys(), "texts")
    some, fewer = (build({"train": made(300)}, CorpusKeys(documents=n), "texts") for n in (50, 20))
    assert some.corpus.test == whole.corpus.test and some.corpus.valid == whole.corpus.valid
    assert len(some.corpus.train) == 50 and some.digest != whole.digest
    assert rows(fewer.corpus.train) < rows(some.corpus.train) < rows(whole.corpus.train)
    assert any("50 of" in note for note in some.notes)
    assert build({"train": made(300)}, CorpusKeys(documents=999), "texts").digest == whole.digest


# --- cutting ------------------------------------------------------------------------------------------


@given(text=st.text(alphabet="ab \n", max_size=300), size=st.integers(1, 50))
def test_pieces_join_to_the_text(text, size):
    pieces = cut(text, size)
    assert "".join(pieces) == text
    assert all(len(piece) <= size for piece in pieces) and (all(pieces) or not text)
    for piece in pieces[:-1]:  # it ends at a line end, or there was none to end at
        half = piece[size // 2 :]
        assert piece.endswith("\n") or "\n" not in half
        assert piece.endswith(("\n", " ")) or (len(piece) == size and " " not in half)


def test_pieces_of_a_document_stay_together():
    texts = [f"document {i}\n" * 40 for i in range(200)]
    whole = build({"train": Documents([f"d{i}" for i in range(200)], texts)}, CorpusKeys(), "texts")
    parts = build(
        {"train": Documents([f"d{i}" for i in range(200)], texts)}, CorpusKeys(cut=150), "texts"
    ).corpus
    for split, part in parts.parts.items():
        assert max(map(len, part.text)) <= 150
        assert {name.split(":")[0] for name in part.id} == set(whole.corpus.parts[split].id)
        joined: dict[str, str] = {}
        for name, text in zip(part.id, part.text, strict=True):
            joined[name.split(":")[0]] = joined.get(name.split(":")[0], "") + text
        assert list(joined.values()) == whole.corpus.parts[split].text


def test_a_single_document_is_refused_or_cut_in_its_order():
    play = "".join(f"line {i} of the play\n" for i in range(600))
    one = {"train": Documents(["play.txt"], [play])}
    with pytest.raises(DataError, match="only one document") as caught:
        build(one, CorpusKeys(), "play.txt")
    suggested = int(caught.value.hint.split("dataset.cut=")[1].split(".")[0])
    for size in (suggested, 500):
        data = build(one, CorpusKeys(cut=size), "play.txt")
        assert "".join(text for part in data.corpus.parts.values() for text in part.text) == play
        assert data.corpus.train.id[0] == "play.txt:00000" and "pieces, in order: " in data.notes[0]
        assert len(data.corpus.test) == len(data.corpus.valid) == max(1, round(0.05 * len(play) / size))
    valid = made(1, "v")
    data = build({**one, "valid": valid}, CorpusKeys(cut=500), "play")
    assert data.corpus.valid == valid and data.corpus.test.text[-1].endswith("599 of the play\n")
    with pytest.raises(DataError, match="2 pieces, too few"):
        build({"train": Documents(["x"], ["abc " * 40])}, CorpusKeys(cut=100), "x")


# --- refusals -----------------------------------------------------------------------------------------


def test_nothing_to_split():
    with pytest.raises(DataError, match="holds no text"):
        build({"train": Documents(["a", "b"], ["", " \n"])}, CorpusKeys(), "a folder")
    with pytest.raises(
        DataError, match=r"of 3 documents, none falls into the (validation|test) split"
    ) as caught:
        build({"train": made(3)}, CorpusKeys(valid=0.01, test=0.01), "a folder")
    assert "shares" in caught.value.hint


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"valid": 0.0}, r"dataset\.valid=0\.0 is no share"),
        ({"test": 1.0}, r"dataset\.test=1\.0 is no share"),
        ({"valid": 5}, r"dataset\.valid=5 is no share"),
        ({"valid": 0.5, "test": 0.5}, "leave nothing to train on"),
        ({"documents": -1}, r"dataset\.documents=-1 is out of range"),
        ({"cut": 99}, r"dataset\.cut=99 is out of range"),
    ],
)
def test_keys_out_of_bounds(keys, message):
    with pytest.raises(ConfigError, match=message) as caught:
        CorpusKeys(**keys)
    assert caught.value.hint


# --- the digest ---------------------------------------------------------------------------------------


def test_the_digest_sees_all_that_counts_and_nothing_else():
    one, two, three = made(3, "a"), made(2, "b"), made(1, "c")
    corpus = Corpus(one, two, three)
    levelled = Documents(one.id, one.text, [[(0, 1, 0)], [], [(0, 2, 3)]])
    raised = Documents(one.id, one.text, [[(0, 1, 0)], [], [(0, 2, 4)]])
    others = [
        corpus,
        Corpus(two, one, three),
        Corpus(one, two, three, words=True),
        Corpus(Documents(["a0", "a1", "x"], one.text), two, three),
        Corpus(Documents(one.id, [*one.text[:2], "other"]), two, three),
        Corpus(levelled, two, three),
        Corpus(raised, two, three),
        Corpus(Documents(["a0"], one.text[:1]), made(4, "b"), three),
    ]
    digests = [digest(c) for c in others]
    assert len(set(digests)) == len(digests) and all(len(d) == 32 for d in digests)
    assert digest(Corpus(made(3, "a"), made(2, "b"), made(1, "c"))) == digests[0]


def test_the_order_of_documents_plays_no_part():
    documents = made(80)
    turned = Documents(documents.id[::-1], documents.text[::-1])
    want = build({"train": documents}, CorpusKeys(name="one"), "here")
    assert build({"train": turned}, CorpusKeys(name="two"), "there").digest == want.digest
