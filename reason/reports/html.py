"""Figures as one page: a single HTML file that opens offline and needs no script.

Nothing is loaded from anywhere, and the page's own policy forbids it. Colours follow the reader's
light or dark setting; numbers never depend on them. A wide table scrolls in its own box. Pieces of
coloured text and cells carry a class for one of ``STEPS`` shades, so that a page of many thousand
tokens stays light.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from reason.methods.figures import Figure, HeatMap, Lines, Table, Tokens, Tree
from reason.printable import printable
from reason.reports import formatting
from reason.reports.output_path import check_output_path
from reason.reports.svg import chart, key, tree
from reason.tracking.result import Result

STEPS = 33  # shades from dark to light
SUFFIXES = (".html", ".htm")
_ROOM = 100  # characters that a heat map may be wide before it is turned over or its labels stand upright
_LONG = 40  # characters of a label that are shown for certain; a longer one also has a tooltip


def check_page(path: Path) -> None:
    """Refuse, before anything is computed, a path that no page can be written to (``check_output_path``)."""
    check_output_path(path, "page", SUFFIXES)


def about(result: Result, example: str = "") -> dict[str, Any]:
    """What the head of a page says of one example of a run: the keywords of ``page``.

    Args:
        example: its id; '' where the method chose one.
    """
    r, one, a = result, result.units.example, result.accuracy
    who = f"{one} {example}" if example else f"one {one}"
    trained = f"trained at depth {r.train_depth}" if r.train_depth else "the base"
    meaning = formatting.meaning(a.name, one)
    return {
        "title": f"{who[0].upper()}{who[1:]}: {r.method} on {r.dataset}",
        "facts": {
            "run": r.run,
            one: example or "chosen by the method",
            "method": f"{r.method} with {r.backbone}",
            "dataset": r.dataset,
            "depth": f"{r.depth} {r.units.depth}, {trained}",
            "seed": str(r.seed),
            a.name: f"{formatting.interval(a.interval)} over the {a.n:,} {one}s of the {r.split} split",
        },
        "saying": f"{a.name}: {meaning}. Brackets: 95% bootstrap confidence interval." if meaning else "",
    }


def page(figures: Sequence[Figure], *, title: str, facts: Mapping[str, str], saying: str = "") -> str:
    """A whole page: a head, a table of contents where there are more than three figures, a section for each.

    Args:
        facts: what the page is about, by name. saying: a sentence below them.

    The same figures give the same text.
    """
    known = "".join(f"<div><dt>{_text(k)}</dt><dd>{_text(v)}</dd></div>\n" for k, v in facts.items())
    contents = ""
    if len(figures) > 3:
        links = "".join(f'<li><a href="#f{i}">{_text(f.title)}</a></li>\n' for i, f in enumerate(figures, 1))
        contents = f'<nav aria-label="Contents"><ol>\n{links}</ol></nav>\n'
    sections = "".join(_section(f, f"f{i}") for i, f in enumerate(figures, 1))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{_text(title)}</title>
<style>
{_style()}</style>
</head>
<body>
<main>
<header>
<h1>{_text(title)}</h1>
<dl>
{known}</dl>
{_note(saying)}{contents}</header>
{sections}</main>
</body>
</html>
"""


def _section(f: Figure, name: str) -> str:
    drawn = _DRAW[type(f)](f, name)
    return (
        f'<section id="{name}" aria-labelledby="{name}-title">\n<h2 id="{name}-title">{_text(f.title)}</h2>\n'
        f"{drawn}{_note(f.note)}</section>\n"
    )


def _text(text: object) -> str:
    return html.escape(printable(text))


def _note(text: str) -> str:
    return f'<p class="note">{_text(text)}</p>\n' if text else ""


# --- tables -------------------------------------------------------------------------------------


def _grid(columns: Sequence[str], rows: Sequence[Sequence[Any]], name: str) -> str:
    """Rows under column names; the first cell of a row is its head, columns of numbers stand right."""
    if not rows:
        return '<p class="note">no data</p>\n'
    turned = list(zip(*rows, strict=True))
    kinds = [_kind(values) for values in turned]
    head = "".join(f'<th scope="col"{k}>{_text(c)}</th>' for c, k in zip(columns, kinds, strict=True))
    body = []
    for first, *others in zip(*map(_column, turned), strict=True):
        cells = "".join(f"<td{k}>{v}</td>" for v, k in zip(others, kinds[1:], strict=True))
        body.append(f'<tr><th scope="row"{kinds[0]}>{first}</th>{cells}</tr>\n')
    return _box(f"<thead><tr>{head}</tr></thead>\n<tbody>\n{''.join(body)}</tbody>", name)


