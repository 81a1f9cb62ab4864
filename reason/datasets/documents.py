"""Documents of text: split, cut, and given a digest. The view ``text``, before any tokenizer.

A corpus that is found ends in ``build``: documents in, ``TextData`` out. What is generated comes with
its splits and goes through ``finish`` alone. Nothing here knows of tokens, windows or tensors; that is
``packing``.

Rules of ``build``, in the order applied:
 1. documents without a visible character go, and exact repeats count once: in the test before
    validation, and in both before training, so that no text is trained on and judged;
 2. split. By share: a document's place depends on a hash of its id alone, so it stays where it is when
    others are added. As found: what the files say; a part that no file gives is taken from training;
 3. of training, ``documents`` many are drawn, by a hash of their ids;
 4. longer documents are cut. The pieces of one document stay together, unless it is all there is to train
    on: then its first pieces train, the next validate, the last test.
Documents run by id, so the order of files and lines plays no part.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from reason.datasets.subsets import unit
from reason.datasets.textconfig import CorpusKeys, SplitKeys
from reason.errors import DataError

VERSION = 1  # of the rules above; part of every digest
SPLITS = ("train", "valid", "test")
Span = tuple[int, int, int]  # characters start to end, and their level


@dataclass(frozen=True)
class Documents:
    """One split. ``levels`` says which tokens have a known answer, and how many steps it takes.

    Per document, spans (start, end, level) of characters, in their order and apart. A token that overlaps a
    span of level 0 or more is supervised: a loss and an accuracy are taken on it. Its level is the number of
    steps, or recursions, that it is known to require; 0 is predictable at sight. Where ``levels`` is None,
    every token is supervised and its level is not known.
    """

    id: list[str]
    text: list[str]
    levels: list[list[Span]] | None = None

    def __len__(self) -> int:
        return len(self.id)


@dataclass(frozen=True)
class Corpus:
    """The three splits. No document occurs in two of them."""

    train: Documents
    valid: Documents
    test: Documents
    words: bool = False  # text is words between single spaces, and a word is a symbol: a token each

    @classmethod
    def of(cls, parts: Mapping[str, Documents], words: bool = False) -> Corpus:
        return cls(parts["train"], parts["valid"], parts["test"], words)

    @property
    def parts(self) -> dict[str, Documents]:
        return {split: getattr(self, split) for split in SPLITS}


@dataclass
class TextData:
    """A dataset that offers the view ``text``."""

    name: str
    digest: str  # 32 hex digits over ids, texts, levels, splits and ``VERSION``
    corpus: Corpus
    info: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # what a reader of results should know, for people

    def text(self) -> Corpus:
        """The view: documents by split."""
        return self.corpus


def finish(
    name: str, corpus: Corpus, info: Mapping[str, Any] | None = None, notes: Iterable[str] = ()
) -> TextData:
    """Count ``corpus`` and give it its digest."""
    counts = {f"{split}_documents": len(part) for split, part in corpus.parts.items()}
    counts |= {f"{split}_characters": sum(map(len, part.text)) for split, part in corpus.parts.items()}
    return TextData(name, digest(corpus), corpus, {**counts, **(info or {})}, list(notes))


def digest(corpus: Corpus) -> str:
    """32 hex digits over all that results depend on; the name and the place of the data play no part."""
    whole = hashlib.sha256(json.dumps([VERSION, corpus.words]).encode())
    for split, part in corpus.parts.items():
        whole.update(f"{split} {len(part)}\n".encode())
        for i, (name, text) in enumerate(zip(part.id, part.text, strict=True)):
            row = [name, text, part.levels[i] if part.levels is not None else None]
            whole.update(json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")
    return whole.hexdigest()[:32]


# --- a corpus that was found --------------------------------------------------------------------------


def build(
    found: Mapping[str, Documents],
    keys: CorpusKeys,
    source: str,
    info: Mapping[str, Any] | None = None,
    notes: Iterable[str] = (),
) -> TextData:
    """Clean, split and cut by the rules at the head of this module.

    Args:
        found: documents under "train", and under "valid" and "test" where a split is given; one that is not
            is taken from training.
        source: where they come from, for messages.
    Raises:
        DataError: nothing is left, one document only, or a split without any.
    """
    said = list(notes)
    parts = divide(found, keys, source, said)
    if keys.cut:
        parts = {split: _pieces(part, keys.cut) for split, part in parts.items()}
    return finish(keys.name, Corpus.of(parts), info, said)


def divide(
    found: Mapping[str, Documents], keys: SplitKeys, source: str, notes: list[str], what: str = "documents"
) -> dict[str, Documents]:
    """The first three rules of ``build``, which may add to ``notes``. ``what`` is found, for messages."""
    parts = clean(found, notes, what)
    total = sum(map(len, parts.values()))
    if not total:
        raise DataError(f"{source} holds no text.", f"Each of its {what} is empty.")
    lacking = [split for split in ("valid", "test") if not len(parts[split])]
    if len(parts["train"]) == 1 and lacking and isinstance(keys, CorpusKeys):
        parts |= _in_order(parts["train"], lacking, keys, source, notes)
    else:
        parts |= _by_share(parts["train"], lacking, keys)
    _refuse_empty(parts, total, keys, source, what)
    parts["train"] = _drawn(parts["train"], keys.documents, notes, what)
    return parts


def content_id(text: str) -> str:
    """The id of a document that has no other: 16 hex digits of the sha256 of its text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def clean(found: Mapping[str, Documents], notes: list[str], what: str = "documents") -> dict[str, Documents]:
    """Without empty documents and repeats, by id: the first rule of ``build``."""
    seen: set[str] = set()
    parts: dict[str, Documents] = {}
    empty = repeated = 0
    for split in reversed(SPLITS):
        kept: list[tuple[str, str]] = []
        part = found.get(split, Documents([], []))
        for name, text in sorted(zip(part.id, part.text, strict=True)):
            if not text.strip():
                empty += 1
            elif text in seen:
                repeated += 1
            else:
                seen.add(text)
                kept.append((name, text))
        parts[split] = _documents(kept)
    if empty:
        notes.append(f"{what.capitalize()} without text were dropped: {empty:,}.")
    if repeated:
        notes.append(f"Exact repeats of other {what} were dropped: {repeated:,}.")
    return parts


