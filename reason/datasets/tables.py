"""Read tables of interactions, items and documents from CSV, TSV, RecBole, JSONL and Parquet files.

Finds the file, its columns and its numbers, and says in which line it trips. What the rows mean,
and what is done with them, is the business of ``histories`` and ``textfiles``.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import compute as pc
from pyarrow import csv as pacsv
from pyarrow import json as pajson
from pyarrow import parquet

from reason.datasets.config import InteractionsConfig
from reason.errors import DataError, nearest
from reason.memory import Budget

COMPRESSED = (".gz", ".zst", ".bz2", ".lz4")
TEXT = {".csv": "", ".tsv": "\t", ".txt": "", ".inter": "\t", ".item": "\t"}  # "" = read off the header
JSON = (".jsonl", ".ndjson")
PARQUET = (".parquet", ".pq")
FORMATS = (*TEXT, *JSON, *PARQUET)
BLOCK = 1 << 24  # bytes that pyarrow parses at a time
CHUNK = 1 << 22  # bytes unpacked at a time
BATCH = 4096  # rows of a Parquet file that are taken out at a time
CELL = 32  # bytes that a cell of a table takes on the way to arrays, besides its text
AS_TEXT = 2  # bytes that a byte of text takes: as read and as decoded

# The usual names, in the order tried, without case and punctuation.
USUAL = {
    "user": ("userid", "user", "uid", "reviewerid", "customerid", "sessionid"),
    "item": ("itemid", "item", "iid", "movieid", "productid", "parentasin", "asin", "articleid"),
    "time": ("timestamp", "time", "unixreviewtime", "unixtime", "datetime", "date", "ts"),
    "position": ("position", "pos", "order", "rank", "index"),
    "rating": ("rating", "stars", "score", "overall"),
    "title": ("title", "movietitle", "name", "itemname", "productname"),
    "field": ("text", "content", "document", "body"),
    "id": ("id", "docid", "documentid", "uid", "uuid", "uniqueid", "problemid", "questionid"),
    "source": ("source", "origin"),
    "problem": ("problem", "question", "prompt"),
    "answer": ("answer", "finalanswer", "expectedanswer", "target"),
    "solution": ("solution", "rationale", "explanation"),
    "level": ("level", "difficulty"),
}
NONE = "-"  # the value of a column key that says there is no such column


@dataclass
class InteractionTable:
    """Interactions as read, one entry each; nothing is cleaned yet.

    Codes count from 0 in the order of the ids (short before long, then by alphabet, which puts
    whole numbers in their natural order), so they depend on the content alone.
    """

    user: np.ndarray  # (M,) int64 codes
    item: np.ndarray  # (M,) int64 codes
    user_ids: list[str]
    item_ids: list[str]
    when: np.ndarray  # (M,) int64 or float64; what orders a user's rows
    clock: str  # what `when` is: "time", "position" (inside the user) or "file" (line order)
    rating: np.ndarray | None  # (M,) float32
    source: str  # for messages

    def take(self, index: np.ndarray) -> InteractionTable:
        """The rows at ``index`` (positions or a mask); codes and ids stay."""
        rows = {name: getattr(self, name) for name in ("user", "item", "when", "rating")}
        return replace(self, **{name: None if row is None else row[index] for name, row in rows.items()})


@dataclass
class ItemTable:
    """Columns of text by name, and the item that each row describes."""

    ids: list[str]
    columns: dict[str, list[str]]
    headline: str  # the column that names the item, "" if there is none


# --- finding files ------------------------------------------------------------------------------------


def suffix(path: Path) -> str:
    """The suffix that tells the format: ".csv" of ``x.csv.gz``."""
    parts = [s.lower() for s in path.suffixes]
    if parts and parts[-1] in COMPRESSED:
        parts.pop()
    return parts[-1] if parts else ""


@contextmanager
def open_text(path: Path) -> Iterator[io.TextIOWrapper]:
    """A text file in UTF-8, with or without a byte order mark, also compressed.

    Raises:
        DataError: while it is read, when it turns out to be too large for memory.
    """
    with (
        pa.input_stream(str(path)) as stream,
        io.BufferedReader(_Counted(stream, Budget(path))) as counted,
        io.TextIOWrapper(counted, encoding="utf-8-sig") as text,
    ):
        yield text


class _Counted(io.RawIOBase):
    """A stream that stops where its text no longer fits into memory."""

    def __init__(self, stream: pa.NativeFile, budget: Budget):
        self._inner, self._budget = stream, budget

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        read = self._inner.read(min(len(buffer), CHUNK))
        buffer[: len(read)] = read
        self._budget.spend(len(read) * AS_TEXT)
        return len(read)


def refuse_large(path: Path, separators: bytes) -> None:
    """Unpack a table once and drop it, to learn whether it fits into memory; a file that surely does is not read.

    Raises:
        DataError: its text, and a cell for each of ``separators``, do not fit.
    """
    budget, packed = Budget(path), path.suffix.lower() in COMPRESSED
    most = path.stat().st_size * (AS_TEXT + CELL)
    if most <= budget.limit and not packed:
        return
    with pa.input_stream(str(path)) as stream:
        while chunk := stream.read(CHUNK):
            cells = sum(chunk.count(s) for s in separators)
            budget.spend(len(chunk) * AS_TEXT + cells * CELL)


def refuse_absent(path: Path, what: str, otherwise: str) -> None:
    """Raise a DataError if nothing lies at ``path``: its hint is the nearest name there, or ``otherwise``."""
    if not path.exists():
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        close = nearest(path.name, beside)
        hint = f"Did you mean {str(path.parent / close)!r}?" if close else otherwise
        raise DataError(f"There is no {what} {path}.", hint)


def find_table(path: str | Path, stems: tuple[str, ...], what: str) -> Path:
    """The file at ``path``, or in the folder ``path`` the one named after one of ``stems``.

    Raises:
        DataError: nothing there (the nearest name is given), several candidates, or an unknown format.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        found = tables_in(path, stems)
        if not found:
            raise DataError(
                f"The folder {path} holds no {what}.",
                f"Expected one of {', '.join(stem + '.csv' for stem in stems)} (or .tsv, .jsonl, .parquet, "
                "also .gz); or name the file itself.",
            )
        return found[0]
    refuse_absent(path, "file", f"Check the path of the {what}.")
    if (found := suffix(path)) not in FORMATS:
        wrong = f"{found} is not a known format" if found else "a file needs a suffix that tells its format"
        known = f"Known: {', '.join(FORMATS)}, each also with {', '.join(COMPRESSED)}."
        raise DataError(f"{path.name}: {wrong}.", known)
    return path


