"""The items that a recommender answers with: their ids, what they are called, how often training met them.

A run keeps them in its folder, so that a finished run needs no dataset to answer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import feather

from reason.errors import DataError
from reason.files import atomic

FILE = "catalogue.arrow"
FIELD = "field:"  # before the name of a column of the item table
CATEGORIES = ("genres", "genre", "categories", "category")  # columns that hold them, joined by |


@dataclass(frozen=True, eq=False)
class Catalogue:
    """The N items of a dataset. The code of an item is its place here."""

    item_ids: list[str]
    item_text: list[str]  # "Title (year). Genres: A, B."; the id where nothing is known
    item_fields: dict[str, list[str]]  # columns of the item table, "" where unknown; lists joined by |
    train_counts: np.ndarray  # (N,) int64, occurrences in training

    def __len__(self) -> int:
        return len(self.item_ids)

    @cached_property
    def code(self) -> dict[str, int]:
        """The code of each id."""
        return {name: code for code, name in enumerate(self.item_ids)}

    @cached_property
    def titles(self) -> list[str]:
        """What to call each item: its title where there is one, else its text (the id, in the worst case)."""
        titles = self.item_fields.get("title") or self.item_text
        return [title or text for title, text in zip(titles, self.item_text, strict=True)]

    @cached_property
    def categories(self) -> list[list[str]] | None:
        """The categories of each item, or None where none is known."""
        for name in CATEGORIES:
            if any(column := self.item_fields.get(name, [])):
                parts = (map(str.strip, text.split("|")) for text in column)
                return [list(dict.fromkeys(filter(None, part))) for part in parts]
        return None

    def most_popular(self, k: int) -> list[int]:
        """Codes of the ``k`` items that training met most often; ties go to the lower code."""
        return np.argsort(-self.train_counts, kind="stable")[:k].tolist()

    def listed(self, codes: Sequence[int], scores: Sequence[float]) -> list[dict[str, Any]]:
        """An answer as JSON data: id, title and score of each item."""
        return [
            {"id": self.item_ids[code], "title": self.titles[code], "score": float(score)}
            for code, score in zip(codes, scores, strict=True)
        ]

    @property
    def digest(self) -> str:
        """32 hex digits of sha256 over all that is kept."""
        content = [self.item_ids, self.item_text, self.item_fields, self.train_counts.tolist()]
        return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()[:32]

    def save(self, folder: Path) -> None:
        """Write ``catalogue.arrow`` into ``folder``, whole or not at all."""
        columns: dict[str, Any] = {
            "id": pa.array(self.item_ids, pa.string()),
            "text": pa.array(self.item_text, pa.string()),
            "train_count": pa.array(self.train_counts, pa.int64()),
        }
        columns |= {FIELD + name: pa.array(column, pa.string()) for name, column in self.item_fields.items()}
        table = pa.table(columns).replace_schema_metadata({"digest": self.digest})
        with atomic(folder / FILE, "wb") as f:
            feather.write_feather(table, f, compression="zstd")

    @classmethod
    def load(cls, folder: Path) -> Catalogue:
        """What ``save`` wrote.

        Raises:
            DataError: the file is absent, damaged, or holds something else.
        """
        file = folder / FILE
        try:
            stat = file.stat()
            return _load(file, (stat.st_mtime_ns, stat.st_ino, stat.st_size))
        except FileNotFoundError as error:
            raise DataError(f"{folder} holds no {FILE}.", "It is written when a run begins.") from error


@lru_cache(maxsize=2)
def _load(file: Path, version: tuple[int, int, int]) -> Catalogue:
    """The catalogue in ``file``, read once for each ``version`` of it on disk."""
    mend = "Delete the file: it is made again from the dataset."
    try:
        table = feather.read_table(file, memory_map=False)
        columns = {name: table.column(name).to_pylist() for name in table.column_names}
        digest = (table.schema.metadata or {})[b"digest"].decode()
        found = Catalogue(
            columns.pop("id"),
            columns.pop("text"),
            {name.removeprefix(FIELD): column for name, column in columns.items() if name.startswith(FIELD)},
            np.array(columns["train_count"], np.int64),
        )
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{file} cannot be read as a catalogue of items: {error}", mend) from error
    if found.digest != digest:
        raise DataError(f"{file} is damaged: its content is not what was written.", mend)
    return found


def kept_catalogue(folder: Path, otherwise: Callable[[], Catalogue]) -> Catalogue:
    """The catalogue that a run keeps in ``folder``; where it keeps none, that of the data.

    Raises:
        DataError: the file is damaged.
    """
    return Catalogue.load(folder) if (folder / FILE).is_file() else otherwise()
