r"""What a solution gives as its answer: the last ``\boxed{...}``, the last ``#### ...``, or a line ``answer ...``.

Three forms, tried in this order, so that one reader serves models that were taught MATH, GSM8K or our own sums.
"""

from __future__ import annotations

import re

BOXED = re.compile(r"\\f?boxed\s*(\{)|\\f?boxed\s+([^\s{}$]+)|\\f?boxed\s*\Z")
HASHES = re.compile(r"####[ \t]*(.*)")
LINE = re.compile(r"^[ \t]*answer[ \t]+(.*)$", re.MULTILINE)


def stated(solution: str) -> str | None:
    r"""The answer that ``solution`` gives, without spaces around it; None if it gives none.

    Where something is boxed, only the last box counts, and one that does not close is no answer: the text broke off
    in it. Of several lines ``answer ...`` the first counts, as it does for the judge of ``datasets.arithmetic``.
    """
    boxes = list(BOXED.finditer(solution))
    if boxes:
        return _boxed(solution, boxes[-1])
    if found := HASHES.findall(solution):
        return found[-1].strip() or None
    said = LINE.search(solution)
    return (said[1].strip() or None) if said else None


def _boxed(text: str, box: re.Match) -> str | None:
    if box[2]:
        return box[2]
    depth, place = 1, box.end()
    while place < len(text):
        if text[place] == "\\":
            place += 1  # \{ and \} are signs, not braces
        elif text[place] in "{}":
            depth += 1 if text[place] == "{" else -1
            if not depth:
                return text[box.end() : place].strip() or None
        place += 1
    return None
