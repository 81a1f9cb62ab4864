"""Names that people type, and the cards behind them.

Methods, backbones and datasets are all found the same way: an entry point in the group ``reason.<kind>``
names a *card*, a small torch-free object with a name, a summary, a Config dataclass and a ``target``
("module:attribute") that is imported only when the thing is used. Other distributions add theirs by the same
groups.
"""

from __future__ import annotations

import functools
import importlib
from importlib import metadata
from typing import Any

from reason.errors import ConfigError, RunError, unknown

KINDS = ("methods", "backbones", "datasets")


@functools.cache
def _entries(kind: str) -> dict[str, metadata.EntryPoint]:
    return {e.name: e for e in sorted(metadata.entry_points(group=f"reason.{kind}"))}


def names(kind: str) -> list[str]:
    """All registered names of a kind, without importing anything."""
    return list(_entries(kind))


def parted(kind: str, name: str) -> tuple[str, str]:
    """NAME and PART of NAME:PART, where NAME is registered; else ``name`` and ''."""
    head, _, part = name.partition(":")
    return (head, part) if part and head in _entries(kind) else (name, "")


def card(kind: str, name: str) -> Any:
    """The card called ``name``.

    Raises:
        ConfigError: no such name (the nearest is given).
        RunError: the entry point exists but its package cannot be imported.
    """
    entries = _entries(kind)
    if name not in entries:
        raise unknown(kind.removesuffix("s"), name, entries)
    try:
        found = entries[name].load()
    except Exception as error:
        raise RunError(
            f"The {kind.removesuffix('s')} {name!r} ({entries[name].value}) cannot be loaded: "
            f"{type(error).__name__}: {error}",
            "Fix or uninstall the package that registers it.",
        ) from error
    if getattr(found, "name", None) != name:
        raise RunError(f"The entry point {name!r} points to {found!r}, which is not a card of that name.")
    return found


def cards(kind: str) -> tuple[list[Any], list[str]]:
    """All cards that load, and one warning for each that does not."""
    good, warnings = [], []
    for name in names(kind):
        try:
            good.append(card(kind, name))
        except (RunError, ConfigError) as error:
            warnings.append(error.message)
    return good, warnings


def resolve(target: str) -> Any:
    """Import ``"module:attribute"``."""
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)
