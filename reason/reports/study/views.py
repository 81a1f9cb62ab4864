"""A study drawn: in a terminal, where the least important columns go first, and as markdown, whole."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from reason.reports.study import SECTIONS, Study
from reason.reports.study.sheets import UNICODE, Sheet, section
from reason.reports.summaries import _fitted, _Signs, heading
from reason.reports.terminal import title

HEADINGS = {
    "answer": "Is it worth it?",
    "triangle": "Training depth and evaluation depth",
    "cohorts": "Who benefits?",
    "oracle": "Oracle: the best depth for each example, and how much of it is luck",
    "policies": "Adaptive depth: policies",
    "deep": "Deep reasoning for a share of the requests",
}

# --- the terminal ---------------------------------------------------------------------------------


@dataclass
class StudyView:
    """All sections of a study, drawn with rich."""

    study: Study

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        signs = UNICODE if not options.ascii_only else _Signs.of(options)
        yield heading(self.study.evidence.table)
        for name in SECTIONS if self.study.evidence.models else ["answer"]:
            sheets, remarks = section(self.study, name, signs, options.max_width)
            yield Text()
            yield Text(HEADINGS[name], style="bold underline")
            for sheet in sheets:
                yield Text()
                if sheet.title:
                    yield title(sheet.title)
                styles = sheet.styles or [""] * sheet.height
                drawn, dropped = _fitted(sheet.columns, options.max_width, styles, sheet.rules)
                yield drawn
                yield from map(Text, sheet.notes)
                if dropped:
                    omitted = ", ".join(dict.fromkeys(dropped))
                    yield Text(f"Columns omitted to fit the window: {omitted}.", style="dim")
            if remarks:
                yield Text()
            yield from map(Text, remarks)


# --- markdown -------------------------------------------------------------------------------------


def markdown(study: Study, name: str) -> str:
    """One section as markdown: the same tables and remarks, whole."""
    sheets, remarks = section(study, name)
    parts = [_markdown(sheet) for sheet in sheets]
    if remarks:
        parts.append("\n".join(f"- {_escaped(r)}" for r in remarks) + "\n")
    return "\n".join(parts)


def _markdown(sheet: Sheet) -> str:
    columns = [c for c in sheet.columns if any(c.cells)]
    lines = [f"**{_escaped(sheet.title)}**\n"] if sheet.title else []
    lines.append("| " + " | ".join(_escaped(c.head) for c in columns) + " |")
    lines.append("| " + " | ".join("---:" if c.right else "---" for c in columns) + " |")
    for i in range(sheet.height):
        lines.append("| " + " | ".join(_escaped(c.cells[i]) for c in columns) + " |")
    lines += ["", *(_escaped(n) for n in sheet.notes)] if sheet.notes else []
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*")
