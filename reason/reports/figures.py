"""Figures as JSON data and back, so that they can be printed, kept in a run folder and drawn again."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from reason.errors import unknown
from reason.methods.figures import Figure, HeatMap, Lines, Table, Tokens

KINDS: dict[str, type] = {"table": Table, "lines": Lines, "heat map": HeatMap, "tokens": Tokens}
_NAMES = {kind: name for name, kind in KINDS.items()}


def as_dict(figure: Figure) -> dict[str, Any]:
    """The figure's fields, and its kind under ``kind``."""
    return {"kind": _NAMES[type(figure)]} | {f.name: getattr(figure, f.name) for f in fields(figure)}


def from_dict(data: dict[str, Any]) -> Figure:
    """The figure that ``as_dict`` wrote.

    Raises:
        ConfigError: a kind that is not one of the four.
    """
    if data.get("kind") not in KINDS:
        raise unknown("kind of figure", str(data.get("kind")), KINDS)
    return KINDS[data["kind"]](**{k: v for k, v in data.items() if k != "kind"})
