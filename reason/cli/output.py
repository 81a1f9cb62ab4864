"""Where words go: answers to stdout, talk to stderr; and the two forms that programs read.

Consoles are made when they are first used, so that importing this costs nothing. Colour follows
the terminal, NO_COLOR and FORCE_COLOR; into a pipe or a file the text is plain and lines are at
most COLUMNS (else 100) wide.
"""

from __future__ import annotations

import csv
import functools
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from reason.printable import json_text, printable

if TYPE_CHECKING:
    from rich.console import Console

PIPE_WIDTH = 100


@functools.cache
def _console(stderr: bool) -> Console:
    from rich.console import Console
    from rich.segment import Segment

    class Safe(Console):
        """Draws nothing that steers the terminal but what rich itself says, whatever the text is of."""

        def render(self, renderable: Any, options: Any = None) -> Any:
            for s in super().render(renderable, options):
                yield s if s.control else Segment(printable(s.text), s.style)

    stream = sys.stderr if stderr else sys.stdout
    if stream is None:  # closed by whoever started us: there is nobody to tell
        return Safe(file=open(os.devnull, "w"), width=PIPE_WIDTH)
    # No markup: names and values are whatever people call things. Who wants a style prints a Text.
    piped = not stream.isatty()
    width = PIPE_WIDTH if piped and not os.environ.get("COLUMNS", "").isdecimal() else None
    return Safe(stderr=stderr, width=width, markup=False, emoji=False, highlight=False, soft_wrap=False)


def stdout() -> Console:
    """For answers: what the user asked for and may pipe on."""
    return _console(False)


def stderr() -> Console:
    """For talk: progress, notes, hints, errors."""
    return _console(True)


def show(renderable: Any) -> None:
    """Print an answer."""
    stdout().print(renderable)


def lines(title: str, rows: Sequence[Sequence[str]]) -> None:
    """Print rows, of which there may be thousands, in columns that are not folded; the first of them is the head."""
    from itertools import zip_longest

    from rich.text import Text

    widths = [max(map(len, column)) for column in zip_longest(*rows, fillvalue="")]
    told = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    rule = "\u2500" * (sum(widths) + 2 * len(widths) - 2)
    text = Text.assemble((f"{title}\n\n{told[0]}\n", "bold"), "\n".join([rule, *told[1:]]), "\n")
    stdout().print(text, soft_wrap=True)


def say(text: str) -> None:
    """Print a remark, folded at the window's edge."""
    stderr().print(text)


def emit_json(value: Any) -> None:
    """One JSON object on stdout, without colour. NaN is refused: honest or absent."""
    if sys.stdout is not None:
        sys.stdout.write(json_text(value, indent=2) + "\n")


def emit_csv(rows: Sequence[dict[str, Any]]) -> None:
    """Rows as CSV on stdout; the columns are the keys of the first row, absent values are empty."""
    if not rows or sys.stdout is None:
        return
    writer = csv.DictWriter(sys.stdout, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: printable(v) if isinstance(v, str) else v for k, v in row.items()} for row in rows)
