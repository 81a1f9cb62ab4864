"""Where an answer may be written: refused before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from reason.errors import ConfigError


def check_output_path(path: Path, kind: str, endings: Sequence[str]) -> None:
    """Refuse a path that no ``kind`` of file ("image", "page") can be written to.

    endings: those that are known, the usual one first.

    Raises:
        ConfigError: a folder, an unknown ending, or a place in a folder that does not exist.
    """
    if path.is_dir():
        example = path / (kind + endings[0])
        raise ConfigError(f"{path} is a folder; the {kind} must be a file.", f"For example: {example}")
    if path.suffix.lower() not in endings:
        hint = f"Use {' or '.join(endings)}: {path.parent / path.stem}{endings[0]}"
        raise ConfigError(f"{path} has the wrong extension for the {kind}.", hint)
    if not path.parent.is_dir():
        wrong = f"There is no folder {path.parent} to write {path.name} in."
        raise ConfigError(wrong, "Create the folder first.")