_NUMBER = re.compile(r"[-+−]?[\d,.]+(e[-+]?\d+)?%?|nan|")


def _kind(values: Sequence[Any]) -> str:
    """The class of a column: numbers, text that needs room, or neither."""
    if all(v is None or isinstance(v, int | float) or _NUMBER.fullmatch(str(v)) for v in values):
        return ' class="n"'
    return ' class="t"' if max(len(formatting.cell(v)) for v in values) > 20 else ""


def _column(values: Sequence[Any]) -> list[str]:
    """Cells below each other: decimals stand under decimals where that keeps every number."""
    known = [v for v in values if isinstance(v, float) and math.isfinite(v)]
    number = _notation(known, 4)
    if any(v and not float(number(v).replace(",", "")) for v in known):
        number = formatting.cell
    return [_text(number(v) if isinstance(v, float) else formatting.cell(v)) for v in values]


def _notation(values: Sequence[float], digits: int) -> Callable[[float], str]:
    """How to write numbers below each other: as many decimals as give the largest about ``digits`` digits."""
    largest = max(map(abs, values), default=0.0)
    if not 1e-4 <= largest < 10.0**digits:
        return lambda v: formatting.number(v, digits)
    places = digits - 1 - math.floor(math.log10(largest))
    return lambda v: f"{v:.{places}f}"


def _box(inner: str, name: str, of: str = "") -> str:
    """A table in a box that scrolls where the window is narrower, with the keyboard too."""
    return (
        f'<div class="box" role="region" tabindex="0" aria-labelledby="{name}-title">'
        f'<table{of} aria-labelledby="{name}-title">\n{inner}\n</table></div>\n'
    )


# --- heat maps ----------------------------------------------------------------------------------


def _heat_map(f: HeatMap, name: str) -> str:
    """A table of shades with the numbers in them; turned over where it is wide and low."""
    rows, columns, values = f.rows, f.columns, f.values
    if not rows or not columns:
        return '<p class="note">no data</p>\n'
    if _width(rows, columns) > _ROOM and len(rows) < len(columns):
        rows, columns = columns, rows
        values = [list(column) for column in zip(*values, strict=True)]
    known = [v for row in values for v in row if _finite(v)]
    low, high = (min(known), max(known)) if known else (0.0, 0.0)
    steep = _width(rows, columns) > _ROOM
    head = "".join(f'<th scope="col">{_label(c, 20 if steep else _LONG)}</th>' for c in columns)
    number, kind = _notation(known, 3), _kind(rows)
    body = []
    for label, row in zip(rows, values, strict=True):
        shades = [f' class="h{_shade(v, low, high)}"' if _finite(v) else "" for v in row]
        shown = [number(v) if _finite(v) else formatting.cell(v) for v in row]
        cells = "".join(f"<td{shade}>{v}</td>" for shade, v in zip(shades, shown, strict=True))
        body.append(f'<tr><th scope="row"{kind}>{_label(label, _LONG)}</th>{cells}</tr>\n')
    inner = f"<thead><tr><td></td>{head}</tr></thead>\n<tbody>\n{''.join(body)}</tbody>"
    return _scale(number(low), number(high)) + _box(inner, name, f' class="heat{" steep" * steep}"')


