"""Small file habits shared by every room: write aside and rename, append whole lines, read JSON, hash."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def atomic(path: Path | str, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a file beside ``path`` for writing; it takes the name only once it is whole.

    A reader sees the old content or the new, never a part; a failure or a kill
    in between leaves the old content and at most a ``.tmp`` file.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    encoding = None if "b" in mode else "utf-8"
    try:
        with open(aside, mode, encoding=encoding) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def write_json(path: Path | str, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically. NaN is refused: honest or absent."""
    with atomic(path) as f:
        json.dump(value, f, indent=2, allow_nan=False)
        f.write("\n")


def read_json(path: Path | str) -> Any:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def append_json_lines(path: Path | str, rows: Iterable[Any]) -> None:
    """Append each row as a line of JSON.

    All rows are one write, so that those of several processes do not mix. A line that a kill tore is
    ended first, so that it costs itself and not the one after it.

    Raises:
        OSError: the file cannot be written.
    """
    lines = b"".join(json.dumps(row, separators=(",", ":")).encode() + b"\n" for row in rows)
    if not lines:
        return
    with open(path, "a+b") as f:
        if f.seek(0, os.SEEK_END):
            f.seek(-1, os.SEEK_END)
            lines = lines if f.read(1) == b"\n" else b"\n" + lines
        f.write(lines)


def read_json_lines(path: Path | str) -> Iterator[Any]:
    """The value of each line; torn lines are passed over, and a file that is not there has none."""
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return
    for line in text.split("\n"):
        try:
            yield json.loads(line)
        except ValueError:
            continue


def sha256(path: Path | str) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
