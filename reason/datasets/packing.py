"""What a tokenizer makes of the view ``text``: windows to train on, cases to be judged on, as tensors.

Every document begins with the token that ends documents (EOS), so that its first token is a target too.
Windows and cases are padded on the RIGHT with EOS: position equals index, and under causal attention pads
come after every real token, so their content can never reach a real state.

A target is -100 where nothing is asked for: on pads, and on tokens outside the spans of a document whose
levels are known.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from reason.datasets.documents import Corpus, Documents, Span
from reason.datasets.subsets import hold_out
from reason.errors import ConfigError, DataError, nearest

IGNORE = -100  # target where there is none; torch's cross_entropy skips it
AT_ONCE = 1_000_000  # characters that are encoded in one call, or a single document of more


class Encoder(Protocol):
    """What is asked of a tokenizer."""

    eos: int  # the token that ends a document

    @property
    def size(self) -> int:
        """Tokens of its vocabulary."""
        ...

    def encode(self, texts: Sequence[str]) -> Sequence[tuple[Sequence[int], Sequence[tuple[int, int]]]]:
        """For each text its ids, and for each id the characters (start, end) that it stands for."""
        ...


@dataclass(frozen=True, eq=False)
class Encoded:
    """n documents of M tokens in all; those of document d lie in ``offsets[d] : offsets[d + 1]``."""

    ids: np.ndarray  # (M,) int32
    offsets: np.ndarray  # (n + 1,) int64
    level: np.ndarray  # (M,) int16; -1 = not supervised; 0 everywhere where levels are not known
    bytes: np.ndarray  # (n,) int64, length of each document in UTF-8
    id: list[str]
    eos: int
    levelled: bool  # the documents came with levels

    def __len__(self) -> int:
        return len(self.id)

    @property
    def tokens(self) -> np.ndarray:
        """(n,) int64: length of each document in tokens."""
        return np.diff(self.offsets)


def encode(documents: Documents, tokenizer: Encoder) -> Encoded:
    """The tokens of ``documents``, and their levels: of the spans that a token overlaps, the highest.

    Raises:
        DataError: what the tokenizer cannot write, as it says it.
    """
    ids, levels, lengths = [], [], []
    for first, last in _calls(documents.text):
        for i, (found, places) in enumerate(tokenizer.encode(documents.text[first:last]), first):
            ids.append(np.asarray(found, np.int32))
            lengths.append(len(found))
            if documents.levels is not None:
                levels.append(_levels(places, documents.levels[i]))
    whole = np.concatenate([np.zeros(0, np.int32), *ids])
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    level = np.concatenate([np.zeros(0, np.int16), *levels]) if levels else np.zeros(len(whole), np.int16)
    size = np.array([len(text.encode()) for text in documents.text], np.int64)
    return Encoded(whole, offsets, level, size, documents.id, tokenizer.eos, documents.levels is not None)


def _calls(texts: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Runs first:last of documents that are encoded together. Offsets take a hundred bytes a token."""
    first = size = 0
    for i, text in enumerate(texts):
        if i > first and size + len(text) > AT_ONCE:
            yield first, i
            first, size = i, 0
        size += len(text)
    if first < len(texts):
        yield first, len(texts)


def _levels(places: Sequence[tuple[int, int]], spans: Sequence[Span]) -> np.ndarray:
    """(k,) int16: the highest level among the spans that each token overlaps, -1 where there is none."""
    level = np.full(len(places), -1, np.int16)
    start, end = np.array(places, np.int64).reshape(-1, 2).T  # (k,) each, both rising
    for low, high, steps in spans:
        inside = slice(np.searchsorted(end, low, "right"), np.searchsorted(start, high, "left"))
        level[inside] = np.maximum(level[inside], steps)
    return level


