"""Folders of the cache that are built once: by the first process that needs them, completely or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from reason.errors import DataError


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """``folder``, filled by ``build`` if it does not exist. Processes that start together build it once.

    Raises:
        DataError: the cache cannot be written.
    """
    if folder.is_dir():
        return folder
    import filelock

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder.parent / f".{folder.name}.lock"):
            if not folder.is_dir():
                with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as work:
                    unfinished = Path(work) / "built"
                    unfinished.mkdir()
                    build(unfinished)
                    os.replace(unfinished, folder)
    except OSError as error:
        raise DataError(
            f"{folder.parent} in the cache cannot be written: {error.strerror or error}.",
            "Point REASON_CACHE to a folder that can be written and has room.",
        ) from error
    return folder
