"""Curves and trees as SVG inside a page: colours, sizes of text and widths of lines are the page's own.

A drawing scales with its column. It has classes and no ids, so any number of them can stand in one
page: ``curve`` (``fine`` where it has many points) and ``mark`` with ``s0``..``s5`` for colour and
``d0``..``d2`` for dashes, ``rule`` for the lines behind. A tree has a size of its own, ``w1``..``w5`` for how many descend
from a branch, ``gone`` where nobody does, and the page's shades.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from reason.methods.figures import Tree

WIDTH, HEIGHT = 640, 320
_TOP, _SIDE, _BOTTOM = 12, 16, 36
_CHARACTER = 11.5  # width of a digit where text is largest, on a phone
_MARKED = 60  # a curve of more points has no markers
_COLOURS = 6
_MARKS = (  # paths around the point: circle, square, diamond, triangles, cross
    "m-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0z",
    "m-4.5-4.5h9v9h-9z",
    "m0-6l6 6l-6 6l-6-6z",
    "m0-6l6 10.5h-12z",
    "m0 6l6-10.5h-12z",
    "m-2-6h4v4h4v4h-4v4h-4v-4h-4v-4h4z",
)

Point = tuple[float, float] | None


def chart(x: Sequence[float], series: Sequence[Sequence[float | None]]) -> str:
    """All curves over one ``x``; None and what is not finite are gaps. '' where no point is left."""
    curves = [[_point(a, b) for a, b in zip(x, ys, strict=True)] for ys in series]
    points = [p for curve in curves for p in curve if p]
    if not points:
        return ""
    whole = all(p[0].is_integer() for p in points)
    left_x, right_x = _range([p[0] for p in points], 1.0 if whole else 0.0)
    low, high = _range([p[1] for p in points])
    across, up = _ticks(left_x, right_x, 6, whole), _ticks(low, high, 5)
    left = max(_SIDE + _CHARACTER * max(len(label) for _, label in up), _half(across[0]))
    right, bottom = WIDTH - max(_SIDE, _half(across[-1])), HEIGHT - _BOTTOM

    def place(p: tuple[float, float]) -> tuple[float, float]:
        across, up = (p[0] - left_x) / (right_x - left_x), (p[1] - low) / (high - low)
        return left + across * (right - left), bottom - up * (bottom - _TOP)

    drawn = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" aria-hidden="true">']
    for value, label in up:
        y = place((left_x, value))[1]
        drawn.append(f'<path class="rule" d="M{left:.1f} {y:.1f}H{right:.1f}"/>')
        drawn.append(f'<text x="{left - 8:.1f}" y="{y:.1f}" dy=".35em" text-anchor="end">{label}</text>')
    for value, label in across:
        at = place((value, low))[0]
        drawn.append(f'<path class="rule" d="M{at:.1f} {bottom}v6"/>')
        drawn.append(f'<text x="{at:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{label}</text>')
    for i, curve in enumerate(curves):
        placed = [place(p) if p else None for p in curve]
        few = len(placed) <= _MARKED
        drawn.append(f'<path class="curve {_look(i)}{"" if few else " fine"}" d="{_path(placed)}"/>')
        if few:
            marks = "".join(f"M{p[0]:.1f} {p[1]:.1f}{_mark(i)}" for p in placed if p)
            drawn.append(f'<path class="mark {_look(i)}" d="{marks}"/>')
    return "\n".join([*drawn, "</svg>"])


# --- trees ----------------------------------------------------------------------------------------

_LETTER = 6.7  # width of one in a label
_ROW, _GAP = 36, 30  # height of a row; beside the label of a column
_LONGEST = 26  # letters of a label; the rest is in its tooltip


def places(f: Tree) -> list[tuple[int, int]]:
    """Column (generations from the root) and row of each node. A first child goes on in its parent's row, so that
    nothing else stands where a branch and its label are."""
    column, first, children = [], [], [[] for _ in f.parents]
    roots = []
    for node, parent in enumerate(f.parents):
        siblings = roots if parent < 0 else children[parent]
        column.append(0 if parent < 0 else column[parent] + 1)
        first.append(not siblings and (parent >= 0 or not node))
        siblings.append(node)
    row, rows, waiting = 0, [0] * len(column), roots[::-1]
    while waiting:
        node = waiting.pop()
        row += not first[node]
        rows[node] = row
        waiting += children[node][::-1]
    return list(zip(column, rows, strict=True))


def clipped(text: str, longest: int = _LONGEST) -> str:
    """How it begins and how it ends, where it is longer."""
    half = (longest - 1) // 2
    return text if len(text) <= longest else f"{text[: longest - 1 - half]}…{text[len(text) - half :]}"


def tree(f: Tree, shade: Callable[[float], int], escape: Callable[[object], str]) -> str:
    """Generations from left to right, a row for each branch.

    shade: number of the page's shade for a value. escape: text for HTML.
    """
    at, most = places(f), max(f.counts, default=0)
    labels = [clipped(label) for label in f.labels]
    room = [0] * (max((c for c, _ in at), default=-1) + 1)
    parents = set(f.parents)
    for node, (c, _) in enumerate(at):
        room[c] = max(room[c], len(labels[node]), len(f.marks[node]) if node in parents else 0)
    ends = [0.0]
    for letters in room:
        ends.append(ends[-1] + letters * _LETTER + _GAP)

    def end(node: int) -> tuple[float, float]:
        return ends[at[node][0] + 1], _ROW * (at[node][1] + 0.65)

    width = max(
        [
            0.0,
            *(end(i)[0] + (len(mark) * _LETTER if i not in parents else 0) for i, mark in enumerate(f.marks)),
        ]
    )
    height = _ROW * (max((r for _, r in at), default=-1) + 1) + 4
    drawn = [
        f'<svg viewBox="0 0 {width + 16:.0f} {height}" width="{width + 16:.0f}" height="{height}" aria-hidden="true">'
    ]
    for node in sorted(range(len(at)), key=lambda i: f.counts[i]):  # what survives lies above what does not
        x, y = end(node)
        left = ends[at[node][0]]
        parent, count = f.parents[node], f.counts[node]
        look = f"w{1 + round(4 * math.sqrt(count / most))}" if count else "gone"
        above = end(parent)[1] if parent >= 0 else y
        drawn.append(f'<path class="branch {look}" d="M{left:.0f} {above:.1f}V{y:.1f}H{x:.0f}"/>')
    for node, label in enumerate(labels):
        x, y = end(node)
        value, mark, gone = f.values[node], f.marks[node], "" if f.counts[node] else " gone"
        dot = f" h{shade(value)}" if value is not None else ""
        told = escape(f.labels[node]) + ("" if value is None else f" ({value:.3g})")
        drawn.append(f"<g><title>{told}</title>")
        drawn.append(f'<path class="dot{dot}{gone}" d="M{x:.0f} {y:.1f}{_MARKS[0]}"/>')
        drawn.append(
            f'<text class="label{gone}" x="{x - 9:.0f}" y="{y - 6:.1f}" text-anchor="end">{escape(label)}</text>'
        )
        if mark and node in parents:
            drawn.append(
                f'<text class="sign{gone}" x="{x - 9:.0f}" y="{y + 12:.1f}" text-anchor="end">{escape(mark)}</text>'
            )
        elif mark:
            drawn.append(
                f'<text class="sign{gone}" x="{x + 10:.0f}" y="{y:.1f}" dy=".35em">{escape(mark)}</text>'
            )
        drawn.append("</g>")
    return "\n".join([*drawn, "</svg>"])


def key(i: int) -> str:
    """The sign of the i-th curve, for a legend."""
    return (
        f'<svg viewBox="0 0 40 16" aria-hidden="true"><path class="curve {_look(i)}" d="M2 8h36"/>'
        f'<path class="mark {_look(i)}" d="M20 8{_mark(i)}"/></svg>'
    )


def _look(i: int) -> str:
    return f"s{i % _COLOURS} d{i // _COLOURS % 3}"


def _mark(i: int) -> str:
    return _MARKS[i % len(_MARKS)]


def _half(tick: tuple[float, str]) -> float:
    """Half the width of a label, which stands centred under its tick."""
    return _CHARACTER * len(tick[1]) / 2


def _point(x: float, y: float | None) -> Point:
    return (float(x), float(y)) if y is not None and math.isfinite(x) and math.isfinite(y) else None


def _path(points: Sequence[Point]) -> str:
    """Neighbours joined; a point alone is a dot."""
    parts, joined = [], False
    for p in points:
        if p:
            parts.append(f"L{p[0]:.1f} {p[1]:.1f}" if joined else f"M{p[0]:.1f} {p[1]:.1f}h0")
        joined = p is not None
    return "".join(parts)


def _range(values: Sequence[float], aside: float = 0.0) -> tuple[float, float]:
    """Least and largest; one value alone gets room on both sides."""
    low, high = min(values), max(values)
    if low == high:
        room = aside or 0.5 * (abs(low) or 1.0)
        return low - room, high + room
    return low, high


def _ticks(low: float, high: float, about: int, whole: bool = False) -> list[tuple[float, str]]:
    """Round values within [low, high], 1, 2 or 5 times a power of ten apart, with their labels."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * k for k in (1, 2, 5, 10) if power * k >= rough * 0.999)
    if whole:
        step = max(1.0, step)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    places = max(0, -math.floor(math.log10(step) + 1e-9))
    plain = places <= 5 and max(abs(low), abs(high)) < 1e7
    values = [k * step for k in range(first, last + 1)]
    return [(v, f"{v + 0.0:,.{places}f}" if plain else f"{v:.3g}") for v in values]
