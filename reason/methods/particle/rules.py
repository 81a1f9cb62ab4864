r"""Checks that need no model: is the arithmetic right that a solution writes down, and does it keep to its form?

Equations are looked for in free text: ``so 3 + 4 = 7 apples``, ``$5 \times 3 = $15``, ``12*3=36=30+6``. A side with letters,
powers or signs of its own in it is no plain number and is passed over: what is not surely wrong is not counted. Where the
problem says ``mod m``, equality is modulo m.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

import numpy as np
from scipy.special import expit

from reason.answers import stated
from reason.datasets.problems import Problem
from reason.errors import ConfigError
from reason.methods.particle.driver import Prefix
from reason.methods.particle.lineage import Node

SIGNS = {"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-", r"\times": "*", r"\cdot": "*", r"\div": "/"}
SIGN = re.compile("|".join(map(re.escape, SIGNS)))
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
LEFT = re.compile(r"(?:^|(?<=[\s:;,]))[-$]*[\d(][\d\s.+\-*/()$]*$")  # at the end of what is left of a sign =
RIGHT = re.compile(r"[\s$\-]*[\d(][\d\s.+\-*/()$]*")  # at the beginning of what is right of it
BEFORE = re.compile(
    r"(?:[-+*/^%!\\}_<>)]|\b(?:of|half|twice|double|times|plus|minus|percent|sqrt|log))\s*$", re.IGNORECASE
)
AFTER = re.compile(
    r"[\^%!_{\[<>]|\\(?![)\]])|(?:mod|million|thousand|hundred|billion|percent|remainder|[a-z])\b",
    re.IGNORECASE,
)
MENDED = re.compile(
    r"^.*\n+(?=redo )", re.MULTILINE
)  # a line that the next does again: ``datasets.arithmetic``
CALCULATION = re.compile(r"[\d)]\s*[-+*/]")
MODULUS = re.compile(r"\bmod(?:ulo)?\s+(\d{1,9})\b")
LONGEST = 80  # characters of a side


def equations(text: str) -> list[tuple[str, str]]:
    """Both sides of each equation between plain numbers in ``text``, one of which is a calculation at least."""
    found = []
    for line in THOUSANDS.sub("", SIGN.sub(lambda m: SIGNS[m[0]], text)).split("\n"):
        sides = line.split("=")
        for left, right in pairwise(sides):
            a, b = LEFT.search(left), RIGHT.match(right)
            if not a or not b or BEFORE.search(left[: a.start()]):
                continue
            rest = right[b.end() :]
            if AFTER.match(rest) or (rest[:1].isalpha() and not b[0][-1].isspace()):
                continue
            pair = a[0].replace("$", "").strip(), b[0].replace("$", "").rstrip(" .").strip()
            if any(map(CALCULATION.search, pair)) and max(map(len, pair)) <= LONGEST:
                found.append(pair)
    return found


def value(text: str) -> Fraction | None:
    """What plain arithmetic comes to; None where it is none."""
    try:
        return _value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _value(node: ast.AST) -> Fraction:
    if (
        isinstance(node, ast.Constant)
        and isinstance(node.value, int | float)
        and not isinstance(node.value, bool)
    ):
        return Fraction(str(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.BinOp):
        a, b = _value(node.left), _value(node.right)
        match node.op:
            case ast.Add():
                return a + b
            case ast.Sub():
                return a - b
            case ast.Mult():
                return a * b
            case ast.Div():
                return a / b
    raise ValueError


def holds(left: str, right: str, modulus: int = 0) -> bool | None:
    """Whether an equation is right, up to a unit of its last decimal place; None where a side cannot be read."""
    a, b = value(left), value(right)
    if a is None or b is None:
        return None
    if modulus and a.denominator == b.denominator == 1:
        return (a - b) % modulus == 0
    digits = [len(m[1]) for side in (left, right) for m in re.finditer(r"\.(\d+)", side)]
    return abs(a - b) <= (Fraction(1, 10 ** min(digits)) if digits else 0)


class Rules:
    """Counts what a solution breaks.

    Args:
        strength: each thing broken lowers the log-odds by so much; unbroken, they are 0, which says nothing.
        line: a pattern that every line has to match; "" = any will do.

    Raises:
        ConfigError: a pattern that cannot be read.
    """

    def __init__(self, strength: float = 2.0, line: str = ""):
        self.strength = strength
        try:
            self._line = re.compile(line) if line else None
        except re.error as error:
            raise ConfigError(f"The pattern of lines {line!r} cannot be read: {error}.") from error

    def __call__(self, prefixes: Sequence[Prefix]) -> np.ndarray:
        """(n,) in (0, 0.5]"""
        return expit([-self.strength * len(self.broken(problem, node)) for problem, node, _ in prefixes])

    def broken(self, problem: Problem, node: Node) -> list[str]:
        """What is wrong with a solution, in words. The last line of an unfinished one counts once it is whole."""
        text = node.solution
        if not node.finished:
            text = text[: text.rfind("\n") + 1]
        text = MENDED.sub("", text)
        said = MODULUS.search(problem.text)
        modulus = int(said[1]) if said else 0
        found = [f"{a} = {b} is wrong" for a, b in equations(text) if holds(a, b, modulus) is False]
        if self._line:
            lines = filter(None, map(str.strip, text.split("\n")))
            found += [f"{line!r} is out of form" for line in lines if not self._line.fullmatch(line)]
        if node.finished and stated(text) is None:
            found.append("there is no answer")
        return found
