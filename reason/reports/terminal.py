"""Everything that is drawn in a terminal: figures, the summary of a run, a comparison.

Nothing depends on colour or on a wide window: without colour shades become characters, columns
that find no room are named below the table, and a pipe gets plain text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.style import Style
from rich.table import Table as RichTable
from rich.text import Text

from reason.methods.figures import Figure, HeatMap, Lines, Table, Tokens
from reason.metrics.statistics import Interval, paired_difference
from reason.reports import words
from reason.reports.frame import device, overrides, read_rows
from reason.tracking.folder import RunFolder

if TYPE_CHECKING:
    from reason.reports.comparison import Comparison, Entry

_SHADES = " ░▒▓█"
_ASCII_SHADES = " .:*#"
_MARKERS = "●▲■◆○△□◇"
_ASCII_MARKERS = "ox+*#%@&"
_COLOURS = ("cyan", "yellow", "green", "magenta", "blue", "red", "white", "bright_black")


# --- the four figures ---------------------------------------------------------------------------


def figure(f: Figure) -> Any:
    """A renderable of one figure."""
    return {Table: _TableView, Lines: _LinesView, HeatMap: _HeatMapView, Tokens: _TokensView}[type(f)](f)


def _coloured(console: Console) -> bool:
    return console.color_system is not None and not console.no_color


def _title(text: str) -> Text:
    return Text(text, style="bold")


def _note(text: str) -> list[Any]:
    return [Text(text, style="italic")] if text else []


def _table(**kwargs: Any) -> RichTable:
    return RichTable(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold", **kwargs)


@dataclass
class _TableView:
    f: Table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = _table()
        for i, name in enumerate(self.f.columns):
            numeric = bool(self.f.rows) and all(
                isinstance(row[i], int | float) or row[i] is None for row in self.f.rows
            )
            table.add_column(Text(name), justify="right" if numeric else "left", overflow="fold")
        for row in self.f.rows:
            table.add_row(*(Text(words.cell(value)) for value in row))
        yield Group(_title(self.f.title), table, *_note(self.f.note), Text())


@dataclass
class _LinesView:
    """Curves on a grid of characters: markers at the points, dots between them."""

    f: Lines
    height = 12

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        f = self.f
        yield _title(f.title + (f"   ({f.y_label})" if f.y_label else ""))
        values = [v for ys in f.series.values() for v in ys if v is not None]
        if not values:
            yield Group(Text("no points"), *_note(f.note), Text())
            return
        low, high = min(values), max(values)
        if low == high:
            low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
        labels = [words.number(v) for v in (high, (low + high) / 2, low)]
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
            points = [place(x, y) for x, y in zip(f.x, ys, strict=True) if y is not None]
            joined = [
                (place(xa, ya), place(xb, yb))
                for (xa, ya), (xb, yb) in pairwise(zip(f.x, ys, strict=True))
                if ya is not None and yb is not None
            ]
            for (ra, ca), (rb, cb) in joined:
                for c in range(min(ca, cb) + 1, max(ca, cb)):
                    r = round(ra + (rb - ra) * (c - ca) / (cb - ca))
                    if grid[r][c][0] == " ":
                        grid[r][c] = (between, colour)
            for r, c in points:
                grid[r][c] = (mark, colour)
        ticks = {0: labels[0], self.height // 2: labels[1], self.height - 1: labels[2]}
        for r, line in enumerate(grid):
            text = Text(f"{ticks.get(r, ''):>{margin}} {edge}")
            for character, colour in line:
                text.append(character, style=colour)
            yield text
        left, right = words.tick(first), words.tick(last)
        gap = max(1, width - cell_len(left) - cell_len(right) - cell_len(f.x_label))
        yield Text(" " * (margin + 2) + left + " " * (gap // 2) + f.x_label + " " * (gap - gap // 2) + right)
        legend = Text()
        for i, name in enumerate(f.series):
            legend.append(f"{marks[i % len(marks)]} {name}   ", style=_COLOURS[i % len(_COLOURS)])
        yield Group(legend, *_note(f.note), Text())


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
        table = _table(padding=(0, 1, 0, 0))
        table.add_column("", overflow="fold")
        for name in columns:
            table.add_column(Text(name), justify="right", overflow="fold")
        for name, row in zip(rows, cells, strict=True):
            table.add_row(Text(name), *(self._cell(v, low, high, console, options) for v in row))
        yield Group(_title(f.title), table, *_note(f.note), Text())

    def _cell(self, value: float, low: float, high: float, console: Console, options: ConsoleOptions) -> Text:
        share = (value - low) / ((high - low) or 1)
        if _coloured(console):
            return Text(f" {value:.3f} ", style=_shade(share))
        shades = _ASCII_SHADES if options.ascii_only else _SHADES
        return Text(f"{shades[min(4, int(share * 5))]} {value:.3f}")


def _shade(share: float) -> Style:
    """Dark blue to yellow, a path that stays readable for colour-blind eyes, with a legible text colour."""
    share = min(1.0, max(0.0, share))
    dark, light = (12, 34, 84), (253, 231, 76)
    rgb = tuple(round(a + (b - a) * share) for a, b in zip(dark, light, strict=True))
    text = "black" if share > 0.5 else "white"
    return Style.parse(f"{text} on rgb({rgb[0]},{rgb[1]},{rgb[2]})")


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
            scale.append(f" {words.tick(f.low)} ", style=_shade(0))
            scale.append(f" {words.tick(f.high)} ", style=_shade(1))
            scale.append(f" {f.legend}" if f.legend else "")
        elif f.legend:
            scale.append(f"(number): {f.legend}")
        yield Group(_title(f.title), text, scale, *_note(f.note), Text())


# --- tables that fit ----------------------------------------------------------------------------


@dataclass
class _Column:
    """A column of a table that must fit: the highest ``rank`` is left out first."""

    head: str
    cells: list[str]
    rank: int = 0
    right: bool = True

    @property
    def width(self) -> int:
        return max(map(cell_len, (self.head, *self.cells)))


def _fitted(
    columns: Sequence[_Column], width: int, styles: Sequence[str], rules: set[int]
) -> tuple[RichTable, list[str]]:
    """A table no wider than ``width``, and the heads of the columns that found no room.

    rules: indices of rows that are followed by a line.
    """
    kept = [c for c in columns if any(c.cells)]
    dropped: list[str] = []
    while sum(c.width + 2 for c in kept) - 2 > width and any(c.rank for c in kept):
        worst = max(kept, key=lambda c: c.rank)
        kept.remove(worst)
        dropped.append(worst.head)
    table = _table(padding=(0, 1, 0, 0))  # with the box's own space: two between columns
    for i, column in enumerate(kept):
        table.add_column(
            Text(column.head), justify="right" if column.right else "left", no_wrap=i > 0, overflow="fold"
        )
    for i, style in enumerate(styles):
        table.add_row(*(Text(c.cells[i]) for c in kept), style=style, end_section=i in rules)
    return table, dropped[::-1]


@dataclass(frozen=True)
class _Signs:
    """Signs that fall back to ASCII where the stream cannot carry others."""

    chosen: str
    better: str
    worse: str
    unclear: str

    @classmethod
    def of(cls, options: ConsoleOptions) -> _Signs:
        return cls("<", "+", "-", "~") if options.ascii_only else cls("◂", "▲", "▼", "≈")


# --- the summary of a run -----------------------------------------------------------------------


def run_summary(result: dict[str, Any], folder: Path | str | None = None) -> Any:
    """What ``reason run`` prints at its end: one line per depth, and how to read it.

    Args:
        result: result.json. folder: the run folder; with it the differences between depths, and to
            the trivial baselines, are computed from the rows.
    """
    return _RunSummary(result, Path(folder) if folder is not None else None)


@dataclass
class _RunSummary:
    result: dict[str, Any]
    folder: Path | None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        r, signs = self.result, _Signs.of(options)
        units, accuracy = r["units"], r["accuracy"]
        name, plural = accuracy["name"], f"{units['example']}s"
        chosen = self._chosen()
        trained = f"trained for {r['train_depth']} {units['depth']}" if r["train_depth"] else "the base"
        yield _title(
            f"{r['experiment']}: {r['method']} on {r['dataset']} with {r['backbone']}, {trained}, seed {r['seed']}"
        )
        yield Text()
        curve, rivals = r["curve"], r.get("baselines") or {}
        records = [*(e["accuracy"] for e in curve), *(b["accuracy"] for b in rivals.values())]
        blank = [""] * len(rivals)
        depths = [str(e["depth"]) + (f" {signs.chosen}" if e is chosen else "") for e in curve]
        columns = [
            _Column(units["depth"], [*depths, *rivals], right=False),
            _Column(f"{name} [95% interval]", [words.interval(_interval(a)) for a in records]),
            _Column("validation", [_value(e.get("valid_accuracy")) for e in curve] + blank, 1),
            _Column("p50 ms", [words.number(e.get("latency_p50_ms")) for e in curve] + blank, 2),
            _Column("p95 ms", [words.number(e.get("latency_p95_ms")) for e in curve] + blank, 4),
            _Column(units["throughput"], [words.number(e.get("throughput_per_s")) for e in curve] + blank, 3),
        ]
        styles = ["bold" if e is chosen else "" for e in curve] + ["dim"] * len(rivals)
        table, dropped = _fitted(columns, options.max_width, styles, {len(curve) - 1} if rivals else set())
        yield table
        yield Text()
        for line in self._reading(name, plural, chosen, signs, dropped):
            yield Text(line)
        yield Text()
        for command, remark in self._next():
            line = f"  {command}  # {remark}"
            yield Text(line if cell_len(line) <= options.max_width else f"  {command.rstrip()}", style="cyan")

    def _chosen(self) -> dict[str, Any] | None:
        """The curve's entry that validation prefers (a tie goes to the shallowest), where it has a choice."""
        entries = [e for e in self.result["curve"] if e.get("valid_accuracy")]
        if len(entries) < 2:
            return None
        sign = 1 if self.result["accuracy"].get("larger_is_better", True) else -1
        return max(entries, key=lambda e: (sign * e["valid_accuracy"]["value"], -e["depth"]))

    def _reading(
        self, name: str, plural: str, chosen: dict[str, Any] | None, signs: _Signs, dropped: list[str]
    ) -> Iterable[str]:
        r, units = self.result, self.result["units"]
        explained = words.meaning(name, units["example"])
        yield f"{name} is the accuracy" + (f": {explained}." if explained else ".")
        yield (
            f"Averaged over the {r['accuracy']['n']:,} {plural} of the {r['split']} split; the brackets hold the "
            "true value 95 times in 100."
        )
        least = r["curve"][0]
        if least["depth"] == 0 and r["train_depth"]:
            yield f"0 {units['depth']}: {units['zero']}."
        if chosen is not None:
            yield f"{signs.chosen} {chosen['depth']} {units['depth']}: the depth that validation chooses."
        yield from self._differences(chosen or r["curve"][-1])
        yield f"Latency spans {units['latency']}, one at a time." + (
            f" Not shown for want of room: {', '.join(dropped)}." if dropped else ""
        )
        yield self._cost()
        if self.folder is not None:
            yield f"Everything about this run is in {self.folder}"

    def _differences(self, entry: dict[str, Any]) -> Iterable[str]:
        """Paired differences on this run's own rows: to the least depth, to each trivial baseline."""
        if self.folder is None:
            return
        r, unit = self.result, self.result["units"]["depth"]
        sides = {}
        if entry["depth"] != r["curve"][0]["depth"]:
            sides[f"{r['curve'][0]['depth']} {unit}"] = r["curve"][0]
        sides |= r.get("baselines") or {}
        mine = read_rows(self.folder / entry["rows"], entry["accuracy"])
        sign = 1 if r["accuracy"].get("larger_is_better", True) else -1
        for name, side in sides.items():
            rows = read_rows(self.folder / side["rows"], entry["accuracy"] | side["accuracy"])
            d = paired_difference({0: mine}, {0: rows})
            verdict = "not distinguishable from it"
            if d.distinguishable:
                verdict = "better" if sign * d.value > 0 else "worse"
            yield f"{entry['depth']} {unit} against {name}: {words.difference(d)}, {verdict}."

    def _cost(self) -> str:
        r, m = self.result, self.result["metrics"]
        parts = []
        if "device_hours" in m:
            parts.append(f"{words.number(m['device_hours'])} device-hours")
        if r.get("gpus"):
            parts.append(f"{words.number(m['gpu_hours'])} GPU-hours")
        training = r.get("training") or {}
        said = f"Cost: {', '.join(parts)} on {device(r)}."
        if training.get("stopped") == "early":
            said += f" Training stopped early, best at epoch {words.number(training['best_epoch'])}."
        if r.get("trained_by"):
            said += f" The model was trained by {r['trained_by']}."
        return said

    def _next(self) -> list[tuple[str, str]]:
        """Commands worth trying after this run, each with a remark."""
        r, example = self.result, self.result["units"]["example"]
        name, said = r["experiment"], r["experiment"]
        if self.folder is not None:
            said = " ".join([name, *overrides(RunFolder(self.folder))])
        depths = [e["depth"] for e in r["curve"]]
        varied = ",".join(map(str, depths if len(depths) > 1 else range(r["train_depth"] + 1)))
        commands = []
        if r["train_depth"] and depths[0] == 0:
            commands.append((f"reason run {said} train_depth=0", "the base: the model without the method"))
        if r["train_depth"]:
            commands.append(
                (f"reason sweep {said} depth={varied} seed=0..2", "three seeds tell luck from gain")
            )
        commands.append((f"reason compare {name}", "its runs side by side"))
        commands.append((f"reason inspect {r['run']}", f"what happened on one {example}"))
        commands.append(("reason ui", "every run in MLflow"))
        width = max(len(command) for command, _ in commands)
        return [(f"{command:<{width}}", remark) for command, remark in commands]


