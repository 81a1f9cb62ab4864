"""Sums of several steps, modulo a number: a generator, and an exact judge of what is written about them.

    ((7+5)*3-4) mod 97      the question: operations from left to right
    7+5=13                  a step: the value so far, one operation, its result
    redo 7+5=12             the last step once more; the first try no longer counts
    12*3=36
    36-4=32
    answer 32

A slip is a step with a wrong result. The next line can mend it; a line later it is too late, for ``redo``
reaches one step back. So whoever gives up a solution at its first slip may give up a right one.
"""

from __future__ import annotations

import operator
import random
import re
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Literal

from reason.datasets.documents import Corpus, Documents, TextData, finish
from reason.datasets.generated import distinct, names
from reason.datasets.problems import JudgedLine, Problem, Problems, ProblemSplits, Verdict, view
from reason.datasets.subsets import unit
from reason.datasets.textconfig import ArithmeticConfig

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
NUMBER = r"(0|[1-9][0-9]{0,8})"
STEP = re.compile(rf"(redo )?{NUMBER}([-+*]){NUMBER}={NUMBER}")
ANSWER = re.compile(r"answer\s+(.+)")
WHOLE = re.compile(r"0*([0-9]{1,9})")
STUBBORN = 0.6  # chance that a stubborn calculation is written down wrong: more often than right
NO_NUMBER = -1  # stands for an answer that is no whole number: wrong, as no sum comes to it

# right: the next operation on the value so far, its result right and on the way to the answer.
# astray: likewise, but the value so far was wrong. slip: the result is wrong.
# stray: another operation, another value, or after the answer. unreadable: no step and no answer.
Kind = Literal["right", "astray", "slip", "stray", "unreadable"]


@dataclass(frozen=True)
class Sum:
    """A question with its steps and its answer."""

    start: int
    operations: tuple[tuple[str, int], ...]  # "+", "-" or "*", and the number
    modulus: int

    @property
    def depth(self) -> int:
        """Operations, and so steps, that it takes."""
        return len(self.operations)

    @cached_property
    def values(self) -> list[int]:
        """The value before the first operation and after each: depth + 1 numbers."""
        found = [self.start]
        for sign, number in self.operations:
            found.append(self.apply(found[-1], sign, number))
        return found

    def apply(self, value: int, sign: str, number: int) -> int:
        return OPERATIONS[sign](value, number) % self.modulus

    def outcome(self, value: int, done: int) -> int:
        """What right steps come to, from ``value`` after ``done`` operations."""
        for sign, number in self.operations[done:]:
            value = self.apply(value, sign, number)
        return value

    @property
    def question(self) -> str:
        """With the parentheses it needs: ((7+5)*3-4) mod 97."""
        shown, last = str(self.start), "*"
        for sign, number in self.operations:
            if sign == "*" and last != "*":
                shown = f"({shown})"
            shown += f"{sign}{number}"
            last = sign
        return f"({shown}) mod {self.modulus}"

    @property
    def steps(self) -> list[str]:
        """The right steps, a line each."""
        steps = zip(self.values[:-1], self.operations, self.values[1:], strict=True)
        return [f"{value}{sign}{number}={result}" for value, (sign, number), result in steps]

    @property
    def answer(self) -> int:
        return self.values[-1]

    @property
    def solution(self) -> str:
        return "\n".join([*self.steps, f"answer {self.answer}"])

    def slipped(self, rng: random.Random, slip: float, redo: float, stubborn: float = 0.0) -> str:
        """A solution whose steps are wrong with chance ``slip``; each slip is mended at once with chance ``redo``.

        stubborn: the share of calculations that are wrong with chance ``STUBBORN`` instead, and always in the same way.
        """
        lines, value = [], self.start
        for sign, number in self.operations:
            right = self.apply(value, sign, number)
            step = f"{value}{sign}{number}="
            value = right
            hard = unit(f"{self.modulus} {step}", "stubborn") < stubborn
            if rng.random() < (STUBBORN if hard else slip):
                own = 1 + int(unit(f"{self.modulus} {step}", "wrong") * (self.modulus - 1))
                value = (right + (own if hard else rng.randrange(1, self.modulus))) % self.modulus
            lines.append(f"{step}{value}")
            if value != right and rng.random() < redo:
                value = right
                lines.append(f"redo {step}{value}")
        return "\n".join([*lines, f"answer {value}"])


