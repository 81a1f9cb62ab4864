r"""Whether an answer is right: exact for plain numbers and words, by math-verify (extra ``math``) for mathematics.

Numbers are compared as fractions: 007 is 7, 0.50 is 1/2, 50 is not 0.5. Signs of currency and of percent, degrees,
separators of thousands and units after a number play no part, in the answer or in the right one. What is neither a
number nor a word goes to a worker: a process of its own, because some expressions (a tower of powers) never end. Its
clock starts when it starts to grade. One that takes too long is killed, alone, and so is one that breaks; the answer
is then right where it is written as the right one is, else wrong, and it is counted.
"""

from __future__ import annotations

import atexit
import functools
import importlib.util
import json
import os
import re
import select
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from typing import TypeVar

from reason.errors import MissingExtra, RunError

T = TypeVar("T")
SECONDS = 5.0  # for one comparison
START_SECONDS = 120.0  # for a worker to import what it needs
KEPT = 1 << 18  # comparisons that are remembered
LONGEST = 1000  # characters; what is longer is compared as text

MARKS = {"−": "-", "–": "-", "±": r"\pm ", "∓": r"\mp ", "×": r"\times ", "·": r"\cdot ", "÷": r"\div "}
MARKS |= {
    "π": r"\pi ",
    "∞": r"\infty ",
    "≤": r"\le ",
    "≥": r"\ge ",
    "≠": r"\ne ",
    "∪": r"\cup ",
    "√": r"\sqrt ",
}
DROPPED = re.compile(
    r"\\left(?![a-z])|\\right(?![a-z])|(?<!\\)\\[!,;: ]|~|\\displaystyle|\\?[$€£¥%]|°|\^\s*\{?\s*\\circ\s*\}?"
)
SPACES = re.compile(r"\s+(?![A-Za-z0-9])|(?<![A-Za-z0-9])\s+")  # those that part no two words or numbers
FRACTION = re.compile(r"\\[dt]frac")
SHORT_FRACTION = re.compile(r"\\frac\s*(\d)\s*(\d)")
THOUSANDS = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
THIN = re.compile(r"(?<=\d)(?:\{,\}|,\\!|\\,)(?=\d{3})")
WORDS = re.compile(r"\\(?:text|mathrm|textbf|mathbf|mbox|textit)\s*\{([^{}]*)\}")
UNIT = re.compile(
    r"(?<=[\d}])\s*\\(?:text|mathrm|mbox)\s*\{\s*(?!or\b|and\b)[a-z][^{}]*\}(?:\^\{?\d\}?)?$", re.IGNORECASE
)
DECIMAL = r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)"
NUMBER = re.compile(rf"([-+]?)({DECIMAL})(?:[eE]([-+]?[0-9]{{1,3}}))?")
RATIO = re.compile(
    rf"([-+]?)(?:(?:([0-9]+) )?({DECIMAL})/({DECIMAL})|([0-9]*)\\frac\{{({DECIMAL})\}}\{{({DECIMAL})\}})"
)
NEGATED = re.compile(r"^\\frac\{-")
WORD = re.compile(r"[A-Za-z]{3,}(?:[ -][A-Za-z]+)*|[A-Za-z]")


# --- what is decided without a worker -----------------------------------------------------------------


def _kept(function: Callable[[str], T]) -> Callable[[str], T]:
    """``function``, which remembers what it said about answers of usual length."""
    kept = functools.lru_cache(1 << 16)(function)

    @functools.wraps(function)
    def call(answer: str) -> T:
        return kept(answer) if len(answer) <= LONGEST else function(answer)

    return call


@_kept
def tidy(answer: str) -> str:
    """``answer`` in one spelling, still LaTeX: without dollars, units, currency, percent and size of brackets."""
    text = " ".join(answer.split())
    if len(text) > LONGEST:
        return text
    for mark, spelled in MARKS.items():
        text = text.replace(mark, spelled)
    text = THIN.sub("", re.sub(r"^(?:\\\(|\\\[)|(?:\\\)|\\\])$", "", text))
    text = SHORT_FRACTION.sub(r"\\frac{\1}{\2}", FRACTION.sub(r"\\frac", DROPPED.sub("", text)))
    text = text.strip().removesuffix(".").strip()
    text = WORDS.sub(r"\1", UNIT.sub("", text)).strip()
    text = text.replace(",", "") if THOUSANDS.fullmatch(text) else text
    return re.sub(r"^\(([A-Za-z])\)$", r"\1", text)


