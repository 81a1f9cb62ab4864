"""One's own documents, from a file or a folder: a file each, or a row each of a table.

Tables are CSV, TSV, JSONL and Parquet; whatever else is asked for is plain text in UTF-8. Both may be
compressed. In a folder without ``pattern``, tables come before plain text: where there is a table, a
README beside it is no document.

A folder may say which documents train, validate and test: by subfolders ``train``, ``valid`` and ``test``
(or ``validation``, ``val``, ``dev``), or by these words in the names of tables and ``.txt`` files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from reason.datasets.documents import Documents, TextData, build, content_id
from reason.datasets.tables import JSON, NONE, PARQUET, TableFile, column, open_text, refuse_absent, suffix
from reason.datasets.textconfig import TextConfig
from reason.errors import ConfigError, DataError

TABLES = (".csv", ".tsv", *JSON, *PARQUET)
PLAIN = (
    *(".txt", ".md", ".rst", ".tex", ".org", ".html", ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp"),
    *(".cu", ".rs", ".go", ".java", ".kt", ".scala", ".js", ".ts", ".jl", ".lua", ".pl", ".r", ".rb"),
    *(".hs", ".ml", ".sh", ".sql", ".swift"),
)
WORDS = {  # in names of files and folders, and the split they stand for
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("valid", "validation", "val", "dev"), "valid"),
    **dict.fromkeys(("test", "testing"), "test"),
}


def load(config: TextConfig, offline: bool = False) -> TextData:
    """The documents at ``config.path``. Nothing is ever fetched, so ``offline`` is moot.

    Raises:
        ConfigError: no path. DataError: what lies there cannot be used, and why.
    """
    if not config.path:
        raise ConfigError("dataset.path is not set.", "Name a file or a folder: dataset.path=PATH")
    root = Path(config.path).expanduser()
    notes: list[str] = []
    files = files_at(root, config.pattern, notes)
    splits = by_split(root, files, config.split, notes)
    readings = {split: [_reading(path, root, config) for path in paths] for split, paths in splits.items()}
    named = by_id([r for several in readings.values() for r in several], config.id, notes)
    found = {
        split: Documents([i for r in several for i in r.ids(named)], [t for r in several for t in r.text])
        for split, several in readings.items()
    }
    return build(found, config, str(root), notes=notes)


# --- which files, and what their names say ------------------------------------------------------------


def files_at(root: Path, pattern: str, notes: list[str]) -> list[Path]:
    """The files to read, by path."""
    refuse_absent(root, "file or folder", "Check dataset.path.")
    if root.is_file():
        return [root]
    if pattern:
        chosen = _inside(root, pattern)
    else:
        found = _inside(root)
        tables = [p for p in found if suffix(p) in TABLES]
        plain = [p for p in found if suffix(p) in PLAIN]
        chosen = tables or plain
        if tables and plain:
            notes.append(
                f"Plain text files beside tables were left out: {_some(plain, root)}; dataset.pattern can select them."
            )
    if not chosen:
        there = _inside(root)
        raise DataError(
            f"No file in {root} matches {pattern!r}." if pattern else f"The folder {root} holds no text.",
            f"It holds {_some(there, root) if there else 'no file'}. "
            f"Read by default: {', '.join((*TABLES, *PLAIN[:7]))} and other sources.",
        )
    return chosen


def _inside(root: Path, pattern: str = "**/*") -> list[Path]:
    try:
        return sorted(p for p in root.glob(pattern) if p.is_file() and not _hidden(p, root))
    except (ValueError, NotImplementedError) as error:
        raise DataError(
            f"dataset.pattern={pattern} is not a pattern of file names: {error}.",
            "For example dataset.pattern=**/*.md",
        ) from error


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith((".", "__pycache__")) for part in path.relative_to(root).parts)


def _some(paths: Sequence[Path], root: Path) -> str:
    names = [p.relative_to(root).as_posix() for p in paths[:3]]
    return ", ".join(names) + (f" ... ({len(paths):,} in all)" if len(paths) > 3 else "")


def by_split(
    root: Path, files: list[Path], how: str, notes: list[str], wanted: Sequence[str] = ("valid", "test")
) -> dict[str, list[Path]]:
    """Files by the split their names say; all of them under "train" where that is not wanted or not to be had.

    wanted: splits whose absence is noted, because training has to give them documents.
    """
    if how == "hash":
        return {"train": files}
    named: dict[str, list[Path]] = {}
    for path in files:
        if split := _said(path, root):
            named.setdefault(split, []).append(path)
    if "train" not in named or len(named) == 1:
        if how == "files":
            raise DataError(
                f"{root}: no files are named for training and for validation or test.",
                "Expected names such as train.jsonl and valid.jsonl, or folders train/ and test/. "
                "dataset.split=hash splits by share instead.",
            )
        return {"train": files}
    rest = [p for p in files if not _said(p, root)]
    if rest:
        notes.append(
            f"Files whose names do not say a split were left out: {_some(rest, root)}; "
            "dataset.split=hash uses all files."
        )
    missing = [split for split in wanted if split not in named]
    if missing:
        notes.append(
            f"No file is named for {missing[0]}, so it is taken from the training documents (dataset.{missing[0]})."
        )
    return named


def _said(path: Path, root: Path) -> str:
    """The split that the name of ``path`` says, or ''. Sources do not say it: train.py is a program."""
    relative = path.relative_to(root) if path != root else Path(path.name)
    if len(relative.parts) > 1 and (split := WORDS.get(relative.parts[0].lower())):
        return split
    if suffix(path) in (*TABLES, ".txt"):
        said = {WORDS[word] for word in re.split(r"[^a-z]+", path.name.lower()) if word in WORDS}
        if len(said) == 1:
            return said.pop()
    return ""


# --- reading ------------------------------------------------------------------------------------------


class Reading:
    """The documents of one file. ``name`` (n,) holds what may name them, or is None; ``source`` likewise."""

    def __init__(self, path: Path, text: list[str], name: list[str] | None, source: list[str] | None = None):
        self.path, self.text, self.name, self.source = path, text, name, source

    def ids(self, named: bool) -> list[str]:
        """By name, else by content."""
        if self.name is not None and (named or suffix(self.path) not in TABLES):
            return self.name
        ids = map(content_id, self.text)
        return [f"{s}/{i}" for s, i in zip(self.source, ids, strict=True)] if self.source else list(ids)


def _reading(path: Path, root: Path, config: TextConfig) -> Reading:
    if suffix(path) in TABLES:
        return _rows(path, config)
    name = path.name if path == root else path.relative_to(root).as_posix()
    return Reading(path, [sound(_plain(path))], [name])


def _plain(path: Path) -> str:
    if suffix(path) == ".json":
        raise DataError(
            f"{path} is a single JSON document, which is not a format that is read.",
            "Write it as JSONL (.jsonl): one object per line.",
        )
    if path.stat().st_size == 0:
        return ""
    try:
        with open_text(path) as text:
            return text.read()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text: {error.reason} at byte {error.start:,}.",
            "Convert it (iconv -f latin1 -t utf-8), or leave it out: dataset.pattern=GLOB.",
        ) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}", "Is the file complete?") from error


def _rows(path: Path, config: TextConfig) -> Reading:
    """A document a row. A missing text is an empty one."""
    table = TableFile(path, "document")
    roles = {
        "field": column(table, "field", config.field),
        "id": column(table, "id", config.id, required=False),
        "source": column(table, "source", "", required=False),
    }
    columns = list(dict.fromkeys(name for name in roles.values() if name))
    place = {role: columns.index(name) for role, name in roles.items() if name}
    text, name, source = [], [], []
    for number, values in table.walk(columns):
        value = values[place["field"]]
        if value is not None and not isinstance(value, str):
            raise DataError(
                f"{table.at(number)}: {roles['field']} is {str(value)[:40]!r}, not text.",
                "Name the column of the text: dataset.field=COLUMN",
            )
        text.append(sound(value or ""))
        for role, kept in (("id", name), ("source", source)):
            if role in place:
                kept.append("" if values[place[role]] is None else sound(str(values[place[role]])))
    if not text:
        raise DataError(f"{path} has a header but no rows.", "It should hold one document per line.")
    return Reading(path, text, name or None, source or None)


def by_id(readings: Iterable[Reading], wanted: str, notes: list[str]) -> bool:
    """Whether the rows of tables go by their ids: all have one, and no two the same.

    Raises:
        DataError: they do not, but the column was asked for.
    """
    tables = [r for r in readings if suffix(r.path) in TABLES]
    if wanted == NONE or not any(r.name for r in tables):
        return False
    seen: set[str] = set()
    for reading in tables:
        for row, name in enumerate(reading.name or [""] * len(reading.text)):
            if not name or name in seen:
                if wanted:
                    raise DataError(
                        f"{reading.path}, document {row + 1}: "
                        + (f"the id {name!r} occurs a second time." if name else "it has no id."),
                        "Ids must be unique across all files. dataset.id=- names documents by their content.",
                    )
                notes.append("The id column repeats itself, so documents are named by their content.")
                return False
            seen.add(name)
    return True


def sound(text: str) -> str:
    """``text`` with halves of surrogate pairs, which JSON can spell and UTF-8 cannot, as U+FFFD."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