def tables_in(folder: Path, stems: tuple[str, ...]) -> list[Path]:
    """Readable files of ``folder`` whose name without suffixes is one of ``stems``, best first.

    A stem that begins with a dot names a suffix instead: ".inter".
    """
    files = sorted(p for p in folder.iterdir() if p.is_file() and suffix(p) in FORMATS)
    named = [(key, p) for p in files for key in (p.name.split(".")[0].lower(), suffix(p))]
    return [p for _, p in sorted((stems.index(key), p) for key, p in named if key in stems)]


# --- reading ------------------------------------------------------------------------------------------


class TableFile:
    """One file, opened: its column names are known, its columns are read on demand.

    Args:
        row: what a row holds, for messages.
    Raises:
        DataError: empty, not UTF-8, or not of the format that its name says.
    """

    def __init__(self, path: Path, row: str = "interaction"):
        self.path = path
        self.row = row
        self.format = suffix(path)
        self.first: dict[str, object] = {}
        try:
            if path.stat().st_size == 0:
                raise self._empty()
            self.names = self._names()
        except (OSError, UnicodeDecodeError, pa.ArrowInvalid, csv.Error) as error:
            raise DataError(
                f"{path} cannot be read: {error}", "Is the file complete, and is its text in UTF-8?"
            ) from error
        twice = {n for n in self.names if self.names.count(n) > 1}
        if twice:
            raise DataError(f"{path} has several columns named {', '.join(sorted(twice))}.", "Rename one.")

    def _names(self) -> list[str]:
        if self.format in PARQUET:
            return list(parquet.read_schema(self.path).names)
        head = next(self._lines(), "")
        if not head:
            raise self._empty()
        if self.format in JSON:
            self.first = self._object(1, head)
            return list(self.first)
        self.delimiter = TEXT[self.format] or max(",\t;|", key=head.count)
        self.quote = '"' if self.format not in (".inter", ".item") else False
        raw = next(csv.reader([head], delimiter=self.delimiter, quoting=0 if self.quote else csv.QUOTE_NONE))
        kinds = (":token", ":float", ":token_seq", ":float_seq")  # RecBole types its header
        return [name.rpartition(":")[0] if name.endswith(kinds) else name.strip() for name in raw]

    def _empty(self) -> DataError:
        return DataError(f"{self.path} is empty.", f"It should hold a header, then one {self.row} per line.")

    def read(self, columns: list[str], as_text: list[str]) -> pa.Table:
        """The named columns; those in ``as_text`` are not guessed to be numbers or dates.

        Raises:
            DataError: a line that does not fit, with its number.
        """
        try:
            self._refuse_large()
            if self.format in PARQUET:
                table = self._read_parquet(columns)
            elif self.format in JSON:
                table = self._read_json(columns, as_text)
            else:
                table = self._read_text(columns, as_text)
        except (pa.ArrowInvalid, pa.ArrowKeyError, OSError) as error:
            self._explain()
            raise DataError(f"{self.path} cannot be read: {error}", "Is the file complete?") from error
        if table.num_rows == 0:
            raise DataError(
                f"{self.path} has a header but no rows.", f"It should hold one {self.row} per line."
            )
        return table

    def _refuse_large(self) -> None:
        if self.format not in PARQUET:
            refuse_large(self.path, b"\n:" if self.format in JSON else f"\n{self.delimiter}".encode())

    def _read_text(self, columns: list[str], as_text: list[str]) -> pa.Table:
        types = {name: pa.dictionary(pa.int32(), pa.string()) for name in as_text}
        convert = pacsv.ConvertOptions(include_columns=columns, column_types=types)
        parse = pacsv.ParseOptions(delimiter=self.delimiter, quote_char=self.quote)
        read = pacsv.ReadOptions(column_names=self.names, skip_rows=1, block_size=BLOCK)
        with pa.input_stream(str(self.path)) as stream:
            try:
                return pacsv.read_csv(stream, read, parse, convert)
            except pa.ArrowInvalid:
                if len(as_text) == len(columns):
                    raise
        # A type was guessed from the first block and did not hold: take text, `numbers` sorts it out.
        return self._read_text(columns, columns)

    def _read_json(self, columns: list[str], as_text: list[str]) -> pa.Table:
        # Only what is text in the first line is declared text: an id may also be a number throughout.
        text = [(c, pa.string()) for c in as_text if isinstance(self.first.get(c), str)]
        options = pajson.ParseOptions(explicit_schema=pa.schema(text))
        with pa.input_stream(str(self.path)) as stream:
            table = pajson.read_json(stream, pajson.ReadOptions(block_size=BLOCK), options)
        return table.select(columns)

    def _read_parquet(self, columns: list[str]) -> pa.Table:
        file, _ = self._parquet(columns)
        return file.read(columns)

    def _parquet(self, columns: list[str]) -> tuple[parquet.ParquetFile, Budget]:
        """The file, once its footer has told that ``columns`` fit into memory, and what of that is left.

        Text stays encoded by a dictionary, so that a long one that occurs often is held once.
        """
        told, budget = parquet.read_metadata(self.path), Budget(self.path)
        text = set()
        for group in map(told.row_group, range(told.num_row_groups)):
            for column in map(group.column, range(told.num_columns)):
                if column.path_in_schema.split(".")[0] in columns:
                    what = f"its footer states {told.num_rows:,} rows"
                    budget.spend(column.total_uncompressed_size + column.num_values * CELL, what)
                    if column.physical_type == "BYTE_ARRAY":
                        text.add(column.path_in_schema)
        return parquet.ParquetFile(self.path, read_dictionary=sorted(text)), budget

    # --- row by row: for long texts, and to find where it trips ---

    def walk(self, columns: list[str]) -> Iterator[tuple[int, list[object]]]:
        """The number of each row, as ``at`` takes it, and its values in ``columns``.

        Slower than ``read``, but a field may be long, hold line ends, or differ in type from row to row.

        Raises:
            DataError: a line that does not fit, with its number; or the file breaks off.
        """
        csv.field_size_limit(2**31 - 1)  # the module's own, 131,072, is less than a long document
        try:
            self._refuse_large()
            if self.format in PARQUET:
                number = itertools.count(1)
                file, budget = self._parquet(columns)
                for batch in file.iter_batches(columns=columns, batch_size=BATCH):
                    budget.spend(sum(map(written_out, batch.columns)))
                    for row in zip(*(batch.column(name).to_pylist() for name in columns), strict=True):
                        yield next(number), list(row)
            elif self.format in JSON:
                for number, value in self._objects():
                    yield number, [value.get(name) for name in columns]
            else:
                place = [self.names.index(name) for name in columns]
                for number, record in self._records():
                    self._same_length(number, record)
                    yield number, [record[i] for i in place]
        except (pa.ArrowException, OSError, UnicodeDecodeError, csv.Error) as error:
            raise DataError(
                f"{self.path} cannot be read: {error}", "Is the file complete, and is its text in UTF-8?"
            ) from error

    def _lines(self) -> Iterator[str]:
        with open_text(self.path) as text:
            yield from text

    def _objects(self) -> Iterator[tuple[int, dict[str, object]]]:
        """Line number and content of each object."""
        return ((n, self._object(n, line)) for n, line in enumerate(self._lines(), 1) if line.strip())

    def _object(self, number: int, line: str) -> dict[str, object]:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{self.path}, line {number} is not JSON: {error}", "Write one object per line."
            ) from error
        if not isinstance(value, dict):
            raise DataError(f"{self.path}, line {number} is not a JSON object.", "Write one object per line.")
        return value

    def _records(self) -> Iterator[tuple[int, list[str]]]:
        """Line number and fields of each record after the header."""
        quoting = csv.QUOTE_MINIMAL if self.quote else csv.QUOTE_NONE
        reader = csv.reader(self._lines(), delimiter=self.delimiter, quoting=quoting)
        next(reader)
        start = reader.line_num + 1
        for record in reader:
            if record:
                yield start, record
            start = reader.line_num + 1

    def _explain(self) -> None:
        """Raise a DataError that names the line, if the fault can be found."""
        try:
            if self.format in JSON:
                for number, value in self._objects():
                    self._same_types(number, value)
            elif self.format in TEXT:
                for number, record in self._records():
                    self._same_length(number, record)
        except UnicodeDecodeError as error:
            raise DataError(f"{self.path} is not UTF-8 text: {error}", "Convert it to UTF-8.") from error
        except (OSError, csv.Error):
            return  # what pyarrow said is all there is

    def _same_length(self, number: int, record: list[str]) -> None:
        if len(record) != len(self.names):
            raise DataError(
                f"{self.at(number)}: {len(record)} fields for {len(self.names)} columns.",
                "Fix or drop the line; quote fields that contain the delimiter.",
            )

    def _same_types(self, number: int, value: dict[str, object]) -> None:
        for name, first in self.first.items():
            other = value.get(name)
            if other is not None and isinstance(other, str) != isinstance(first, str):
                raise DataError(
                    f"{self.path}, line {number}: {name} is {other!r}, but {first!r} in line 1.",
                    "Write all of them as text or all as numbers.",
                )

    def at(self, number: int) -> str:
        """Where a row that ``walk`` numbered stands, for messages."""
        return f"{self.path}, {'row' if self.format in PARQUET else 'line'} {number}"

    def place(self, row: int) -> str:
        """Where row ``row`` (from 0) stands in the file, for messages."""
        if self.format in PARQUET:
            return self.at(row + 1)
        rows = self._objects() if self.format in JSON else self._records()
        return self.at(next(itertools.islice(rows, row, None))[0])