def _width(rows: Sequence[str], columns: Sequence[str]) -> int:
    """Characters, where labels are folded in two."""
    return min(_LONG, max(map(len, rows))) + sum(max(8, len(c) // 2 + 3) for c in columns)


def _label(text: str, room: int) -> str:
    """A label that may be cut short, and then has a tooltip."""
    whole = f' title="{_text(text)}"' if len(text) > room else ""
    return f"<span{whole}>{_text(text)}</span>"


# --- coloured text ------------------------------------------------------------------------------


def _tokens(f: Tokens, name: str) -> str:
    """Text on shades. Neighbours of one value share an element: its tooltip says the number."""

    def look(pair: tuple[str, float]) -> tuple[str, str]:
        if not _finite(pair[1]):
            return "none", formatting.cell(pair[1])
        return f"h{_shade(pair[1], f.low, f.high)}", formatting.tick(pair[1])

    runs = groupby(zip(f.tokens, f.values, strict=True), look)
    pieces = [  # the shortest element and no quotes: there may be tens of thousands
        f"<i class={shade} title={shown or 'none'}>{_text(''.join(token for token, _ in run))}</i>"
        for (shade, shown), run in runs
    ]
    scale = _scale(formatting.tick(f.low), formatting.tick(f.high), f.legend)
    return f'{scale}<div class="tokens" dir="auto">{"".join(pieces)}</div>\n'


def _scale(low: str, high: str, legend: str = "") -> str:
    """What the shades mean."""
    said = f" {_text(legend)}" if legend else ""
    return f'<p class="scale"><span>{low}</span><span class="bar"></span><span>{high}</span>{said}</p>\n'


def _finite(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def _shade(value: float, low: float, high: float) -> int:
    share = (value - low) / ((high - low) or 1)
    return round(min(1.0, max(0.0, share)) * (STEPS - 1))


# --- curves -------------------------------------------------------------------------------------


def _lines(f: Lines, name: str) -> str:
    """A chart with its legend, and its numbers in a table to unfold."""
    names, drawing = list(f.series), chart(f.x, list(f.series.values()))
    if not drawing:
        return '<p class="note">no data</p>\n'
    told = f"{f.title}: {', '.join(names)}. The table below lists the values."
    legend = "".join(f"<li>{key(i)}{_text(n)}</li>\n" for i, n in enumerate(names))
    xs = [int(x) if float(x).is_integer() else x for x in f.x]  # whole numbers without decimals
    rows = list(zip(xs, *f.series.values(), strict=True))
    return (
        f'<div class="chart">\n<p class="axis">{_text(f.y_label)}</p>\n'
        f'<div role="img" aria-label="{_text(told)}">{drawing}</div>\n<p class="axis x">{_text(f.x_label)}</p>\n'
        f'<ul class="legend">\n{legend}</ul>\n</div>\n'
        f"<details><summary>Values</summary>\n{_grid([f.x_label or 'x', *names], rows, name)}</details>\n"
    )


# --- trees --------------------------------------------------------------------------------------


def _tree(f: Tree, name: str) -> str:
    """A drawing in a box that scrolls, what its shades mean, and its nodes in a table to unfold."""
    if not f.parents:
        return '<p class="note">no data</p>\n'
    drawing = tree(f, lambda value: _shade(value, f.low, f.high), _text)
    told = f"{f.title}: a tree of {len(f.parents)} nodes. The table below lists them."
    rows = [
        [node, parent if parent >= 0 else None, *rest]
        for node, (parent, *rest) in enumerate(
            zip(f.parents, f.labels, f.values, f.counts, f.marks, strict=True)
        )
    ]
    columns = ["node", "parent", "label", f.legend or "value", "descendants", "mark"]
    scale = _scale(formatting.tick(f.low), formatting.tick(f.high), f.legend)
    return (
        f"{scale if any(v is not None for v in f.values) else ''}"
        f'<div class="box tree" role="img" tabindex="0" aria-label="{_text(told)}">{drawing}</div>\n'
        f"<details><summary>Nodes</summary>\n{_grid(columns, rows, name)}</details>\n"
    )


_DRAW: dict[type, Any] = {
    Table: lambda f, name: _grid(f.columns, f.rows, name),
    Lines: _lines,
    HeatMap: _heat_map,
    Tokens: _tokens,
    Tree: _tree,
}


# --- the look of it -----------------------------------------------------------------------------


def _style() -> str:
    """The look, a class for each shade, and the bar that shows them all."""
    shades = [formatting.shade(i / (STEPS - 1)) for i in range(STEPS)]
    classes = "".join(
        f".h{i}{{background:{back};color:{ink};fill:{back}}}\n" for i, (back, ink) in enumerate(shades)
    )
    return f"{_LOOK}{classes}.bar{{background:linear-gradient(90deg,{shades[0][0]},{shades[-1][0]})}}\n"


_LOOK = """\
:root{--ink:#1c2127;--soft:#57606a;--paper:#fff;--line:#d5dae0;--band:#f5f7f9;--link:#0b5cad;
--c0:#0072b2;--c1:#c24e00;--c2:#007a59;--c3:#b0568a;--c4:#946200;--c5:#5a6068}
@media (prefers-color-scheme:dark){:root{--ink:#e3e7eb;--soft:#a0aab4;--paper:#15181d;--line:#343b44;--band:#1d2229;
--link:#7cb8ff;--c0:#6fb7f0;--c1:#ff9557;--c2:#3ccb9f;--c3:#e5a3cb;--c4:#e6b84a;--c5:#b8bec6}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:72rem;margin:auto;padding:1.5rem 1rem 3rem}
h1,h2,dd,p,li,th,td{overflow-wrap:break-word}
h1{font-size:1.6rem;line-height:1.25;margin:0 0 1rem}
h2{font-size:1.15rem;line-height:1.35;margin:0 0 .75rem}
section{margin-top:2rem;padding-top:1.5rem;border-top:1px solid var(--line)}
a{color:var(--link)}
dl{display:flex;flex-wrap:wrap;gap:.6rem 2rem;margin:0}
dt,.note,.axis,.scale,summary{color:var(--soft);font-size:.875rem}
dl div,dd{min-width:0}
dd{margin:0}
.note{max-width:48rem;margin:.75rem 0 0}
nav ol{margin:1rem 0 0;padding-left:1.5rem}
nav li{padding:.15rem 0}
.box{overflow-x:auto;background:linear-gradient(270deg,var(--paper) 50%,transparent) 100% 0/4rem 100% no-repeat local,
linear-gradient(270deg,var(--line),transparent) 100% 0/1rem 100% no-repeat}
:focus-visible{outline:2px solid var(--link);outline-offset:2px}
table{border-collapse:separate;border-spacing:0;font-size:.9rem;line-height:1.4}
th,td{padding:.35rem .75rem;text-align:left;vertical-align:top;max-width:28rem;white-space:nowrap;border-bottom:1px solid var(--line)}
th{font-weight:600;background:var(--paper)}
thead th{vertical-align:bottom;white-space:normal}
tbody th{position:sticky;left:0;font-weight:400;max-width:min(20rem,40vw)}
tbody tr:hover>*{background-color:var(--band)}
tbody th,thead :first-child{padding-left:.25rem}
.n,.heat td{text-align:right;font-variant-numeric:tabular-nums}
.t{min-width:9rem;white-space:normal}
.heat td,.heat th{padding:.25rem .5rem;border-color:transparent;vertical-align:middle}
.heat td{border-left:1px solid var(--paper);border-bottom:1px solid var(--paper)}
.heat th span{display:-webkit-box;-webkit-box-orient:vertical;-webkit-line-clamp:2;overflow:hidden}
.heat thead span{-webkit-line-clamp:4}
.heat thead th{text-align:right;max-width:8rem;vertical-align:bottom;font-weight:400}
.steep thead th{text-align:left;padding-bottom:.5rem}
.steep thead span{display:block;writing-mode:vertical-rl;transform:rotate(180deg);max-height:12rem;margin-left:auto;white-space:nowrap;text-overflow:ellipsis}
.scale{display:flex;flex-wrap:wrap;align-items:center;gap:.5rem;margin:0 0 .75rem;font-variant-numeric:tabular-nums}
.bar{width:8rem;height:.8rem}
.tokens{white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.7;max-width:60rem}
.tokens i{font-style:normal;padding:.1em 0}
.chart{max-width:44rem}
.axis{margin:0}
.x{text-align:center}
svg{display:block;fill:none;stroke-linecap:round;stroke-linejoin:round}
svg:not([width]){width:100%;height:auto}
svg text{fill:var(--soft);font-size:14px}
.tree text{font-size:12px}.tree .label{fill:var(--ink)}.tree .label.gone{fill:var(--soft)}.tree .sign{font-size:11px}
.branch{stroke:var(--soft)}.branch.gone{stroke:var(--line)}
.w1{stroke-width:1.5}.w2{stroke-width:2.5}.w3{stroke-width:3.5}.w4{stroke-width:4.5}.w5{stroke-width:6}
.dot{stroke:var(--soft);stroke-width:1}
svg .rule{stroke:var(--line)}
.curve{stroke-width:2.2}.fine{stroke-width:1.2}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.25rem 1.25rem;margin:.5rem 0 .75rem;padding:0;font-size:.9rem}
.legend li{display:flex;align-items:center;gap:.4rem;min-width:0}
.legend svg{flex:none;width:2rem}
.s0{--c:var(--c0)}.s1{--c:var(--c1)}.s2{--c:var(--c2)}.s3{--c:var(--c3)}.s4{--c:var(--c4)}.s5{--c:var(--c5)}
.curve{stroke:var(--c)}.mark{fill:var(--c)}.d1{stroke-dasharray:7 6}.d2{stroke-dasharray:1 6}
summary{cursor:pointer;padding:.25rem 0}
@media (max-width:40rem){h1{font-size:1.3rem}svg:not([width]) text{font-size:20px}.curve{stroke-width:3}.fine{stroke-width:1.8}
th,td{padding:.35rem .5rem}.t{min-width:7rem}}
@media print{
:root{--ink:#000;--soft:#444;--paper:#fff;--line:#bbb;--band:#fff;--link:#000;
--c0:#0072b2;--c1:#c24e00;--c2:#007a59;--c3:#b0568a;--c4:#946200;--c5:#5a6068}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}
main{max-width:none;padding:0}nav{display:none}.box{overflow:visible}tbody th{position:static}
h2,.chart,tr,.scale{break-inside:avoid}h2{break-after:avoid}thead{display:table-header-group}
.heat th span{-webkit-line-clamp:none}table{font-size:.75rem}}
"""
