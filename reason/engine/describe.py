"""The meaning of every key, read from the comments in the configuration dataclasses themselves."""

from __future__ import annotations

import dataclasses
import linecache
import re
import sys
from typing import Any

TOP = {
    "method": "the reasoning method",
    "depth": "how much reasoning is spent when the headline number is measured",
    "train_depth": "the depth the model is trained for; 0 = the base without the method",
    "seed": "of data order, initial weights and every random draw",
    "runs": "folder under which run folders are made",
    "offline": "fetch nothing: only caches and local paths",
}


def meanings(plan: Any) -> dict[str, str]:
    """{dotted key: the comment beside its field}."""
    found = dict(TOP)
    for f in dataclasses.fields(plan.config):
        section = getattr(plan.config, f.name)
        if dataclasses.is_dataclass(section):
            for kind in reversed(type(section).__mro__):
                if dataclasses.is_dataclass(kind):
                    found |= {f"{f.name}.{key}": text for key, text in comments(kind).items()}
    return found


_FIELD = re.compile(r"    (\w+)\s*:")
_SAID = re.compile(r"  #\s*(.+?)\s*$")  # two spaces before it, as formatters leave them
_ON = re.compile(r" {8,}#\s*(.+?)\s*$")  # a line of nothing else, inside the brackets of a field
_END = re.compile(r"\S|    (def|@|class)\b")


def comments(kind: type) -> dict[str, str]:
    """{field: the comment on its lines} of a top-level dataclass, from its source; {} where there is none.

    Read by pattern rather than by parser: this stands between a user and ``show``.
    """
    lines = linecache.getlines(getattr(sys.modules.get(kind.__module__), "__file__", None) or "")
    opening = re.compile(rf"class {kind.__name__}\b")
    start = next((i for i, line in enumerate(lines) if opening.match(line)), len(lines))
    found: dict[str, str] = {}
    field = ""
    for line in lines[start + 1 :]:
        if _END.match(line):
            break
        if match := _FIELD.match(line):
            field = match[1]
            found[field] = ""
        said = _ON.match(line) if line.lstrip().startswith("#") else _SAID.search(line)
        if field and said:
            found[field] = f"{found[field]} {said[1]}".strip()
    return found