# --- judging ------------------------------------------------------------------------------------------


def check(problem: Sum, solution: str) -> Verdict:
    """Judge ``solution``, what follows the question. Empty lines are passed over; the first answer counts.

    A line is alive if the right answer can still be reached: by right steps, or by redoing the last one first.
    """
    value, before = problem.start, None  # the value so far, and the one that the last step started from
    done, answer, derived = 0, None, False  # operations that stand
    lines: list[JudgedLine] = []
    for text in filter(None, map(str.strip, solution.split("\n"))):
        kind: Kind = "unreadable"
        if step := STEP.fullmatch(text):
            kind = "stray"
            again = step[1] is not None
            place, start = (done - 1, before) if again else (done, value)
            stated, number, result = int(step[2]), int(step[4]), int(step[5])
            goes_on = answer is None and start == stated and place < problem.depth
            if goes_on and (step[3], number) == problem.operations[place]:
                done, before, value = place + 1, stated, result
                if result != problem.apply(stated, step[3], number):
                    kind = "slip"
                else:
                    kind = "right" if result == problem.values[done] else "astray"
        elif said := ANSWER.fullmatch(text):
            kind = "stray"
            if answer is None:
                number = WHOLE.fullmatch(said[1])
                answer = int(number[1]) if number else NO_NUMBER
                derived = done == problem.depth and answer == value
                kind = "right" if answer == problem.answer else "astray" if derived else "slip"
        if answer is None:
            alive = problem.outcome(value, done) == problem.answer or (
                before is not None and problem.outcome(before, done - 1) == problem.answer
            )
        else:
            alive = answer == problem.answer
        lines.append(JudgedLine(text, kind, alive))
    return Verdict(tuple(lines), answer, answer == problem.answer, derived)


# --- the dataset --------------------------------------------------------------------------------------


@dataclass
class Arithmetic(TextData):
    """Sums by split; the view ``text`` is question and solution, with slips in training only."""

    sums: dict[str, list[Sum]] = field(default_factory=dict)
    fit: float = 0.25  # share of the validation problems that is held out for fitting

    def problems(self) -> ProblemSplits:
        """The view: sums as problems with their exact judge; solutions as they are in ``text``, levels are depths."""
        parts = {
            split: Problems(
                Problem(name, s.question, str(s.answer), text.partition("\n")[2], s.depth, partial(check, s))
                for name, text, s in zip(part.id, part.text, self.sums[split], strict=True)
            )
            for split, part in self.corpus.parts.items()
        }
        return view(parts, self.fit, self.info)


def load(config: ArithmeticConfig, offline: bool = False) -> Arithmetic:
    """Generate problems and write them down. Nothing is fetched, so ``offline`` is moot.

    Raises:
        DataError: there are too few different problems of these sizes.
    """
    sums = distinct(lambda rng: draw(config, rng), lambda p: p.question, config)
    rng = random.Random(f"{config.seed} slips")
    parts = {}
    for split, several in sums.items():
        flawed = split == "train" and (config.slip or config.stubborn)
        text = [
            f"{p.question}\n{p.slipped(rng, config.slip, config.redo, config.stubborn) if flawed else p.solution}"
            for p in several
        ]
        parts[split] = Documents(names(split, len(several)), text)
    steps = sum(p.depth for p in sums["train"])
    written = finish(config.name, Corpus.of(parts), {"modulus": config.modulus, "train_steps": steps})
    return Arithmetic(**vars(written), sums=sums, fit=config.fit)


def draw(config: ArithmeticConfig, rng: random.Random) -> Sum:
    """A sum: its depth, its operations and its numbers, each evenly among those allowed."""
    depth = rng.randint(config.least, config.most)
    operations = tuple((rng.choice("+-*"), rng.randint(1, config.largest)) for _ in range(depth))
    return Sum(rng.randint(1, config.largest), operations, config.modulus)
