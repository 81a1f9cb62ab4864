"""What a method may show: five kinds of figure, plain data, no torch.

A method returns these from ``inspect``; ``reason.reports`` draws them in the
terminal and as pictures, so no method knows how anything is drawn.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from reason.printable import printable


@dataclass(frozen=True)
class Table:
    """Rows under column names; ``note`` is a sentence below."""

    title: str
    columns: list[str]
    rows: list[list[Any]]
    note: str = ""


@dataclass(frozen=True)
class Lines:
    """One curve per name in ``series``, all over the same ``x``; None marks a gap."""

    title: str
    x: list[float]
    series: dict[str, list[float | None]]
    x_label: str = ""
    y_label: str = ""
    note: str = ""


@dataclass(frozen=True)
class HeatMap:
    """``values[row][column]``, with a label for each row and column."""

    title: str
    values: list[list[float]]
    rows: list[str]
    columns: list[str]
    note: str = ""


@dataclass(frozen=True)
class Tokens:
    """Text pieces, each coloured by a number (a depth, a weight) in [low, high]."""

    title: str
    tokens: list[str]
    values: list[float]
    low: float = 0.0
    high: float = 1.0
    legend: str = ""
    note: str = ""


@dataclass(frozen=True)
class Tree:
    """Who descends from whom. A parent stands before its children, and siblings are drawn in their order.

    parents: index of each node's parent, -1 = none. labels: what a node says. values: a number in [low, high] that colours
    it; None = no colour. counts: how many descend from it in the end; 0 = a branch that died, drawn faintly.
    marks: a word or two beside it.
    """

    title: str
    parents: list[int]
    labels: list[str]
    values: list[float | None]
    counts: list[int]
    marks: list[str]
    low: float = 0.0
    high: float = 1.0
    legend: str = ""
    note: str = ""


Figure = Table | Lines | HeatMap | Tokens | Tree

_KINDS: dict[type, str] = {
    Table: "table",
    Lines: "lines",
    HeatMap: "heat map",
    Tokens: "tokens",
    Tree: "tree",
}


def safe(figure: Figure) -> Figure:
    """The figure with all its text ``printable``: what every drawing begins with."""
    return replace(figure, **{f.name: _safe(getattr(figure, f.name)) for f in fields(figure)})


def _safe(value: Any) -> Any:
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, list | tuple):
        return [_safe(v) for v in value]
    return {_safe(k): _safe(v) for k, v in value.items()} if isinstance(value, dict) else value


def as_dict(figure: Figure) -> dict[str, Any]:
    """The fields of a figure, and its kind under ``kind``: JSON data for `inspect --json`."""
    return {"kind": _KINDS[type(figure)]} | {f.name: getattr(figure, f.name) for f in fields(figure)}


__all__ = ["Figure", "HeatMap", "Lines", "Table", "Tokens", "Tree", "as_dict", "safe"]
