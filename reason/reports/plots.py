"""Pictures: comparisons in panels, and the figures that methods return.

matplotlib is imported when something is drawn, and drawn without a display. Colours are Okabe and
Ito's (wine for their yellow, too pale for a line), told apart by every kind of eye; shape and line
tell the same a second time.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reason.errors import ConfigError
from reason.methods.figures import Figure, HeatMap, Lines, Table, Tokens, Tree, safe
from reason.reports import formatting
from reason.reports.comparison import BASE, BOUND, KINDS, METHOD, RIVAL, TIMES, varies
from reason.reports.output_path import check_output_path
from reason.reports.svg import clipped, places

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Picture

    from reason.metrics.statistics import Interval
    from reason.reports.comparison import Comparison, Entry

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255")
MARKERS = "osD^vPX"
INK, GREY = "#222222", "#777777"
FORMATS = (".png", ".pdf", ".svg")
_STYLE = {
    "figure.dpi": 150,
    "savefig.dpi": 150,
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.hashsalt": "reason",  # the same picture gives the same file
    "text.parse_math": False,  # a dollar sign in a name is one
}


def check_picture(path: Path) -> None:
    """Refuse, before anything is computed, a path that no picture can be written to (``check_output_path``)."""
    check_output_path(path, "image", FORMATS)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(picture: Picture, path: Path) -> None:
    check_picture(path)
    kind = path.suffix.lower()[1:]
    undated = {"png": None, "pdf": {"CreationDate": None}, "svg": {"Date": None}}[kind]
    with warnings.catch_warnings():  # a title in a script that the font lacks is drawn as boxes
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        picture.savefig(path, format=kind, metadata=undated)
    _pyplot().close(picture)


# --- comparisons --------------------------------------------------------------------------------


def draw_comparisons(tables: Sequence[Comparison], path: Path) -> list[Path]:
    """One picture per comparison (``draw_each``)."""
    return draw_each(tables, path, draw_comparison)


def draw_each(found: Sequence[Any], path: Path, draw: Callable[[Any, Path], None]) -> list[Path]:
    """A picture of each: ``path``, and for further ones ``name-2.png``, ``name-3.png`` ..."""
    paths = [path if i == 0 else path.with_stem(f"{path.stem}-{i + 1}") for i in range(len(found))]
    for one, where in zip(found, paths, strict=True):
        draw(one, where)
    return paths


def handles(axes: Iterable[Axes]) -> dict[str, Any]:
    """What a common legend shows: the first handle of every label."""
    drawn: dict[str, Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            drawn.setdefault(label, handle)
    return drawn


@dataclass(frozen=True)
class _Curve:
    """Entries of one family, by depth, and how they are drawn."""

    label: str
    entries: list[Entry]
    sign: tuple[str, str]  # colour and marker
    kind: str
    variant: bool = False  # dashed, in the colour of the rival that it is a variant of


def draw_comparison(table: Comparison, path: Path) -> None:
    """Accuracy against depth, against what was spent on an example (tokens and FLOPs where depth changes them, latency),
    and against device-hours, with 95% intervals.

    The base is a line with a band over depth and a point over the costs; trivial baselines, which
    cost next to nothing, are lines. The Pareto front joins what no other point beats.
    """
    plt = _pyplot()
    curves = _curves(table)
    costs = [*table.spent, *TIMES]
    with plt.rc_context(_STYLE):
        # Panels by rows of three, four of them by two; the legend stands in a place that stays empty, else below.
        rows, columns = 1 if len(costs) < 3 else 2, 2 if len(costs) == 3 else 3
        size = (12.5 if columns == 3 else 10.5, 4.4 if rows == 1 else 7.6)
        picture, axes = plt.subplots(
            rows, columns, figsize=size, sharey=True, layout="constrained", squeeze=False
        )
        panels = list(axes.flat)
        _against_depth(panels[0], table, curves)
        for ax, cost in zip(panels[1:], costs, strict=False):
            _against_cost(ax, table, curves, cost)
        for ax in axes[:, 0]:
            ax.set_ylabel(table.accuracy)
        seeds = sorted({len(e.points) for e in table.entries if e.points})
        over = " to ".join(map(str, dict.fromkeys((seeds[0], seeds[-1]))))
        headline(picture, table, f", {over} seed{'s' * (seeds[-1] > 1)}")
        drawn = handles(panels)
        rank = {table.short(e): KINDS.index(e.kind) for e in table.entries}
        labels = sorted(drawn, key=lambda label: rank.get(label, len(KINDS)))
        found, look = [drawn[label] for label in labels], {"handlelength": 2.4, "columnspacing": 1.8}
        for ax in (empty := panels[1 + len(costs) :]):
            ax.axis("off")
        if empty and len(labels) <= 18 and max(map(len, labels), default=0) <= 40:
            empty[0].legend(found, labels, loc="upper left", **look)
        else:
            ncols = _columns(labels, size[0])
            lines = math.ceil(len(labels) / ncols)
            picture.set_size_inches(
                size[0], size[1] + 0.21 * max(0, lines - 3)
            )  # the panels keep their height
            picture.legend(found, labels, loc="outside lower center", ncols=ncols, **look)
        _save(picture, path)


def headline(picture: Picture, table: Comparison, over: str = "") -> None:
    """Say above a picture which accuracy it shows, and of what; ``over`` follows the number of examples."""
    said = f"{table.split} split, {table.n:,} {table.units.example}s{over}, 95% confidence intervals"
    title = f"{table.accuracy} on {table.dataset}: {said}"
    picture.suptitle(title, x=0.01, ha="left", fontsize=12, color=INK)


def _curves(table: Comparison) -> list[_Curve]:
    """The curves of methods, of their rivals, and of bounds."""
    families: dict[tuple, list[Entry]] = {}
    for entry in table.entries:
        if entry.kind in (METHOD, RIVAL, BOUND) and entry.key:
            families.setdefault(entry.key.family, []).append(entry)
    looks: dict[tuple, tuple[str, str]] = {}
    curves = []
    for family, entries in families.items():
        first, of = entries[0], (*family[:-1], entries[0].variant_of)
        variant = bool(first.variant_of) and of in looks
        sign = (GREY, "") if first.kind == BOUND else looks[of] if variant else _look(len(looks))
        if first.kind != BOUND and not variant:
            looks[family] = sign
        by_depth = sorted(entries, key=lambda e: e.depth or 0)
        curves.append(_Curve(table.short(first), by_depth, sign, first.kind, variant))
    return curves


def _look(i: int) -> tuple[str, str]:
    """Colour and marker of the i-th curve."""
    return COLOURS[i % len(COLOURS)], MARKERS[(i + i // len(COLOURS)) % len(MARKERS)]


def _columns(labels: Sequence[str], width: float) -> int:
    """Of a legend in a picture of ``width`` inches, with room for the longest label in each."""
    widest = 0.75 + 0.085 * max(map(len, labels), default=0)  # inches: the handle, and letters
    return max(1, min(7, len(labels), int((width - 0.5) / widest)))


def points(ax: Axes, x: list[float], found: list[Interval], sign: tuple[str, str], **look: Any) -> None:
    """Values with their error bars; ``sign`` is their colour and marker."""
    bars = [[max(0.0, a.value - a.low) for a in found], [max(0.0, a.high - a.value) for a in found]]
    look |= {"color": sign[0], "marker": sign[1], "capsize": 2.5}
    ax.errorbar(x, [a.value for a in found], yerr=bars, **look)


def level(ax: Axes, e: Entry, i: int, alpha: float, **look: Any) -> None:
    """A horizontal line with its band, unless that is to be clear: the i-th base, or the i-th trivial baseline."""
    color, styles = (INK, ("--", (0, (5, 1, 1, 1)))) if e.kind == "base" else (GREY, (":", "-."))
    ax.axhline(e.accuracy.value, color=color, linestyle=styles[i % 2], label=e.label, zorder=1, **look)
    if alpha:
        ax.axhspan(e.accuracy.low, e.accuracy.high, color=color, alpha=alpha, linewidth=0, zorder=0)


def _levels(ax: Axes, table: Comparison, bases: bool, many: bool) -> None:
    """Horizontal lines: trivial baselines, and over depth the base with its band. Among many curves lines alone."""
    for i, e in enumerate(e for e in table.entries if e.kind == "baseline"):
        level(ax, e, i, 0.0 if many else 0.10, linewidth=1.4)
    for i, e in enumerate(e for e in table.entries if e.kind == "base" and bases):
        # the star is never on this line; it is in the legend for the panels of cost
        level(ax, e, i, 0.08, linewidth=1.4, marker="*", markersize=10, markevery=[])


def _drawn(ax: Axes, curve: _Curve, x: list[float], many: bool, **look: Any) -> None:
    """The line of a curve with its points. Of many curves the rivals are thin, and their intervals pale."""
    found = [e.accuracy for e in curve.entries]
    if curve.kind == BOUND:
        ax.plot(x, [a.value for a in found], color=GREY, linewidth=1.0, linestyle="--", zorder=1, **look)
        return
    thin = many and curve.kind == RIVAL
    look = {
        "linewidth": 1.2 if thin else 1.8,
        "markersize": 4 if thin else 5.5,
        "zorder": 2 if thin else 3,
    } | look
    if curve.variant:
        look = {"linestyle": (0, (4, 2)), "markerfacecolor": "white"} | look
    if not thin:
        points(ax, x, found, curve.sign, **look)
        return
    points(ax, x, found, curve.sign, linestyle="none", alpha=0.25, markersize=0, zorder=1)
    ax.plot(x, [a.value for a in found], color=curve.sign[0], marker=curve.sign[1], **look)


MANY = 4  # curves


def _against_depth(ax: Axes, table: Comparison, curves: list[_Curve]) -> None:
    from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, ScalarFormatter

    many = len(curves) > MANY
    _levels(ax, table, bases=True, many=many)
    depths = sorted({e.depth or 0 for curve in curves for e in curve.entries})
    doubling = len(depths) > 1 and depths[0] > 0 and depths[-1] >= 8 * depths[0]
    for i, curve in enumerate(curves):
        # So that bars do not hide each other.
        shift = (
            min(0.07, (0.2 if many else 0.4) / len(curves))
            * (i - (len(curves) - 1) / 2)
            * (curve.kind != BOUND)
        )
        x = [d * 2**shift if doubling else d + shift for d in (e.depth or 0 for e in curve.entries)]
        _drawn(ax, curve, x, many, label=curve.label)
        for at, e in zip(x, curve.entries, strict=True):
            if curve.kind == METHOD:
                ring(ax, at, e)
    if doubling:
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_locator(
            FixedLocator(depths if len(depths) < 9 else depths[:: len(depths) // 8 + 1])
        )
        ax.xaxis.set_major_formatter(ScalarFormatter())
        ax.xaxis.set_minor_locator(NullLocator())
    else:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    ax.set_xlabel(f"depth ({', '.join(table.depth_units)})")
    ax.set_title("against depth")
    ax.margins(x=0.08)


def ring(ax: Axes, x: float, e: Entry) -> None:
    """Circle the depth that validation chooses."""
    if e.chosen:
        ax.plot(
            x, e.accuracy.value, "o", markersize=14, markerfacecolor="none", markeredgecolor=INK, linestyle="none",
            label="chosen on validation", zorder=5,
        )  # fmt: skip


_PANELS = {  # cost -> title, and the words at its axis
    "tokens_per_example": ("against tokens", "tokens per {example}"),
    "flops_per_example": ("against FLOPs", "MFLOP per {example}"),
    "latency_p50_ms": ("against latency", "p50 latency of {latency} (ms)"),
    "device_hours": ("against device-hours", "device-hours per run, training included"),
}


def _against_cost(ax: Axes, table: Comparison, curves: list[_Curve], cost: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    many, unit = len(curves) > MANY, 1e6 if cost == "flops_per_example" else 1.0
    _levels(ax, table, bases=False, many=many)
    bases = [_Curve("", [e], (INK, "*"), BASE) for e in table.entries if e.kind == BASE]
    shown = [
        replace(curve, entries=[e for e in curve.entries if cost in e.costs]) for curve in (*curves, *bases)
    ]
    shown = [curve for curve in shown if curve.entries]
    title, label = _PANELS[cost]
    ax.set_title(title)
    ax.set_xlabel(label.format(example=table.units.example, latency=table.units.latency))
    ax.tick_params(labelbottom=True)
    known = [e for curve in shown for e in curve.entries]
    if not known:
        ax.text(0.5, 0.5, "not measured", transform=ax.transAxes, ha="center", color=GREY)
        ax.set_xticks([])
        return
    at = {key: x / unit for key, x in _set_apart([curve.entries for curve in shown], cost).items()}
    for curve in shown:
        x = [at[id(e)] for e in curve.entries]
        if curve.kind in (RIVAL, BOUND) and many:
            _drawn(ax, curve, x, many)
            continue
        joined = many and varies([e.costs[cost] for e in curve.entries])
        style = {"markersize": 10 if curve.kind == BASE else 9, "linestyle": "-" if joined else "none"}
        _drawn(ax, curve, x, many, linewidth=1.3, **({} if curve.kind == BOUND else style))
        for e in curve.entries:
            ring(ax, at[id(e)], e)
            if curve.kind in (METHOD, RIVAL):
                ax.text(
                    at[id(e)], e.accuracy.value, str(e.depth), ha="center", va="center_baseline",
                    fontsize=7, fontweight="bold", color="white", zorder=6,
                )  # fmt: skip
    front = sorted((e for e in known if cost in e.fronts), key=lambda e: e.costs[cost])
    if len(front) > 1:
        ax.step(
            [at[id(e)] for e in front], [e.accuracy.value for e in front], where="post",
            color="#bdbdbd", linewidth=3.5, solid_capstyle="round", label="Pareto front", zorder=1,
        )  # fmt: skip
    values = [e.costs[cost] for e in known]
    if min(values) > 0 and max(values) / min(values) > 8:
        ax.set_xscale("log")
        few = max(values) / min(values) > 100
        ax.xaxis.set_major_locator(LogLocator(subs=(1,) if few else (1, 2, 5)))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: formatting.tick(value)))
        ax.xaxis.set_minor_locator(NullLocator())
    else:
        ax.xaxis.set_major_locator(MaxNLocator(6))
    ax.margins(x=0.14)


def _set_apart(families: list[list[Entry]], cost: str) -> dict[int, float]:
    """Where each entry stands on the axis of a cost, by id.

    Depths of one training cost the same hours; they are set a little apart in the order of depth,
    or one would hide the other.
    """
    values = [e.costs[cost] for entries in families for e in entries]
    span = (max(values) - min(values) or 0.1 * max(values)) if values else 0.0
    at = {}
    for entries in families:
        own = [e.costs[cost] for e in entries]
        alike = len(own) > 1 and max(own) - min(own) < 0.03 * span
        for place, e in enumerate(entries):
            aside = 0.035 * span * (place - (len(own) - 1) / 2) if alike else 0.0
            at[id(e)] = e.costs[cost] + aside
    return at


# --- figures ------------------------------------------------------------------------------------


def draw_figures(figures: Sequence[Figure], path: Path) -> None:
    """All figures below each other in one picture, each as tall as it needs.

    Raises:
        ConfigError: no figure, or a path that no picture can be written to.
    """
    if not figures:
        raise ConfigError("There is nothing to plot.")
    check_picture(path)
    plt = _pyplot()
    figures = [safe(f) for f in figures]
    heights = [_height(f) for f in figures]
    with plt.rc_context(_STYLE):
        picture = plt.figure(figsize=(9, sum(heights)), layout="constrained")
        parts = picture.subfigures(len(figures), 1, height_ratios=heights, squeeze=False)[:, 0]
        for part, f in zip(parts, figures, strict=True):
            ax = part.subplots()
            _DRAW[type(f)](ax, f)
            ax.set_title(f.title, fontweight="bold", pad=10)
            if f.note:
                part.supxlabel(f.note, fontsize=8.5, color=GREY, x=0.02, ha="left", wrap=True)
        _save(picture, path)


def _height(f: Figure) -> float:
    """Inches."""
    if isinstance(f, Table):
        return 0.9 + 0.27 * (len(f.rows) + 1)
    if isinstance(f, HeatMap):
        return 1.5 + 0.32 * len(f.rows) + 0.07 * max((len(c) for c in f.columns), default=0)
    if isinstance(f, Tokens):
        return 1.2 + 0.34 * len(_token_lines(f))
    if isinstance(f, Tree):
        return 0.9 + 0.3 * (max((row for _, row in places(f)), default=0) + 1)
    return 3.4


def _draw_table(ax: Axes, f: Table) -> None:
    from matplotlib.transforms import Bbox

    ax.axis("off")
    if not f.rows:
        ax.text(0, 0.5, "no rows", color=GREY)
        return
    cells = [[formatting.cell(v) for v in row] for row in f.rows]
    widths = [max(len(str(name)), *(len(row[i]) for row in cells)) + 2 for i, name in enumerate(f.columns)]
    total = sum(widths)
    drawn = ax.table(
        cellText=cells, colLabels=[str(c) for c in f.columns], loc="upper left", cellLoc="left", colLoc="left",
        colWidths=[w / max(total, 60) for w in widths], edges="horizontal", bbox=Bbox.from_bounds(0, 0, min(1, total / 60), 1),
    )  # fmt: skip
    drawn.auto_set_font_size(False)
    drawn.set_fontsize(9 if total < 100 else 9 * 100 / total)
    for (row, _), cell in drawn.get_celld().items():
        cell.set_edgecolor("#cccccc")
        if row == 0:
            cell.get_text().set_fontweight("bold")


def _draw_lines(ax: Axes, f: Lines) -> None:
    for i, (name, ys) in enumerate(f.series.items()):
        y = [float("nan") if v is None else v for v in ys]
        color, marker = _look(i)
        ax.plot(f.x, y, label=name, linewidth=1.6, markersize=4.5, color=color, marker=marker)
    ax.set_xlabel(f.x_label)
    ax.set_ylabel(f.y_label)
    if f.x and all(float(x).is_integer() for x in f.x) and max(f.x) - min(f.x) <= 20:
        from matplotlib.ticker import MaxNLocator

        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if len(f.series) > 1:
        ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def _draw_heat_map(ax: Axes, f: HeatMap) -> None:
    import numpy as np

    values = np.asarray(f.values, dtype=float).reshape(len(f.rows), len(f.columns))
    image = ax.imshow(values, aspect="auto", cmap="cividis")
    ax.grid(False)
    ax.set_yticks(range(len(f.rows)), f.rows)
    steep = sum(len(c) + 2 for c in f.columns) > 90
    ax.set_xticks(
        range(len(f.columns)), f.columns, rotation=90 if steep else 0, fontsize=8 if steep else None
    )
    ax.get_figure().colorbar(image, ax=ax, pad=0.01)  # pyright: ignore[reportOptionalMemberAccess]
    if values.size and len(f.columns) <= 14:
        middle = (np.nanmin(values) + np.nanmax(values)) / 2
        for r, c in np.ndindex(*values.shape):
            ink = "white" if values[r, c] < middle else "black"
            shown = formatting.number(float(values[r, c]), 2)
            ax.text(c, r, shown, ha="center", va="center", fontsize=8, color=ink)


def _draw_tokens(ax: Axes, f: Tokens) -> None:
    import matplotlib
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle

    lines = _token_lines(f)
    ax.axis("off")
    ax.set_xlim(0, _TOKEN_WIDTH)
    ax.set_ylim(len(lines), 0)
    norm, shades = Normalize(f.low, f.high), matplotlib.colormaps["cividis"]
    for r, line in enumerate(lines):
        at = 0
        for token, value in line:
            share = float(norm(min(max(value, f.low), f.high)))
            ax.add_patch(Rectangle((at, r + 0.08), len(token), 0.84, color=shades(share), linewidth=0))
            ax.text(
                at + len(token) / 2, r + 0.5, token, family="monospace", fontsize=8.5,
                ha="center", va="center", color="white" if share < 0.5 else "black",
            )  # fmt: skip
            at += len(token)
    bar = ax.get_figure().colorbar(ScalarMappable(norm, shades), ax=ax, pad=0.01)  # pyright: ignore
    bar.set_label(f.legend)


_TOKEN_WIDTH = 92  # characters in a line of the picture


def _token_lines(f: Tokens) -> list[list[tuple[str, float]]]:
    """Pieces cut into lines that fit; line breaks within a piece are shown as a return sign."""
    lines: list[list[tuple[str, float]]] = [[]]
    at = 0
    for token, value in zip(f.tokens, f.values, strict=True):
        shown = token.replace("\n", "⏎").replace("\t", " ")[:_TOKEN_WIDTH]
        if at + len(shown) > _TOKEN_WIDTH:
            lines.append([])
            at = 0
        lines[-1].append((shown, value))
        at += len(shown)
    return lines


def _draw_tree(ax: Axes, f: Tree) -> None:
    import matplotlib
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    ax.axis("off")
    at, most = places(f), max(f.counts, default=0)
    if not at:
        return
    columns, rows = (max(axis) + 1 for axis in zip(*at, strict=True))
    letters = max(6, 120 // (columns + 1))
    ax.set_xlim(0, columns + 1)
    ax.set_ylim(rows, 0)
    norm, shades, parents = Normalize(f.low, f.high), matplotlib.colormaps["cividis"], set(f.parents)
    for node, (column, row) in enumerate(at):
        x, y, count = column + 1, row + 0.6, f.counts[node]
        above = at[f.parents[node]][1] + 0.6 if f.parents[node] >= 0 else y
        width, ink = (0.7 + 2.5 * (count / most) ** 0.5, "#777777") if count else (0.7, "#cccccc")
        ax.plot(
            [column, column, x], [above, y, y], color=ink, linewidth=width, zorder=1 + bool(count),
            solid_joinstyle="round",
        )  # fmt: skip
        value, text = f.values[node], "black" if count else GREY
        face = "white" if value is None else shades(norm(value))
        ax.plot(x, y, "o", markersize=4.5, color=face, markeredgecolor=GREY, markeredgewidth=0.5, zorder=3)
        label = clipped(f.labels[node], letters).replace("$", r"\$")
        ax.text(x - 0.06, y - 0.08, label, fontsize=6.5, ha="right", va="bottom", color=text)
        if mark := f.marks[node]:
            inner = node in parents
            ax.text(
                x - 0.06 if inner else x + 0.06, y + 0.08 if inner else y, mark.replace("$", r"\$"), fontsize=6,
                color=GREY, ha="right" if inner else "left", va="top" if inner else "center",
            )  # fmt: skip
    if any(value is not None for value in f.values):
        bar = ax.get_figure().colorbar(  # pyright: ignore
            ScalarMappable(norm, shades),
            ax=ax,
            pad=0.01,
            aspect=15,
            shrink=min(1.0, 12 / rows),
            anchor=(0.0, 1.0),
        )
        bar.set_label(f.legend)


_DRAW: dict[type, Any] = {
    Table: _draw_table,
    Lines: _draw_lines,
    HeatMap: _draw_heat_map,
    Tokens: _draw_tokens,
    Tree: _draw_tree,
}