@_kept
def number(answer: str) -> Fraction | None:
    """The number that ``answer`` plainly is: 007, -1,250.50, 3/4, \\frac{3}{4}, 2e-3; None for anything else."""
    text = NEGATED.sub(r"-\\frac{", SPACES.sub("", tidy(answer))) if len(answer) <= LONGEST else ""
    if found := NUMBER.fullmatch(text):
        sign, digits, power = found.groups()
        value = Fraction(digits) * Fraction(10) ** int(power or 0)
        return -value if sign == "-" else value
    if found := RATIO.fullmatch(text):
        sign, wholes, top, bottom, whole, upper, lower = found.groups()
        over, under = Fraction(top or upper), Fraction(bottom or lower)
        if not under:
            return None
        value = over / under + int(wholes or whole or 0)
        return -value if sign == "-" else value
    return None


@_kept
def canonical(answer: str) -> str:
    """One text for answers that are surely equal: a number as a fraction, a word in lower case, else as written.

    '' for no answer.
    """
    value = number(answer)
    if value is not None:
        return str(value)
    text = tidy(answer)
    return text.lower() if len(text) > 1 and WORD.fullmatch(text) else SPACES.sub("", text)


def simple(answer: str) -> bool:
    """Whether ``answer`` is a plain number or a word: what is compared exactly, without the extra."""
    return number(answer) is not None or WORD.fullmatch(tidy(answer)) is not None


def _decided(answer: str, gold: str) -> bool | None:
    """Whether they are equal, None where it takes mathematics."""
    if not canonical(answer) or not canonical(gold):
        return False
    if canonical(answer) == canonical(gold):
        return True
    texts = tidy(answer), tidy(gold)
    word = any(len(text) > 1 and WORD.fullmatch(text) for text in texts)
    plain = simple(answer) and simple(gold)
    broken = any(text.count("{") != text.count("}") for text in texts)
    return False if word or plain or broken or max(map(len, texts)) > LONGEST else None


# --- workers ------------------------------------------------------------------------------------------


class Ended(Exception):
    """A worker that gave no reply."""


