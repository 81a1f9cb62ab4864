"""Text from data, made safe to look at: no character of it steers a terminal or hides or reorders its neighbours.

Titles, ids and texts are written by strangers. Whatever is printed, drawn or put on a page goes through
``printable``; what programs read keeps its content and goes through ``json_text``.
"""

from __future__ import annotations

import json
import re
import sys
from contextlib import suppress
from typing import Any

# Control characters (C0, DEL, C1), line and paragraph separators, embeddings, overrides and isolates of the
# direction of writing, characters without width, tags and other carriers of hidden text, halves of surrogate
# pairs. Joiners (U+200C, U+200D) and the plain marks of direction stay: scripts and emoji need them.
_INVISIBLE = r"\x7f-\x9f\xad\u061c\u180e\u200b\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e0fff"
_UNSAFE = re.compile(rf"[\x00-\x08\x0b-\x1f{_INVISIBLE}]")
_UNSAFE_IN_JSON = re.compile(f"[{_INVISIBLE}]")  # JSON itself escapes the rest


def printable(text: object) -> str:
    r"""``text`` with each unsafe character spelled out (``\x1b``, ``\u202e``); line ends and tabs stay."""
    return _UNSAFE.sub(_spelled, str(text))


def _spelled(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def json_text(value: Any, indent: int | None = None) -> str:
    r"""JSON that is safe to print and reads as ``value``: unsafe characters become ``\uXXXX``. NaN is refused."""
    text = json.dumps(value, indent=indent, allow_nan=False, ensure_ascii=False)
    return _UNSAFE_IN_JSON.sub(lambda found: json.dumps(found[0])[1:-1], text)


def say(text: object) -> None:
    """One line to stderr, ``printable``. Where stderr leads to a full disk or to nobody, nothing is said."""
    if sys.stderr is not None:
        with suppress(OSError):
            print(printable(text), file=sys.stderr, flush=True)
