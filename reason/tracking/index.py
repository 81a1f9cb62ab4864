"""What was last read of many run folders, beside the state of the files that it was read from.

Never the truth: whoever asks shows the files' present state (``state``), and gets what was kept only if that is
the same; else the folder is read, as if there were no index. So an index may be deleted at any time, be old, torn,
full of other things or of another version, and where none can be written everything works without.

It is a file of lines, ``<runs>/.index-<sort>.jsonl``, each with a checksum; of several lines about a run the last
counts. Processes append to it side by side, and it is written anew when most of its lines are of no use any more.
"""

from __future__ import annotations

import functools
import json
import os
import time
import zlib
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from reason.files import atomic

VERSION = 1  # of what is kept; lines of another version are passed over
SETTLED_S = (
    2.0  # a file that changed just now may change again and look the same, clocks being as coarse as they are
)


class State(NamedTuple):
    """Of some files: which they are, how large, and when they changed last."""

    text: str
    newest: float  # time of day of the last change

    def __add__(self, other: State) -> State:  # type: ignore[override]
        return State(f"{self.text}|{other.text}", max(self.newest, other.newest))


def state(folder: str, names: Iterable[str]) -> State | None:
    """The state of files, or folders, in ``folder``. A file that is not there is part of it.

    Returns:
        None where it cannot be seen.
    """
    told, newest = [], 0.0
    for name in names:
        try:
            s = os.stat(f"{folder}/{name}")
        except FileNotFoundError:
            told.append("-")
            continue
        except OSError:
            return None
        newest = max(newest, s.st_ctime)
        told.append(f"{s.st_ino}.{s.st_size}.{s.st_mtime_ns}.{s.st_ctime_ns}")
    return State(",".join(told), newest)


class Index:
    """What was kept of the runs under one root, of one sort."""

    def __init__(self, root: Path | str, sort: str):
        self._path = Path(root) / f".index-{sort}.jsonl"
        self._kept: dict[str, tuple[str, Any]] = {}  # name of a run -> state, what was kept
        self._news: list[bytes] = []  # lines that are not in the file yet
        self._lines = 0  # of the file
        with suppress(OSError, ValueError, TypeError, RecursionError):
            self._read(self._path.read_bytes())

    @classmethod
    def of(cls, root: Path | str, sort: str) -> Index:
        """The index of a root, read once in a process."""
        return _opened(os.path.abspath(root), sort)

    def recall(self, name: str, now: State | None) -> Any:
        """What was kept of the run ``name`` when its files were as they are ``now``; None where that is not known.

        It is shared: nobody changes it.
        """
        kept = self._kept.get(name)
        return kept[1] if kept and now and kept[0] == now.text else None

    def keep(self, name: str, then: State | None, value: Any) -> None:
        """Keep what was read of the run ``name``. ``then``: the state of its files *before* they were read."""
        if then is not None and then.newest < time.time() - SETTLED_S:
            self._kept[name] = (then.text, value)
            self._news.append(_line([name, then.text, value]))

    def save(self, names: Collection[str]) -> None:
        """Write down what is new. Where that cannot be done, nothing is lost but time.

        names: of all runs that there are; what was kept of others is forgotten.
        """
        news, self._news = self._news, []
        if not news:
            return
        self._lines += len(news)
        with suppress(OSError):
            if self._lines > 2 * len(names) + 1000:
                there = set(names)
                self._kept = {n: kept for n, kept in list(self._kept.items()) if n in there}
                self._lines = len(self._kept)
                with atomic(self._path, "wb") as f:
                    f.writelines(_line([name, *kept]) for name, kept in self._kept.items())
                return
            with open(self._path, "ab", buffering=0) as f:  # one write: lines of several processes do not mix
                f.write(b"\n" + b"".join(news))  # the last line may be torn

    def _read(self, content: bytes) -> None:
        whole = []
        for line in content.split(b"\n"):
            checksum, _, told = line.partition(b" ")
            if told and checksum == _checksum(told):
                whole.append(told)
        self._lines = len(whole)
        for name, then, value in json.loads(b"[" + b",".join(whole) + b"]"):
            self._kept[name] = (then, value)


_opened = functools.lru_cache(maxsize=8)(Index)


def _line(told: list[Any]) -> bytes:
    text = json.dumps(told, separators=(",", ":")).encode()
    return _checksum(text) + b" " + text + b"\n"


def _checksum(text: bytes) -> bytes:
    return b"%08x" % zlib.crc32(text, VERSION)


def names_of(root: Path | str) -> list[str]:
    """The names of the folders under ``root``, in order; none where there is no such root."""
    try:
        with os.scandir(root) as found:
            return sorted(entry.name for entry in found if entry.is_dir())
    except (FileNotFoundError, NotADirectoryError):
        return []