def _interval(record: dict[str, Any]) -> Interval:
    return Interval(record["value"], record["low"], record["high"], record["n"])


def _value(record: dict[str, Any] | None) -> str:
    return f"{record['value']:.4f}" if record else ""


# --- a comparison -------------------------------------------------------------------------------


def comparison(table: Comparison) -> Any:
    """A comparison as a table with its legend."""
    return _ComparisonView(table)


@dataclass
class _ComparisonView:
    table: Comparison

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        t, signs = self.table, _Signs.of(options)
        entries = t.entries
        labels = [
            "" if i and _series(entries[i - 1]) == _series(e) and e.kind != "baseline" else e.label
            for i, e in enumerate(entries)
        ]
        over = f"{t.split} split, {t.n:,} {t.units['example']}s"
        yield _title(f"{t.accuracy} on {t.dataset}, {over}. Depth: {', '.join(t.depth_units)}")
        yield Text()
        columns = [
            _Column("", labels, right=False),
            _Column("depth", [self._depth(e, signs) for e in entries]),
            _Column(f"{t.accuracy} [95%]", [words.interval(e.accuracy) for e in entries]),
            _Column("difference [95%]", [self._difference(e, signs) for e in entries], 1, right=False),
            _Column("seeds", [str(len(e.points)) if e.points else "" for e in entries], 5),
            _Column("p", [words.probability(e.p) for e in entries], 6),
            _Column("validation", [f"{e.valid.value:.4f}" if e.valid else "" for e in entries], 7),
            _Column("p50 ms", [words.number(e.costs.get("latency_p50_ms")) for e in entries], 3),
            _Column("p95 ms", [words.number(e.costs.get("latency_p95_ms")) for e in entries], 9),
            _Column("hours", [words.number(e.costs.get("device_hours")) for e in entries], 4),
            _Column(
                t.units["throughput"], [words.number(e.costs.get("throughput_per_s")) for e in entries], 10
            ),
            _Column("Pareto", [" ".join(_SHORT[c] for c in e.fronts) for e in entries], 8, right=False),
        ]
        if not t.one_device:
            columns.append(
                _Column("device", ["; ".join(sorted({p.device for p in e.points})) for e in entries], 2)
            )
        styles = [
            {"base": "cyan", "baseline": "dim"}.get(e.kind, "bold" if e.chosen else "") for e in entries
        ]
        rules = {i for i in range(len(entries) - 1) if _series(entries[i]) != _series(entries[i + 1])}
        drawn, dropped = _fitted(columns, options.max_width, styles, rules)
        yield drawn
        yield Text()
        for line in self._legend(signs, dropped):
            yield Text(line)

    def _depth(self, e: Entry, signs: _Signs) -> str:
        if e.depth is None:
            return ""
        return f"{signs.chosen} {e.depth}" if e.chosen else str(e.depth)

    def _difference(self, e: Entry, signs: _Signs) -> str:
        if e.difference is None:
            return ""
        mark = signs.unclear
        if e.distinguishable:
            better = (e.difference.value > 0) == self.table.larger_is_better
            mark = signs.better if better else signs.worse
        return f"{words.difference(e.difference)} {mark}"

    def _legend(self, signs: _Signs, dropped: list[str]) -> Iterable[str]:
        t = self.table
        compared = [e for e in t.entries if e.difference is not None]
        if compared:
            references = list(dict.fromkeys(e.reference for e in compared))
            seeds = sorted({e.difference.seeds for e in compared if e.difference})
            over = f"{t.n:,} {t.units['example']}s and {_span(seeds)}"
            yield f"difference: to {' or '.join(references)}, paired over {over}."
            tests = f" after Holm's correction for {len(compared)} tests" if len(compared) > 1 else ""
            yield f"{signs.better} better, {signs.worse} worse, {signs.unclear} not distinguishable at p < 0.05{tests}."
            if seeds == [1]:
                yield "With one seed the intervals speak of examples alone; three seeds tell luck from gain."
        if any(e.chosen for e in t.entries):
            yield f"{signs.chosen} the depth that validation chooses."
        if "hours" not in dropped and any("device_hours" in e.costs for e in t.entries):
            yield "hours: device-hours per run, training included."
        if any(e.fronts for e in t.entries) and "Pareto" not in dropped:
            yield "Pareto: nothing is as accurate in less time per request (ms) or for fewer device-hours (h)."
        if dropped:
            yield f"Not shown for want of room: {', '.join(dropped)}. A wider window or --csv has them."


_SHORT = {"device_hours": "h", "latency_p50_ms": "ms"}


def _span(seeds: list[int]) -> str:
    """[1] -> "1 seed", [1, 3] -> "1 to 3 seeds"."""
    if seeds == [1]:
        return "1 seed"
    return f"{seeds[0]} seeds" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]} seeds"


def _series(e: Entry) -> tuple:
    return (e.kind, e.key.family if e.key else ())
