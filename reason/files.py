"""Small file habits shared by every room: write aside and rename, append whole lines, read JSON, hash.

What is written here carries a checksum of itself, and reading checks it: a bit that flipped on a disk, or an edit,
is noticed and not believed. What has no checksum, because others or an earlier version wrote it, is read as it is.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
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


SEAL = "sha256_of_the_rest"  # the last key of a JSON object
_CRC = b',"crc":"'  # the last key of a line of JSON
_SIGNATURE = "# sha256 of all above: "  # the last line of a text that has comments


class Altered(ValueError):
    """The content of a file is not what was written."""

    def __init__(self) -> None:
        super().__init__("was changed after it was written: its checksum does not match")


def write_json(path: Path | str, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically; an object is sealed. NaN is refused: honest or absent."""
    with atomic(path) as f:
        json.dump(sealed(value) if isinstance(value, dict) else value, f, indent=2, allow_nan=False)
        f.write("\n")


def read_json(path: Path | str) -> Any:
    """The value in a file of JSON, without its seal.

    Raises:
        ValueError: no JSON, nested too deeply, or (``Altered``) not what was written.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return unsealed(value) if isinstance(value, dict) else value


def sealed(value: dict[str, Any]) -> dict[str, Any]:
    """A JSON object with the sha256 of its content as its last key."""
    return {**value, SEAL: _digest(value)}


def unsealed(value: dict[str, Any]) -> dict[str, Any]:
    """What ``sealed`` was given.

    Raises:
        Altered: the content is another.
    """
    seal = value.pop(SEAL, None)
    if seal is not None and seal != _digest(value):
        raise Altered
    return value


def _digest(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def signed(text: str) -> str:
    """A text in which # begins a comment, with its sha256 as the last line."""
    return f"{text}{_SIGNATURE}{hashlib.sha256(text.encode()).hexdigest()}\n"


def check_signature(text: str) -> None:
    """Raises ``Altered`` for a text that ``signed`` has made and that is not what it was."""
    body, signature, _ = text.rpartition(_SIGNATURE)
    if signature and signed(body) != text:
        raise Altered


def append_json_lines(path: Path | str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append each row, an object with at least one key, as a line of JSON with a checksum.

    All rows are one write, so that those of several processes do not mix. A line that a kill tore is
    ended first, so that it costs itself and not the one after it.

    Raises:
        OSError: the file cannot be written.
    """
    lines = b"".join(json_line(row) for row in rows)
    if not lines:
        return
    with open(path, "a+b") as f:
        if f.seek(0, os.SEEK_END):
            f.seek(-1, os.SEEK_END)
            lines = lines if f.read(1) == b"\n" else b"\n" + lines
        f.write(lines)


def json_line(row: Mapping[str, Any]) -> bytes:
    """One line of JSON with the checksum of its content."""
    line = json.dumps(row, separators=(",", ":")).encode()
    return b'%s%s%08x"}\n' % (line[:-1], _CRC, zlib.crc32(line))


def parse_json_line(line: bytes) -> Any:
    """The value of a line; with a checksum, its content without that.

    Raises:
        ValueError: it is torn, or not what was written.
    """
    head, crc, tail = line.rpartition(_CRC)
    if crc and tail.strip() != b'%08x"}' % zlib.crc32(head + b"}"):
        raise Altered
    try:
        return json.loads(head + b"}" if crc else line)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json_lines(path: Path | str) -> Iterator[Any]:
    """The value of each line, and None for one that is torn or altered; a file that is not there has no lines."""
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except FileNotFoundError:
        return
    for line in lines:
        if line.strip():
            try:
                yield parse_json_line(line)
            except ValueError:
                yield None


def sha256(path: Path | str) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def content(path: Path | str) -> dict[str, Any]:
    """What a file holds, in short: {"bytes", "sha256"}."""
    return {"bytes": os.path.getsize(path), "sha256": sha256(path)}


def check_content(path: Path | str, expected: dict[str, Any], grows: bool = False) -> None:
    """Check that a file still holds what ``content`` was told.

    Args:
        grows: it is appended to; only its beginning is looked at.
    Raises:
        Altered: it holds something else. FileNotFoundError: it is gone. OSError: it cannot be read.
    """
    size, whole, left = os.path.getsize(path), hashlib.sha256(), expected["bytes"]
    if size < left or (size > left and not grows):
        raise Altered
    with open(path, "rb") as f:
        while left and (part := f.read(min(left, 1 << 20))):
            whole.update(part)
            left -= len(part)
    if whole.hexdigest() != expected["sha256"]:
        raise Altered


def is_locked(path: Path | str) -> bool:
    """Whether a process holds the lock file ``path``."""
    import filelock

    if not Path(path).exists():
        return False
    try:
        with filelock.FileLock(path, timeout=0):
            return False
    except filelock.Timeout:
        return True