class Windows:
    """Training examples: ``context`` inputs each, every token of a document a target exactly once.

    Plain text is one stream, EOS before each document, cut every ``context`` tokens. Documents whose levels are
    known stay whole, as an answer cannot be told from a part of its document: windows are filled with
    as many as fit (the largest first, each where it leaves the least room). One that is longer than a
    window is cut.

    tokens: targets in all, whether supervised or not.
    split: documents that lie in more than one window, though their levels are known.
    """

    def __init__(self, data: Encoded, context: int):
        """
        Raises:
            ConfigError: a context below 1. DataError: the documents do not fill one window.
        """
        _refuse(data, context)
        self.context = context
        self._eos = data.eos
        bins = _fill(data.tokens, context) if data.levelled else [range(len(data))]
        self.split = int((data.tokens > context).sum()) if data.levelled else 0
        order = np.array([d for several in bins for d in several], np.int64)
        self._stream, self._level = _stream(data, order)
        size = [int(data.tokens[list(several)].sum()) + len(several) - 1 for several in bins]  # targets
        end = np.cumsum(np.array(size) + 1)
        starts, lengths = [], []
        for last, targets in zip(end.tolist(), size, strict=True):
            start = np.arange(last - targets - 1, last - 1, context)
            starts.append(start)
            lengths.append(np.minimum(context, last - 1 - start))
        self._start = np.concatenate(starts)  # (W,) index into the stream of the first input
        self._length = np.concatenate(lengths)  # (W,) inputs
        self.tokens = int(data.offsets[-1])

    def __len__(self) -> int:
        return len(self._start)

    def order(self, rng: np.random.Generator, batch_size: int) -> np.ndarray:
        """(W,) int64: a permutation of the windows."""
        return rng.permutation(len(self))

    def batch(self, index: np.ndarray) -> dict[str, Tensor]:
        """Collate the windows at ``index`` (n,): tokens, targets and level, each (n, context) int64, and length (n,)."""
        index = np.asarray(index)
        length = self._length[index]
        found = _gather(self._stream, self._level, self._start[index], length, self.context, self._eos)
        return {**found, "length": torch.from_numpy(length)}


