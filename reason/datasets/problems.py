"""Problems to solve, by split: the view ``problems``.

Whoever solves them is given ``prompt``. An answer is judged by the problem's own ``score`` where it has one, else by
comparing it with ``answer`` (``metrics.grading``); a problem with neither is solved and not judged. Some problems come
with a judge of steps, ``check``, which is exact.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np

from reason.answers import stated
from reason.datasets.documents import SPLITS, Corpus, Documents
from reason.datasets.subsets import hold_out
from reason.errors import DataError, nearest

VERSION = 1  # of the digest


@dataclass(frozen=True)
class JudgedLine:
    """One line of a solution, judged."""

    text: str
    kind: str  # in the words of the judge, such as "right" and "slip" of ``datasets.arithmetic``
    alive: bool  # the right answer can still be reached from here


@dataclass(frozen=True)
class Verdict:
    """A solution, judged line by line and by its answer. Empty lines are passed over."""

    lines: tuple[JudgedLine, ...]
    answer: int | None  # the number that is given, None where there is none
    correct: bool  # it is the right one
    derived: bool  # it is what the steps come to, all of them done

    @property
    def alive(self) -> bool:
        """Whether the right answer can still be reached from its end: an exact reward of a prefix."""
        return self.lines[-1].alive if self.lines else True


@dataclass(frozen=True)
class Problem:
    """A problem; ``check`` and ``score`` can be pickled."""

    id: str
    text: str
    answer: str | None = None  # the right one, in the notation of its source
    solution: str = ""  # worked out, and ending in its answer; "" where none is known
    level: int | str | None = None  # of difficulty, in the scale of its source
    check: Callable[[str], Verdict] | None = None  # judges a solution, also an unfinished one
    score: Callable[[str], bool] | None = None  # judges an answer

    @property
    def prompt(self) -> str:
        """What a solution follows: the problem, and the end of its line."""
        return self.text + "\n"

    @property
    def judged(self) -> bool:
        """Whether an answer can be told right from wrong."""
        return self.answer is not None or self.score is not None

    @property
    def fingerprint(self) -> str:
        """16 hex digits that tell problems apart by their words, whatever the spaces between them and their ids."""
        return hashlib.sha256(plain(self.text).encode()).hexdigest()[:16]


def plain(text: str) -> str:
    """``text`` with single spaces between its words: what repeats are found by."""
    return " ".join(text.split())


class Problems(Sequence[Problem]):
    """Problems in their order."""

    def __init__(self, rows: Iterable[Problem] = ()):
        self.rows = list(rows)

    @overload
    def __getitem__(self, index: int) -> Problem: ...
    @overload
    def __getitem__(self, index: slice) -> Problems: ...
    def __getitem__(self, index):
        return Problems(self.rows[index]) if isinstance(index, slice) else self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def id(self) -> np.ndarray:
        """(n,) of str."""
        return np.array([p.id for p in self.rows], dtype=str)

    def take(self, index: np.ndarray) -> Problems:
        """The problems at ``index``, in that order."""
        return Problems(self.rows[i] for i in index)

    def find(self, name: str) -> int:
        """The index of the problem with this id. Raises DataError, with the nearest id."""
        ids = [p.id for p in self.rows]
        if name in ids:
            return ids.index(name)
        close = nearest(name, ids)
        raise DataError(
            f"There is no problem {name!r} among these {len(ids):,}.",
            f"Did you mean {close!r}?" if close else f"Ids look like this: {', '.join(ids[:3]) or 'none'}.",
        )


@dataclass(frozen=True)
class ProblemSplits:
    """The four uses of problems; no problem has two. Only ``test`` is certain to hold any."""

    train: Problems
    valid: Problems
    fit: Problems
    test: Problems
    info: dict[str, Any] = field(default_factory=dict)


def view(parts: Mapping[str, Problems], fit: float, info: Mapping[str, Any]) -> ProblemSplits:
    """The splits, with the share ``fit`` of the validation problems held out for fitting."""
    valid, held = hold_out(parts["valid"], fit)
    counts = {"validation": len(valid), "fitting": len(held)}
    return ProblemSplits(parts["train"], valid, held, parts["test"], {**info, **counts})


@dataclass
class ProblemData:
    """A dataset that offers the view ``problems``, and ``text`` where their solutions are known."""

    name: str
    digest: str  # 32 hex digits over ids, texts, answers, solutions, levels, splits and ``VERSION``
    parts: dict[str, Problems]  # "train", "valid", "test"
    fit: float  # share of the validation problems that is held out for fitting
    info: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def problems(self) -> ProblemSplits:
        """The view: problems by split."""
        return view(self.parts, self.fit, self.info)

    def text(self) -> Corpus:
        """The view: the prompt and the solution of each problem that has one, by split.

        A solution that does not give its answer is ended with a line ``#### answer``, so that who is trained on
        it learns to give one.

        Raises:
            DataError: a split without any solution.
        """
        return Corpus.of({split: self._written(split) for split in SPLITS})

    def _written(self, split: str) -> Documents:
        solved = [p for p in self.parts[split] if p.solution]
        if not solved:
            raise DataError(
                f"{self.name}: no {split} problem has a worked solution, so there is no text to train on.",
                "Name a column of solutions (dataset.solution=COLUMN), or start from a model that is trained already.",
            )
        return Documents([p.id for p in solved], [p.prompt + ending(p) for p in solved])


def ending(problem: Problem) -> str:
    """Its solution, which gives its answer."""
    if problem.answer is None or stated(problem.solution) is not None:
        return problem.solution
    return f"{problem.solution.rstrip()}\n#### {problem.answer}"


def finish(
    name: str,
    parts: Mapping[str, Problems],
    fit: float,
    info: Mapping[str, Any] | None = None,
    notes: Iterable[str] = (),
) -> ProblemData:
    """Count ``parts`` and give them their digest."""
    said = list(notes)
    counts: dict[str, Any] = {f"{split}_problems": len(part) for split, part in parts.items()}
    counts["solutions"] = sum(bool(p.solution) for part in parts.values() for p in part)
    unjudged = {split: sum(not p.judged for p in part) for split, part in parts.items()}
    counts["without_answer"] = sum(unjudged.values())
    if counts["without_answer"]:
        where = ", ".join(f"{n:,} in {split}" for split, n in unjudged.items() if n)
        said.append(f"Problems without an answer, which are solved and not judged: {where}.")
    whole = hashlib.sha256(json.dumps([VERSION, dict(info or {})]).encode())
    for split in SPLITS:
        whole.update(f"{split} {len(parts[split])}\n".encode())
        for p in parts[split]:
            row = [p.id, p.text, p.answer, p.solution, p.level]
            whole.update(json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")
    return ProblemData(name, whole.hexdigest()[:32], dict(parts), fit, {**counts, **(info or {})}, said)