# --- interactions -------------------------------------------------------------------------------------


def read_interactions(path: Path, keys: InteractionsConfig) -> InteractionTable:
    """The interactions in the file ``path``, its columns named by ``keys`` or found.

    Raises:
        DataError: a column is missing, or a value is absent or not what it should be (with its line).
    """
    table = TableFile(path)
    user = column(table, "user", keys.user)
    item = column(table, "item", keys.item)
    time = column(table, "time", keys.time, required=False)
    position = "" if time else column(table, "position", keys.position, required=False)
    rating = column(table, "rating", keys.rating, required=False)
    wanted = [name for name in (user, item, time or position, rating) if name]
    if len(set(wanted)) < len(wanted):
        raise DataError(
            f"{path}: one column cannot play two roles ({', '.join(wanted)}).", "Name different columns."
        )
    data = table.read(wanted, as_text=[user, item])
    users, user_ids = encode(table, user, data[user])
    items, item_ids = encode(table, item, data[item])
    if time or position:
        when, clock = numbers(table, time or position, data[time or position]), "time" if time else "position"
    else:
        when, clock = np.arange(len(users)), "file"
    ratings = numbers(table, rating, data[rating]).astype(np.float32) if rating else None
    if clock == "position":
        refuse_double_positions(table, users, when)
    return InteractionTable(users, items, user_ids, item_ids, when, clock, ratings, str(path))


