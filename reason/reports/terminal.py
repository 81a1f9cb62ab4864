"""The five kinds of figure, drawn in a terminal with rich.

Nothing depends on colour: without it shades become characters, and a pipe gets plain text.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.style import Style
from rich.table import Table as RichTable
from rich.text import Text

from reason.methods.figures import Figure, HeatMap, Lines, Table, Tokens, Tree, safe
from reason.reports import formatting

_SHADES = " ░▒▓█"
_ASCII_SHADES = " .:*#"
_MARKERS = "●▲■◆○△□◇"
_ASCII_MARKERS = "ox+*#%@&"
_COLOURS = ("cyan", "yellow", "green", "magenta", "blue", "red", "white", "bright_black")


def figure(f: Figure) -> Any:
    """A renderable of one figure."""
    return _VIEWS[type(f)](safe(f))


def _coloured(console: Console) -> bool:
    return console.color_system is not None and not console.no_color


def title(text: str) -> Text:
    return Text(text, style="bold")


def note(text: str) -> list[Any]:
    return [Text(text, style="italic")] if text else []


def plain_table(**kwargs: Any) -> RichTable:
    return RichTable(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold", **kwargs)


@dataclass
class _TableView:
    f: Table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = plain_table()
        for i, name in enumerate(self.f.columns):
            numeric = bool(self.f.rows) and all(isinstance(row[i], int | float | None) for row in self.f.rows)
            table.add_column(Text(name), justify="right" if numeric else "left", overflow="fold")
        for row in self.f.rows:
            table.add_row(*(Text(formatting.cell(value)) for value in row))
        yield Group(title(self.f.title), table, *note(self.f.note), Text())


@dataclass
class _LinesView:
    """Curves on a grid of characters: markers at the points, dots between them."""

    f: Lines
    height = 12

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        f = self.f
        yield title(f.title + (f"   ({f.y_label})" if f.y_label else ""))
        values = [v for ys in f.series.values() for v in ys if v is not None]
        if not values:
            yield Group(Text("no data"), *note(f.note), Text())
            return
        low, high = min(values), max(values)
        if low == high:
            low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
        labels = [formatting.number(v) for v in (high, (low + high) / 2, low)]
        margin = max(map(cell_len, labels))
        width = max(16, min(options.max_width - margin - 3, 72))
        marks = _ASCII_MARKERS if options.ascii_only else _MARKERS
        between, edge = (".", "|") if options.ascii_only else ("·", "┤")
        grid: list[list[tuple[str, str]]] = [[(" ", "")] * width for _ in range(self.height)]
        first, last = min(f.x), max(f.x)

        def place(x: float, y: float) -> tuple[int, int]:
            column = round((x - first) / ((last - first) or 1) * (width - 1))
            return round((high - y) / (high - low) * (self.height - 1)), column

        for i, ys in enumerate(f.series.values()):
            colour, mark = _COLOURS[i % len(_COLOURS)], marks[i % len(marks)]
            points = [None if y is None else place(x, y) for x, y in zip(f.x, ys, strict=True)]
            for (ra, ca), (rb, cb) in ((a, b) for a, b in pairwise(points) if a and b):
                for c in range(min(ca, cb) + 1, max(ca, cb)):
                    r = round(ra + (rb - ra) * (c - ca) / (cb - ca))
                    if grid[r][c][0] == " ":
                        grid[r][c] = (between, colour)
            for r, c in filter(None, points):
                grid[r][c] = (mark, colour)
        ticks = {0: labels[0], self.height // 2: labels[1], self.height - 1: labels[2]}
        for r, line in enumerate(grid):
            yield Text.assemble(f"{ticks.get(r, ''):>{margin}} {edge}", *line)
        left, right = formatting.tick(first), formatting.tick(last)
        gap = max(1, width - cell_len(left) - cell_len(right) - cell_len(f.x_label))
        yield Text(" " * (margin + 2) + left + " " * (gap // 2) + f.x_label + " " * (gap - gap // 2) + right)
        legend = Text()
        for i, name in enumerate(f.series):
            legend.append(f"{marks[i % len(marks)]} {name}   ", style=_COLOURS[i % len(_COLOURS)])
        yield Group(legend, *note(f.note), Text())


@dataclass
class _HeatMapView:
    """A number and a shade for each cell; turned over where it is too wide for the window."""

    f: HeatMap

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        f = self.f
        values = [v for row in f.values for v in row]
        low, high = (min(values), max(values)) if values else (0.0, 0.0)
        rows, columns, cells = f.rows, f.columns, [list(row) for row in f.values]
        wide = max((cell_len(r) for r in rows), default=0) + sum(max(8, cell_len(c) + 2) for c in columns)
        if wide > options.max_width and len(rows) < len(columns):
            rows, columns = columns, rows
            cells = [list(column) for column in zip(*f.values, strict=True)]
        table = plain_table(padding=(0, 1, 0, 0))
        table.add_column("", overflow="fold")
        for name in columns:
            table.add_column(Text(name), justify="right", overflow="fold")
        for name, row in zip(rows, cells, strict=True):
            table.add_row(Text(name), *(self._cell(v, low, high, console, options) for v in row))
        yield Group(title(f.title), table, *note(f.note), Text())

    def _cell(self, value: float, low: float, high: float, console: Console, options: ConsoleOptions) -> Text:
        share = (value - low) / ((high - low) or 1)
        if _coloured(console):
            return Text(f" {value:.3f} ", style=_shade(share))
        shades = _ASCII_SHADES if options.ascii_only else _SHADES
        return Text(f"{shades[min(4, int(share * 5))]} {value:.3f}")


def _shade(share: float) -> Style:
    back, ink = formatting.shade(share)
    return Style.parse(f"{ink} on {back}")


@dataclass
class _TokensView:
    """Text whose background tells a number; without colour the number stands behind each piece."""

    f: Tokens

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        f, text = self.f, Text()
        for token, value in zip(f.tokens, f.values, strict=True):
            share = (value - f.low) / ((f.high - f.low) or 1)
            shown = f"{value:.0f}" if float(value).is_integer() else f"{value:.2f}"
            if _coloured(console):
                text.append(token, style=_shade(share))
            else:
                body = token.rstrip()
                text.append(f"{body}({shown}){token[len(body) :]}")
        scale = Text()
        if _coloured(console):
            scale.append(f" {formatting.tick(f.low)} ", style=_shade(0))
            scale.append(f" {formatting.tick(f.high)} ", style=_shade(1))
            scale.append(f" {f.legend}" if f.legend else "")
        elif f.legend:
            scale.append(f"(number): {f.legend}")
        yield Group(title(f.title), text, scale, *note(f.note), Text())


@dataclass
class _TreeView:
    """A line for each node; a line of descent that does not branch stands in one, steps behind each other."""

    f: Tree

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        f, ascii_only = self.f, options.ascii_only
        tee, corner, bar, then = ("+- ", "`- ", "|  ", " > ") if ascii_only else ("├─ ", "└─ ", "│  ", " → ")
        yield title(f.title)
        children: list[list[int]] = [[] for _ in f.parents]
        for node, parent in enumerate(f.parents):
            if parent >= 0:
                children[parent].append(node)
        deepest = options.max_width // 2 // len(bar)
        roots = [node for node, parent in enumerate(f.parents) if parent < 0]
        waiting: list[tuple[int, list[str], str]] = [(node, [], "") for node in roots[::-1]]
        while waiting:
            node, guides, sign = waiting.pop()
            line, last = self._node(node, console), node
            while len(children[last]) == 1 and not f.marks[last]:
                (last,) = children[last]
                line.append(then, style="bright_black").append_text(self._node(last, console))
            below = guides if not sign else [*guides, bar if sign == tee else " " * len(bar)]
            head = "".join(guides[-deepest:]) + sign
            room = max(options.max_width - cell_len(head), 10)
            under = "".join(below[-deepest:]).ljust(len(head))[: len(head)]
            for i, part in enumerate(line.wrap(console, room, overflow="fold")):
                yield Text(under if i else head, style="bright_black").append_text(part)
            ends = children[last]
            waiting += [(c, below, corner if c == ends[-1] else tee) for c in reversed(ends)]
        numbers = f"Number: {f.legend}." if f.legend else ""
        yield Group(*note(" ".join(filter(None, [numbers, f.note]))), Text())

    def _node(self, node: int, console: Console) -> Text:
        f, value = self.f, self.f.values[node]
        text = Text(f.labels[node], style="" if f.counts[node] else "bright_black")
        if value is not None:
            share = (value - f.low) / ((f.high - f.low) or 1)
            text.append(" ").append(f"{value:.2f}", style=_shade(share) if _coloured(console) else "")
        if f.marks[node]:
            text.append(f"  {f.marks[node]}", style="bold" if f.counts[node] else "bright_black")
        return text


_VIEWS = {
    Table: _TableView,
    Lines: _LinesView,
    HeatMap: _HeatMapView,
    Tokens: _TokensView,
    Tree: _TreeView,
}
