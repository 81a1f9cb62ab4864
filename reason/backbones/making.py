"""Folders of the cache that are made once: by whoever comes first, whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from reason.errors import DataError


def made(folder: Path, make: Callable[[Path], None]) -> Path:
    """``folder``, filled by ``make`` if it is not there. Processes that start together make it once.

    Raises:
        DataError: the place cannot be written.
    """
    if folder.is_dir():
        return folder
    import filelock

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder.parent / f".{folder.name}.lock"):
            if not folder.is_dir():
                with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as work:
                    aside = Path(work) / "made"
                    aside.mkdir()
                    make(aside)
                    os.replace(aside, folder)
    except OSError as error:
        raise DataError(
            f"{folder.parent} in the cache cannot be written: {error.strerror or error}.",
            "Point REASON_CACHE to a folder that can be written and has room.",
        ) from error
    return folder
