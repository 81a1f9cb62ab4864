r"""Whether two answers are the same mathematics: math-verify, and what it takes for equal and is not.

Run as a module it is the worker of ``grading``: it answers each line of JSON on its standard input, ``[gold, answer,
seconds]``, with a line of its own, ``true``, ``false`` or an error as text; the first line it writes is ``null``, when
it is ready. It is killed from outside where it takes too long, and by its own alarm where nobody is left to do so.

math-verify 0.9 compares numbers to an absolute precision (2^{-80} is 2^{-81} to it), rounds decimals, passes over
subscripts (11_2 is 11), forgets repeats (5,5 is 5) and compares the pair (3,5) with 5,3 as sets. So its yes is checked,
its no is final.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import re
import signal
import sys
import threading
import time
from typing import Any

MEMORY = 4 << 30  # bytes of address space, beyond which a number is too large to grade
GRACE = 2.0  # times its seconds, after which a worker ends by itself
CLOSE = 1e-12  # relative, between numbers that have no finite form
ROUNDED = 1e-6  # relative, where one of them is written as a decimal
SUBSCRIPT = re.compile(r"[0-9)}]\s*_\s*\{?\s*([0-9]+)")
RELATION = re.compile(r"[<>]|\\(?:in|le|ge|leq|geq|lt|gt)(?![A-Za-z])")
POWER = re.compile(r"\^\s*\(?(-?\d+(?:\.\d+)?)\)?(?![\d}])")
OPEN, CLOSED = "([{", ")]}"


def equal(gold: str, answer: str) -> bool:
    """Whether ``answer`` equals ``gold``, both LaTeX without dollar signs.

    Raises:
        ImportError: math-verify is not installed. MemoryError, RecursionError: it is too large.
    """
    math_verify = importlib.import_module("math_verify")

    if sorted(SUBSCRIPT.findall(gold)) != sorted(SUBSCRIPT.findall(answer)):
        return False
    if not (RELATION.search(gold) or RELATION.search(answer)) and _count(gold) != _count(answer):
        return False
    if _bracketed(gold, "(") and _count(gold) > 1 and not _bracketed(answer, OPEN):
        answer = f"({answer})"  # a pair that lost its parentheses is still in order
    one, other = (math_verify.parse(f"${_spelled_out(text)}$", parsing_timeout=0) for text in (gold, answer))
    if not math_verify.verify(one, other, allow_set_relation_comp=True, timeout_seconds=0):
        return False
    return bool(one and other) and _near(one[0], other[0])


def _spelled_out(text: str) -> str:
    """2^-80 as 2^{-80}, though to TeX the exponent is one sign; and both values of one with plus-minus."""
    text = POWER.sub(r"^{\1}", text.replace("**", "^"))
    if r"\pm" in text and "=" not in text and _count(text) == 2:
        minus = text.replace(r"\mp", "+").replace(r"\pm", "-")
        text = text.replace(r"\mp", "-").replace(r"\pm", "+") + "," + minus
    return text


def _count(text: str) -> int:
    """How many values are written: parts between commas, and two for each of them with plus-minus."""
    text = re.sub(r"\\text\{\s*(?:or|and)\s*\}|\bor\b|\band\b|;", ",", text)
    text = text.strip().removesuffix(".")
    while _bracketed(text, OPEN):
        text = re.sub(r"^\\?[(\[{]|\\?[)\]}]$", "", text).strip()
    parts, depth = [""], 0
    for sign in text:
        depth += (sign in OPEN) - (sign in CLOSED)
        if sign == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += sign
    return sum(2 if r"\pm" in part or r"\mp" in part else 1 for part in parts if part.strip())


def _bracketed(text: str, kinds: str) -> bool:
    """Whether one pair of brackets, whose opening is of ``kinds``, holds all of ``text``."""
    text = re.sub(r"\\([{}])", r"\1", text.strip())
    if len(text) < 2 or text[0] not in kinds or text[-1] not in CLOSED:
        return False
    depth = 0
    for place, sign in enumerate(text):
        depth += (sign in OPEN) - (sign in CLOSED)
        if depth == 0:
            return place == len(text) - 1
    return False


def _near(one: Any, other: Any) -> bool:
    """Whether what math-verify calls equal is so to all digits; where that cannot be said, it is believed."""
    import sympy

    if isinstance(one, sympy.Eq) or isinstance(other, sympy.Eq):
        one, other = (side.rhs if isinstance(side, sympy.Eq) else side for side in (one, other))
    if isinstance(one, sympy.MatrixBase) and isinstance(other, sympy.MatrixBase):
        return all(map(_near, one.flat(), other.flat()))
    if isinstance(one, sympy.Interval) and isinstance(other, sympy.Interval):
        return _near(one.start, other.start) and _near(one.end, other.end)
    if isinstance(one, sympy.Tuple) and isinstance(other, sympy.Tuple):
        return all(map(_near, one, other))
    if isinstance(one, sympy.FiniteSet) and isinstance(other, sympy.FiniteSet):
        return all(any(_near(a, b) for b in other) for a in one) and all(
            any(_near(a, b) for a in one) for b in other
        )
    if not all(isinstance(side, sympy.Expr) and not side.free_symbols for side in (one, other)):
        return True
    rounded = one.has(sympy.Float) or other.has(sympy.Float)
    a, b = (_exact(side) for side in (one, other))
    if a.is_Rational and b.is_Rational:
        return bool(a == b)
    digits: Any = sympy.N
    size = max(abs(digits(a, 30)), abs(digits(b, 30)))
    if not size.is_finite or size == 0:
        return True
    return bool(abs(digits(a - b, 30)) <= (ROUNDED if rounded else CLOSE) * size)


def _exact(value: Any) -> Any:
    """``value`` computed, decimals as the fractions that they are written as."""
    import sympy

    decimals = {number: sympy.Rational(str(number)) for number in value.atoms(sympy.Float)}
    return sympy.sympify(value).xreplace(decimals).doit()


# --- the worker ---------------------------------------------------------------------------------------


def serve() -> None:
    """Answer requests until there are no more."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever else prints does not mix with the answers
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who interrupts our parent leaves our end to it
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # inherited otherwise
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    _bound_memory()
    equal("x=1,2", "x=2,1")  # what is imported and set up for the first time is no grading's time

    for line in itertools.chain(["null"], sys.stdin):
        reply: Any = None
        if request := json.loads(line):
            gold, answer, seconds = request
            # The default action of the alarm ends the process, even inside of a single long operation of C's.
            _alarm(GRACE * seconds)
            try:
                reply = equal(gold, answer)
            except Exception as error:
                reply = f"{type(error).__name__}: {error}"[:200]
            _alarm(0.0)
        answers.write(json.dumps(reply) + "\n")
        answers.flush()


def _alarm(seconds: float) -> None:
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)


def _end_with(parent: int) -> None:
    """End when ``parent`` does, also where a process that it forked holds our input open."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _bound_memory() -> None:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    except (ImportError, ValueError, OSError):
        pass


if __name__ == "__main__":
    serve()
