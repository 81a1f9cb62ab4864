"""Figures as JSON data, for `inspect --json`."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from reason.methods.figures import Figure, HeatMap, Lines, Table, Tokens

_NAMES: dict[type, str] = {Table: "table", Lines: "lines", HeatMap: "heat map", Tokens: "tokens"}


def as_dict(figure: Figure) -> dict[str, Any]:
    """The figure's fields, and its kind under ``kind``."""
    return {"kind": _NAMES[type(figure)]} | {f.name: getattr(figure, f.name) for f in fields(figure)}