class Worker:
    """A process that grades, one request at a time."""

    def __init__(self):
        path = os.pathsep.join(p or os.getcwd() for p in sys.path)
        self.process = subprocess.Popen(
            # -P: a sympy.py where we stand is not sympy
            [sys.executable, "-P", "-m", "reason.metrics.equality"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        self.unread = b""
        try:
            self._reply(START_SECONDS)
        except Ended:
            self.kill()
            raise

    def equal(self, gold: str, answer: str, seconds: float) -> bool:
        """Raises Ended where there is no reply in that time; the worker is then of no further use."""
        assert self.process.stdin
        try:
            self.process.stdin.write(json.dumps([gold, answer, seconds]).encode() + b"\n")
            self.process.stdin.flush()
        except OSError as error:
            raise Ended("crashed") from error
        reply = self._reply(seconds)
        if not isinstance(reply, bool):
            raise Ended("failed")
        return reply

    def _reply(self, seconds: float) -> object:
        assert self.process.stdout
        end = time.monotonic() + seconds
        poll = select.poll()
        poll.register(self.process.stdout.fileno(), select.POLLIN)
        while b"\n" not in self.unread:
            left = end - time.monotonic()
            if left <= 0 or not poll.poll(left * 1000):
                raise Ended("timed out")
            more = os.read(self.process.stdout.fileno(), 1 << 16)
            if not more:
                raise Ended("crashed")
            self.unread += more
        line, _, self.unread = self.unread.partition(b"\n")
        return json.loads(line)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            try:
                if pipe:
                    pipe.close()
            except OSError:
                pass


class Grader:
    """Compares answers. It may be called from any thread; workers start when first needed and are kept.

    Args:
        workers: most of them at a time.
        seconds: for one comparison, from when a worker begins it.
    """

    def __init__(self, workers: int = 2, seconds: float = SECONDS):
        self.seconds = seconds
        self.counts: Counter[str] = (
            Counter()
        )  # comparisons: "compared", "timed out", "crashed", "failed", "as text"
        self._known: dict[tuple[str, str], bool] = {}
        self._most = workers
        self._reset()
        atexit.register(self.close)

    def _reset(self) -> None:
        self._owner = os.getpid()
        self._free = threading.Semaphore(self._most)
        self._lock = threading.Lock()
        self._idle: list[Worker] = []

    def require(self, golds: Iterable[str | None]) -> None:
        """Refuse right answers that cannot be compared here.

        Raises:
            MissingExtra: one of them is no plain number and no word, and math-verify is not installed.
        """
        if not available():
            hard = next((gold for gold in golds if gold and not simple(gold)), None)
            if hard is not None:
                raise _missing(hard)

    def grade(self, answer: str | None, gold: str) -> bool:
        """Whether ``answer`` is right, where ``gold`` is. No answer is wrong.

        Raises:
            MissingExtra: ``gold`` is mathematics, and math-verify is not installed.
        """
        decided = _decided(answer or "", gold)
        if decided is not None:
            return decided
        if not available() and not simple(gold):
            raise _missing(gold)
        return self.same(answer or "", gold)

    def same(self, answer: str, gold: str) -> bool:
        """Like ``grade``, for answers of which neither is known to be right: without math-verify, as text."""
        decided = _decided(answer, gold)
        if decided is not None:
            return decided
        pair = (canonical(gold), canonical(answer))
        known = self._known.get(pair)
        if known is None:
            if len(self._known) >= KEPT:
                self._known.clear()
            known = self._known[pair] = self._compare(tidy(gold), tidy(answer))
        return known

    def grade_all(self, answers: Sequence[str | None], golds: Sequence[str]) -> list[bool]:
        """``grade`` for each pair, with all workers at once."""
        with ThreadPoolExecutor(self._most) as pool:
            return list(pool.map(self.grade, answers, golds))

    def _compare(self, gold: str, answer: str) -> bool:
        if os.getpid() != self._owner:  # we were forked: the workers are our parent's
            self._reset()
        if not available():
            self._count("as text")
            return False
        with self._free:  # waiting for a worker is no part of its time
            worker = self._worker()
            try:
                found = worker.equal(gold, answer, self.seconds)
            except BaseException as end:
                worker.kill()
                if not isinstance(end, Ended):
                    raise
                self._count(str(end))
                return False
            with self._lock:
                self._idle.append(worker)
        self._count("compared")
        return found

    def _worker(self) -> Worker:
        """One that waits, or a new one."""
        with self._lock:
            while self._idle:
                worker = self._idle.pop()
                if worker.process.poll() is None:
                    return worker
                worker.kill()
        try:
            return Worker()
        except (Ended, OSError) as error:
            raise RunError(
                f"The process that compares answers did not start ({error}).",
                "Does `python -c 'import math_verify'` work? If not: python -m pip install 'reason-lab[math]'",
            ) from error

    def _count(self, what: str) -> None:
        with self._lock:
            self.counts[what] += 1

    def close(self) -> None:
        """End the workers; they start again when needed."""
        if os.getpid() != self._owner:
            return
        with self._lock:
            idle, self._idle = self._idle, []
        for worker in idle:
            worker.kill()

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        atexit.unregister(self.close)


@functools.cache
def available() -> bool:
    """Whether math-verify is installed."""
    return importlib.util.find_spec("math_verify") is not None


def _missing(gold: str) -> MissingExtra:
    return MissingExtra(f"Comparing answers with {gold[:60]!r} needs math-verify.", "math")


@functools.cache
def grader() -> Grader:
    """The one that all share."""
    return Grader()


def grade(answer: str | None, gold: str) -> bool:
    """Whether ``answer`` is right, where ``gold`` is, by the shared grader. See ``Grader.grade``."""
    return grader().grade(answer, gold)
