"""Frozen vectors of item texts: what a title says, for a backbone that knows only ids.

Two kinds. ``tfidf``: words and word pairs weighted by TF-IDF, reduced by a truncated
SVD; needs no download. ``minilm``: mean-pooled states of all-MiniLM-L6-v2 (Reimers and
Gurevych, arXiv 1908.10084), reduced by PCA; about 84 MB are fetched once. Both end
L2-normalised, and both are kept on disk under a hash of texts, kind and width.

Texts in, vectors out: nothing here knows items, models or training.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from reason.errors import unknown
from reason.files import atomic

KINDS = ("tfidf", "minilm")
RECIPE = 1  # raise it when the same texts would give other vectors
LONGEST = 256  # word pieces read of a text; the model was tuned on no more
PIECES = 4096  # word pieces in one batch


def text_vectors(
    texts: Sequence[str], kind: str, dim: int, *, cache: bool = True, offline: bool = False
) -> Tensor:
    """One unit vector per text, (N, dim) float32; zeros for an empty text.

    kind: "tfidf" or "minilm". dim: components kept; where fewer exist (few texts, few words) the rest
    are zeros. cache: keep the result in the cache folder and take it from there. offline: forbid
    fetching the model.

    The same texts give the same vectors. The reduction is fitted on all texts: they are known before
    any interaction is, so nothing of a test set leaks in.

    Raises:
        ConfigError: unknown kind.
        ValueError: dim below 1.
        DataError: the model is not in the cache and cannot be had.
    """
    if kind not in KINDS:
        raise unknown("kind of text vectors", kind, KINDS)
    if dim < 1:
        raise ValueError(f"text vectors need at least 1 component, not {dim}")
    if not len(texts):
        return torch.zeros(0, dim)
    from safetensors.torch import load_file, save

    file = _place(texts, kind, dim)
    if cache and file.is_file():
        return load_file(file)["vectors"]
    found = _tfidf(texts, dim) if kind == "tfidf" else _pca(_minilm(texts, offline), dim)
    vectors = torch.zeros(len(texts), dim)
    vectors[:, : found.shape[1]] = torch.from_numpy(found.astype(np.float32))
    vectors = torch.nn.functional.normalize(vectors, dim=1)
    vectors[[i for i, text in enumerate(texts) if not text.strip()]] = 0.0
    if cache:
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic(file, "wb") as f:
            f.write(save({"vectors": vectors}))
    return vectors


def _place(texts: Sequence[str], kind: str, dim: int) -> Path:
    """The file under which these vectors are kept: a name for exactly this content."""
    import sklearn

    from reason.datasets.fetch import cache_dir

    content = json.dumps([RECIPE, sklearn.__version__, kind, dim, list(texts)], ensure_ascii=False)
    digest = hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:32]
    return cache_dir() / "text-vectors" / f"{kind}-{digest}.safetensors"


def _tfidf(texts: Sequence[str], dim: int) -> np.ndarray:
    """(N, at most dim): TF-IDF of words and word pairs (Salton and Buckley 1988), reduced by SVD."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(
        token_pattern=r"\b\w+\b", ngram_range=(1, 2), min_df=2 if len(texts) > 100 else 1, sublinear_tf=True
    )
    try:
        table = vectorizer.fit_transform(texts)
    except ValueError:  # not one word in all texts (or none that recurs)
        return np.zeros((len(texts), 0))
    rank = min(dim, *table.shape)
    if rank == min(table.shape):  # nothing to leave out, so no need to approximate
        u, s, _ = np.linalg.svd(table.toarray(), full_matrices=False)
        return u[:, :rank] * s[:rank]
    return TruncatedSVD(rank, algorithm="randomized", n_iter=7, random_state=0).fit_transform(table)


def _pca(states: np.ndarray, dim: int) -> np.ndarray:
    """(N, at most dim): the centred states on their main axes."""
    from sklearn.decomposition import PCA

    if len(states) == 1:  # one text has no spread to describe
        return states[:, :dim]
    return PCA(min(dim, *states.shape), svd_solver="full").fit_transform(states)


def _minilm(texts: Sequence[str], offline: bool) -> np.ndarray:
    """(N, 384): mean over a text's word pieces of the last layer, L2-normalised."""
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    from reason.datasets.fetch import carrier

    folder = str(carrier("minilm", offline=offline))
    bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # loading takes a second
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model = AutoModel.from_pretrained(folder, local_files_only=True, trust_remote_code=False).eval()
    finally:
        if bar:
            logging.enable_progress_bar()
    pieces = tokenizer(list(texts), truncation=True, max_length=LONGEST)["input_ids"]
    out = np.zeros((len(texts), model.config.hidden_size), dtype=np.float32)
    by_length = sorted(range(len(texts)), key=lambda i: len(pieces[i]))
    start = 0
    while start < len(texts):
        # Texts of like length share a batch; its longest text sets how many fit.
        stop = start + 1
        while stop < len(texts) and len(pieces[by_length[stop]]) * (stop - start + 1) <= PIECES:
            stop += 1
        rows = by_length[start:stop]
        batch = tokenizer.pad({"input_ids": [pieces[i] for i in rows]}, return_tensors="pt")
        with torch.inference_mode():
            states = model(**batch).last_hidden_state  # (n, L, 384)
        real = batch["attention_mask"].unsqueeze(-1)
        mean = (states * real).sum(1) / real.sum(1)
        out[rows] = torch.nn.functional.normalize(mean, dim=1).numpy()
        start = stop
    return out