class Cases:
    """Judged examples: a document each, read in windows of ``context`` inputs that do not overlap.

    id: (n,) str. bytes: (n,) int64, length in UTF-8. tokens: (n,) int64, targets, whether supervised or not.
    windows: (n,) int64, rows that a document takes in ``batch``.
    levels: those that occur, ascending; none where they are not known.
    """

    def __init__(self, data: Encoded, context: int):
        """
        Raises:
            ConfigError: a context below 1. DataError: no token at all.
        """
        _refuse(data, context, least=1)
        self.context = context
        self.id = np.array(data.id, object)
        self.bytes, self.tokens = data.bytes, data.tokens
        self.windows = -(-self.tokens // context)
        self.levels = np.unique(data.level[data.level >= 0]).tolist() if data.levelled else []
        self._eos = data.eos
        self._stream, self._level = _stream(data, np.arange(len(data)))
        self._first = data.offsets[:-1] + np.arange(len(data))  # (n,) where the EOS before a document lies

    def __len__(self) -> int:
        return len(self.id)

    def order(self, rng: np.random.Generator, batch_size: int) -> np.ndarray:
        """(n,) int64: a permutation of the documents."""
        return rng.permutation(len(self))

    def batch(self, index: np.ndarray) -> dict[str, Tensor]:
        """The windows of the documents at ``index`` (n,), document by document, in their order.

        Returns tokens, targets and level, each (w, T) int64, T the longest of them and at most ``context``;
        length (w,) int64, real inputs; case (w,) int64, the row of ``index`` that a window belongs to.
        """
        index = np.asarray(index)
        count = self.windows[index]
        case = np.repeat(np.arange(len(index)), count)
        inside = (np.arange(len(case)) - np.repeat(np.cumsum(count) - count, count)) * self.context
        length = np.minimum(self.context, self.tokens[index][case] - inside)
        start = self._first[index][case] + inside
        found = _gather(self._stream, self._level, start, length, int(length.max(initial=0)), self._eos)
        return {**found, "length": torch.from_numpy(length), "case": torch.from_numpy(case)}

    def take(self, index: np.ndarray) -> Cases:
        """The documents at ``index`` (positions, or a mask (n,) of bool) alone; all else stays, levels too."""
        part = copy.copy(self)
        for column in ("id", "bytes", "tokens", "windows", "_first"):
            setattr(part, column, getattr(self, column)[index])
        return part

    def batches(self, index: np.ndarray, windows: int) -> Iterator[np.ndarray]:
        """``index`` in runs whose documents take at most ``windows`` rows together, at least one document each."""
        index = np.asarray(index)
        first = rows = 0
        for i, more in enumerate(self.windows[index].tolist()):
            if i > first and rows + more > windows:
                yield index[first:i]
                first, rows = i, 0
            rows += more
        if first < len(index):
            yield index[first:]

    def find(self, name: str) -> int:
        """Index of the document called ``name``. Raises DataError, with the nearest."""
        found = np.flatnonzero(self.id == name)
        if len(found):
            return int(found[0])
        close = nearest(name, self.id.tolist())
        raise DataError(
            f"There is no document {name!r} in this split.",
            f"Did you mean {close!r}?" if close else f"Documents are named such as {self.id[0]!r}.",
        )


# --- inside -------------------------------------------------------------------------------------------


def _refuse(data: Encoded, context: int, least: int = 0) -> None:
    if context < 1:
        raise ConfigError(f"A context of {context} tokens is too small.", "Set it to 1 or more, such as 256.")
    found, wanted = int(data.offsets[-1]), least or (1 if data.levelled else context)
    if found < wanted:
        raise DataError(
            f"The documents hold {found:,} tokens, fewer than one window takes ({wanted:,}).",
            "Add text, or set a smaller backbone.context.",
        )


def _stream(data: Encoded, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ids (M + n,) and levels of the documents in ``order``, an EOS before each.

    The end of a document is a target of plain text, and unsupervised where levels are known.
    """
    size = data.tokens[order]
    gaps = np.cumsum(size) - size  # where an EOS comes before the token
    token = np.arange(size.sum()) + np.repeat(data.offsets[order] - gaps, size)
    ends = -1 if data.levelled else 0
    return np.insert(data.ids[token], gaps, data.eos), np.insert(data.level[token], gaps, ends)


def _gather(
    stream: np.ndarray, level: np.ndarray, start: np.ndarray, length: np.ndarray, width: int, pad: int
) -> dict[str, Tensor]:
    """Rows (n, width) of inputs from ``start`` on, of targets one further, and of the targets' levels."""
    column = np.arange(width)
    real = column < length[:, None]  # (n, T)
    place = np.where(real, start[:, None] + column, 0)
    ahead = np.where(real, place + 1, 0)
    steps = np.where(real, level[ahead], -1).astype(np.int64)
    tokens = np.where(real, stream[place], pad).astype(np.int64)
    targets = np.where(steps >= 0, stream[ahead], IGNORE).astype(np.int64)
    found = {"tokens": tokens, "targets": targets, "level": steps}
    return {name: torch.from_numpy(array) for name, array in found.items()}


def _fill(tokens: np.ndarray, context: int) -> list[list[int]]:
    """Documents by window: best fit, the largest first. One with ``k`` tokens takes k + 1, of context + 1."""
    bins: list[list[int]] = []
    room: list[list[int]] = [[] for _ in range(context + 2)]  # by the room that is left, the windows with it
    for document in np.argsort(-tokens, kind="stable").tolist():
        size = int(tokens[document]) + 1
        if size == 1:
            continue
        left = next((r for r in range(size, context + 2) if room[r]), None)
        if left is None:
            bins.append([document])
            left, place = context + 1, len(bins) - 1
        else:
            place = room[left].pop()
            bins[place].append(document)
        if left > size:
            room[left - size].append(place)
    return bins


Tokenizer = TypeVar("Tokenizer", bound=Encoder)


class TextSplits(Generic[Tokenizer]):
    """The splits of a corpus under a tokenizer, each encoded when it is first used: who only generates needs none.

    fit: the share of the validation documents that is held out for fitting.
    """

    def __init__(self, corpus: Corpus, tokens: Tokenizer, context: int, fit: float, info: dict[str, Any]):
        """
        Raises:
            DataError: fewer than two validation documents.
        """
        self.tokens = tokens
        self._corpus, self._context, self._fit = corpus, context, fit
        if len(corpus.valid.id) < 2:
            raise DataError(
                "Two validation documents are needed at least: one chooses epochs, another is for fitting.",
                "Use more text, or a larger dataset.valid.",
            )
        self.info = {"vocabulary": tokens.size, **info}

    @property
    def train(self) -> Windows:
        return self._train

    @cached_property
    def _train(self) -> Windows:
        return Windows(encode(self._corpus.train, self.tokens), self._context)

    @cached_property
    def _validation(self) -> tuple[Cases, Cases]:
        return hold_out(Cases(encode(self._corpus.valid, self.tokens), self._context), self._fit)

    @property
    def valid(self) -> Cases:
        return self._validation[0]

    @property
    def fit(self) -> Cases:
        return self._validation[1]

    @property
    def test(self) -> Cases:
        return self._test

    @cached_property
    def _test(self) -> Cases:
        return Cases(encode(self._corpus.test, self.tokens), self._context)