def column(table: TableFile, role: str, wanted: str, required: bool = True) -> str:
    """The name of the column that plays ``role``: as wanted, else by its usual names, else ''."""
    return choose(table.names, str(table.path), role, wanted, required)


def choose(names: list[str], where: str, role: str, wanted: str, required: bool = True) -> str:
    """Of the column ``names`` of what lies at ``where``, the one that plays ``role``, as ``column`` says.

    Raises:
        DataError: it is not there (the nearest is given).
    """
    there = ", ".join(names)
    if wanted == NONE and not required:
        return ""
    if wanted:
        if wanted in names:
            return wanted
        close = nearest(wanted, names)
        hint = f"Did you mean dataset.{role}={close}? " if close else ""
        raise DataError(f"{where} has no column {wanted!r}.", f"{hint}Its columns: {there}.")
    plain = {"".join(c for c in name.lower() if c.isalnum()): name for name in reversed(names)}
    for usual in USUAL[role]:
        if usual in plain:
            return plain[usual]
    if not required:
        return ""
    close = nearest(USUAL[role][0], plain)
    hint = f"Is it {plain[close]!r}? " if close else ""
    looks = {"field": "text", "problem": "the problem"}.get(role, f"the {role} (such as {role}_id)")
    raise DataError(
        f"{where} has no column that looks like {looks}.",
        f"{hint}Say which: dataset.{role}=COLUMN. Its columns: {there}.",
    )


