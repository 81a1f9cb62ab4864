"""Text that every Python brings along: its language reference and the sources of its standard library.

Documents are the topics of ``help()`` (``pydoc_data.topics``) and the ``.py`` files, named by path. Left out
are tests, installed packages, what some distributions package apart, tables of characters, and what a
build writes about its own machine. What is absent is simply not there.
"""

from __future__ import annotations

import importlib
import platform
import sysconfig
import tokenize
from pathlib import Path

from reason.datasets.documents import Documents, TextData, build
from reason.datasets.textconfig import StdlibConfig
from reason.errors import DataError

APART = {
    *("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"),
    *("idlelib", "turtledemo", "turtle.py", "tkinter", "lib2to3", "distutils", "ensurepip", "venv"),
    *("encodings", "pydoc_data", "sitecustomize.py", "usercustomize.py"),
}
OF_THE_BUILD = ("config-", "_sysconfigdata")


def load(config: StdlibConfig, offline: bool = False) -> TextData:
    """The topics and sources of the running interpreter. Nothing is fetched, so ``offline`` is moot.

    Raises:
        DataError: this Python comes without either.
    """
    found = {f"topics/{name}": text for name, text in _topics().items()}
    folder = Path(sysconfig.get_path("stdlib"))
    unread = 0
    for path in sources(folder):
        try:
            with tokenize.open(path) as file:  # by its own declaration of encoding
                found[f"lib/{path.relative_to(folder).as_posix()}"] = file.read()
        except (OSError, SyntaxError, UnicodeDecodeError):
            unread += 1
    if not found:
        raise DataError(
            f"This Python comes without the sources of its standard library ({folder}).",
            "Use files of your own: dataset=text dataset.path=PATH",
        )
    version = platform.python_version()
    notes = [f"The text is that of Python {version}; another version has another text, and another digest."]
    if unread:
        notes.append(f"Files of the standard library that could not be read: {unread:,}.")
    documents = {"train": Documents(list(found), list(found.values()))}
    return build(documents, config, "The standard library", {"python": version}, notes)


def sources(folder: Path) -> list[Path]:
    """The ``.py`` files below the standard library's ``folder`` that count."""
    return [
        path
        for path in sorted(folder.rglob("*.py"))
        for parts in [path.relative_to(folder).parts]
        if not APART.intersection(parts) and not any(part.startswith(OF_THE_BUILD) for part in parts)
    ]


def _topics() -> dict[str, str]:
    try:
        return importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        return {}