def _documents(rows: Iterable[tuple[str, str]]) -> Documents:
    rows = list(rows)
    return Documents([name for name, _ in rows], [text for _, text in rows])


def _by_share(train: Documents, lacking: list[str], keys: SplitKeys) -> dict[str, Documents]:
    """Training without what it gives to the splits that lack documents, and these."""
    test = keys.test if "test" in lacking else 0.0
    valid = keys.valid if "valid" in lacking else 0.0
    taken: dict[str, list[tuple[str, str]]] = {split: [] for split in ("train", *lacking)}
    for name, text in zip(train.id, train.text, strict=True):
        place = unit(name, "split")
        taken["test" if place < test else "valid" if place >= 1 - valid else "train"].append((name, text))
    return {split: _documents(rows) for split, rows in taken.items()}


def _refuse_empty(parts: dict[str, Documents], total: int, keys: SplitKeys, source: str, what: str) -> None:
    for split, name in (("train", "training"), ("valid", "validation"), ("test", "test")):
        if not len(parts[split]):
            raise DataError(
                f"{source}: of {total:,} {what}, none falls into the {name} split with dataset.valid={keys.valid} "
                f"and dataset.test={keys.test}.",
                f"Add {what}, or change these shares.",
            )


def _drawn(part: Documents, limit: int, notes: list[str], what: str) -> Documents:
    if not 0 < limit < len(part):
        return part
    notes.append(f"{limit:,} of {len(part):,} training {what} are used (dataset.documents).")
    drawn = sorted(range(len(part)), key=lambda i: unit(part.id[i], "draw"))[:limit]
    return _documents((part.id[i], part.text[i]) for i in sorted(drawn))


def _in_order(
    only: Documents, lacking: list[str], keys: CorpusKeys, source: str, notes: list[str]
) -> dict[str, Documents]:
    """The pieces of a single document: the first to train on, the last for the splits that lack documents."""
    length = len(only.text[0])
    if not keys.cut:
        raise DataError(
            f"{source} holds only one document to train on, and one cannot be split.",
            f"Cut it into pieces: dataset.cut={max(100, min(20_000, length // 40))}. "
            "Or name a folder, or a file with one document per row (.jsonl, .csv, .parquet).",
        )
    pieces = _pieces(only, keys.cut)
    count = {split: max(1, round(getattr(keys, split) * len(pieces))) for split in lacking}
    count = {"train": len(pieces) - sum(count.values()), **count}
    if count["train"] < 1:
        raise DataError(
            f"{source} is cut into {len(pieces)} pieces, too few to split.",
            f"Set dataset.cut lower: the document has {length:,} characters.",
        )
    said = ", ".join(f"{n:,} to {split}" for split, n in count.items())
    notes.append(f"The one document was cut into {len(pieces):,} pieces, in order: {said}.")
    rows = iter(zip(pieces.id, pieces.text, strict=True))
    return {split: _documents(itertools.islice(rows, n)) for split, n in count.items()}


def _pieces(part: Documents, size: int) -> Documents:
    """Documents longer than ``size`` in pieces, named ``id:00000``, ``id:00001`` ..."""
    rows = []
    for name, text in zip(part.id, part.text, strict=True):
        if len(text) <= size:
            rows.append((name, text))
        else:
            rows += [(f"{name}:{i:05d}", piece) for i, piece in enumerate(cut(text, size))]
    return _documents(rows)


def cut(text: str, size: int) -> list[str]:
    """Pieces of at most ``size`` characters that join to ``text``.

    A piece ends after the last line end in its second half, else after the last space there, else anywhere.
    """
    pieces, start = [], 0
    while len(text) - start > size:
        least = start + size // 2
        end = text.rfind("\n", least, start + size) + 1
        end = end or text.rfind(" ", least, start + size) + 1 or start + size
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]