def encode(table: TableFile, name: str, values: pa.ChunkedArray) -> tuple[np.ndarray, list[str]]:
    """Codes (M,) int64 and the ids they stand for, in the order described at ``InteractionTable``."""
    if pa.types.is_dictionary(values.type) and not pa.types.is_string(values.type.value_type):
        values = _undone(table, values)
    if pa.types.is_floating(values.type):
        try:
            values = values.cast(pa.int64())  # whole numbers that a missing value once turned to floats
        except pa.ArrowInvalid as error:
            raise DataError(
                f"{table.path}: the ids in {name!r} are fractions.", "Use text or integers."
            ) from error
    if pa.types.is_integer(values.type):
        values = values.cast(pa.string())
    if not pa.types.is_dictionary(values.type):
        if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
            raise DataError(f"{table.path}: the ids in {name!r} are {values.type}.", "Use text or integers.")
        values = values.dictionary_encode()
    whole = values.unify_dictionaries().combine_chunks()
    whole = whole.chunk(0) if isinstance(whole, pa.ChunkedArray) else whole
    ids = whole.dictionary.cast(pa.string()).to_pylist()
    if whole.null_count or "" in ids:
        codes = whole.indices.fill_null(-1).to_numpy()
        empty = [-1, *(code for code, value in enumerate(ids) if value == "")]
        row = int(np.flatnonzero(np.isin(codes, empty))[0])
        raise DataError(f"{table.place(row)}: {name} is empty.", "Fill it in or drop the line.")
    return canonical(whole.indices.to_numpy(), ids)


def canonical(codes: np.ndarray, ids: list[str]) -> tuple[np.ndarray, list[str]]:
    """Renumber ``codes`` so that ids run short before long, then by alphabet."""
    order = sorted(range(len(ids)), key=lambda i: (len(ids[i]), ids[i]))
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    return rank[codes], [ids[i] for i in order]


def numbers(table: TableFile, name: str, values: pa.ChunkedArray) -> np.ndarray:
    """(M,) int64 where all are whole, else float64. Dates become seconds since 1970.

    Raises:
        DataError: a value is missing or is neither a number nor a date (with its line).
    """
    if pa.types.is_dictionary(values.type):
        values = _undone(table, values)
    kind = values.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        values = _parse(table, name, values)
        kind = values.type
    if values.null_count:
        row = int(np.flatnonzero(values.is_null().to_numpy())[0])
        raise DataError(f"{table.place(row)}: {name} is empty.", _fix_hint(name))
    if pa.types.is_temporal(kind) and not pa.types.is_time(kind):
        micro = values.cast(pa.timestamp("us", getattr(kind, "tz", None)), safe=False).cast(pa.int64())
        return _whole(micro.to_numpy() / 1e6)
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        return values.cast(pa.int64()).to_numpy()
    if not pa.types.is_floating(kind):
        raise DataError(f"{table.path}: {name} is {kind}, not a number or a date.", _fix_hint(name))
    found = values.cast(pa.float64()).to_numpy()
    if not np.isfinite(found).all():
        row = int(np.flatnonzero(~np.isfinite(found))[0])
        raise DataError(f"{table.place(row)}: {name} is {found[row]}.", _fix_hint(name))
    return _whole(found)


def _parse(table: TableFile, name: str, values: pa.ChunkedArray) -> pa.ChunkedArray:
    for kind in (pa.int64(), pa.float64(), pa.timestamp("us")):
        try:
            return values.cast(kind)
        except pa.ArrowInvalid:
            continue
    for row, value in enumerate(values.to_pylist()):
        try:
            float(value)
        except (TypeError, ValueError):
            shown = f"{value!r}, not a number" if value else "empty"
            raise DataError(f"{table.place(row)}: {name} is {shown}.", _fix_hint(name)) from None
    raise AssertionError("pyarrow refuses numbers that Python reads")


def _fix_hint(name: str) -> str:
    return f"Fix or drop the line, or name another column (dataset.KEY=COLUMN; {NONE!r} = do not use {name})."


def _whole(values: np.ndarray) -> np.ndarray:
    whole = values.astype(np.int64)
    return whole if (whole == values).all() else values


def refuse_double_positions(table: TableFile, user: np.ndarray, when: np.ndarray) -> None:
    order = np.lexsort((when, user))
    same = (np.diff(user[order]) == 0) & (np.diff(when[order]) == 0)
    if same.any():
        row = int(order[np.flatnonzero(same)[0] + 1])
        raise DataError(
            f"{table.place(row)}: a user has two interactions at position {when[row]}.",
            "Positions must differ within a user; or name a column of times: dataset.time=COLUMN.",
        )


# --- items --------------------------------------------------------------------------------------------


def read_items(path: Path, wanted: str = "") -> ItemTable:
    """The table that describes items: all its columns as text, lists joined by ``|``.

    Raises:
        DataError: no column of ids, or two rows for one item.
    """
    table = TableFile(path)
    key = column(table, "item", wanted if wanted in table.names else "")
    data = table.read(table.names, as_text=table.names)
    Budget(path).spend(sum(written_out(data[name]) for name in table.names))
    columns = {name: [_text(v) for v in data[name].to_pylist()] for name in table.names}
    ids = columns.pop(key)
    if len(set(ids)) < len(ids):
        seen: set[str] = set()
        row = next(i for i, value in enumerate(ids) if value in seen or seen.add(value))
        raise DataError(
            f"{table.place(row)}: the item {ids[row]!r} is described twice.", "Keep only one of the rows."
        )
    return ItemTable(ids, columns, column(table, "title", "", required=False))


def _undone(table: TableFile, values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Values that stood in a dictionary, each in its own place."""
    Budget(table.path).spend(written_out(values))
    return values.cast(values.type.value_type)


def written_out(values: pa.Array | pa.ChunkedArray) -> int:
    """Bytes that ``values`` take once every entry of a dictionary stands where it is used."""
    if isinstance(values, pa.ChunkedArray):
        return sum(map(written_out, values.chunks))
    if isinstance(values, pa.ListArray | pa.LargeListArray):
        values = values.flatten()
    if not isinstance(values, pa.DictionaryArray):
        return values.nbytes + len(values) * CELL
    words = values.dictionary
    if pa.types.is_primitive(words.type):
        return len(values) * (CELL + 8)
    lengths = pc.call_function("binary_length", [words]).take(values.indices)
    return (pc.call_function("sum", [lengths]).as_py() or 0) + len(values) * CELL


def _text(value: object) -> str:
    if isinstance(value, list):
        return "|".join(map(str, value))
    return "" if value is None else str(value).strip()
