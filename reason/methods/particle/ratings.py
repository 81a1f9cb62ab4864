"""People as judges of prefixes: what to ask them, what they said, and what follows from it.

A rating is an observation of whether a prefix is right, by somebody who is sometimes wrong: it moves the log-odds of
that prefix by log(sensitivity / (1 - specificity)) if it was called right, and by log((1 - sensitivity) / specificity) if
wrong. The prefixes that are asked about are those where an answer tells most. Nothing waits longer than it is told to: an
answer that does not come is none. What was asked and answered is recorded, and a record can be replayed.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.special import entr, expit

from reason.backbones.generation import stream, uniforms
from reason.errors import ConfigError, DataError
from reason.files import append_json_lines
from reason.methods.particle.driver import Prefix, Reward
from reason.methods.particle.rewards import disagreement, logits, parts, seen

QUESTIONS, ANSWERS = "questions.jsonl", "ratings.jsonl"  # in a run's folder
ALL = 1 << 30  # questions: nothing is asked, so all may be looked up


def key_of(prefix: Prefix) -> str:
    """What a prefix is called in files: the problem's fingerprint and the node's id."""
    return f"{prefix.problem.fingerprint}:{prefix.node.id}"


Rater = Callable[[Sequence[Prefix], Sequence[float]], Mapping[str, bool]]
"""Asked about prefixes, with how much (nats) each answer would tell; answers by key, those that there are."""


@dataclass(frozen=True)
class Accuracy:
    """How often a rater calls a right prefix right (sensitivity) and a wrong one wrong (specificity).

    Raises:
        ConfigError: they say nothing together, or are not probabilities.
    """

    sensitivity: float = 0.9
    specificity: float = 0.9

    def __post_init__(self):
        if not (0 < self.sensitivity < 1 and 0 < self.specificity < 1):
            raise ConfigError(
                f"Sensitivity {self.sensitivity} and specificity {self.specificity} of ratings must lie between 0 and 1.",
                "Nobody is always right; 0.99 is near it.",
            )
        if self.sensitivity + self.specificity <= 1:
            raise ConfigError(
                f"Ratings with sensitivity {self.sensitivity} and specificity {self.specificity} are no better than chance.",
                "Their sum must be above 1.",
            )

    def evidence(self, good: bool) -> float:
        """What a rating adds to the log-odds of a prefix."""
        a, b = self.sensitivity, self.specificity
        return math.log(a / (1 - b)) if good else math.log((1 - a) / b)

    def information(self, reward: np.ndarray) -> np.ndarray:
        """(n,) nats that a rating is expected to tell about prefixes that are right with probability (n,)."""
        a, b = self.sensitivity, self.specificity

        def entropy(p: np.ndarray | float) -> np.ndarray:
            return entr(p) + entr(1 - np.asarray(p))

        return entropy(reward * a + (1 - reward) * (1 - b)) - reward * entropy(a) - (1 - reward) * entropy(b)


class Rated:
    """A reward with the ratings of people.

    What a prefix was given first, it keeps: a rating that comes later counts in a replay, or a new run.

    Args:
        reward: without ratings.
        rater: ``Queue``, ``Replay`` or ``Simulated``.
        accuracy: of the rater.
        questions: prefixes that are asked about each time that rewards are asked for, at most.
        record: JSON lines of what was asked and answered; null = no answer came. None: not kept.
    """

    def __init__(
        self, reward: Reward, rater: Rater, accuracy: Accuracy, questions: int = 1, record: Path | None = None
    ):  # fmt: skip
        self.reward, self.rater, self.accuracy = reward, rater, accuracy
        self.questions, self.record = questions, record
        self.seen = seen(reward)
        self._asked: dict[str, bool | None] = {}
        self._judged: set[str] = set()

    def __call__(self, prefixes: Sequence[Prefix]) -> np.ndarray:
        """As the reward's, rated."""
        found = np.asarray(self.reward(prefixes), np.float64)
        given, members = parts(found)
        keys = [key_of(prefix) for prefix in prefixes]
        self._ask(prefixes, keys, given, members)
        self._judged |= set(keys)
        evidence = [
            0.0 if (good := self._asked.get(key)) is None else self.accuracy.evidence(good) for key in keys
        ]
        rated = np.where(evidence, expit(logits(given) + evidence), given)
        return rated if found.ndim == 1 else np.column_stack([rated, members])

    def _ask(
        self, prefixes: Sequence[Prefix], keys: Sequence[str], given: np.ndarray, members: np.ndarray
    ) -> None:
        worth = self.accuracy.information(given)
        if members.shape[1] > 1:  # a near tie tells more where the members do not agree either
            worth = worth * (1 + disagreement(members))
        new = {key: i for i, key in enumerate(keys) if key not in self._judged}
        chosen = sorted(new.values(), key=lambda i: (-worth[i], keys[i]))[: self.questions]
        if not chosen:
            return
        said = self.rater([prefixes[i] for i in chosen], [float(worth[i]) for i in chosen])
        answers = {keys[i]: said.get(keys[i]) for i in chosen}
        self._asked |= answers
        if self.record is not None:
            append_json_lines(self.record, [{"key": key, "good": good} for key, good in answers.items()])


# --- raters ---------------------------------------------------------------------------------------------


class Queue:
    """Questions go to a file, answers come from another, both JSON lines; people write the latter.

    A question has key, problem, solution (as far as it goes) and information; an answer has key and good (true or false).
    The last answer to a key counts.

    Args:
        seconds: to wait for answers; 0 takes those that are there.
    """

    def __init__(self, questions: Path, answers: Path, seconds: float = 0.0, every: float = 0.5):
        self.questions, self.answers, self.seconds, self.every = questions, answers, seconds, every
        self._listed = {row["key"] for row in _rows(questions)}

    def __call__(self, prefixes: Sequence[Prefix], information: Sequence[float]) -> Mapping[str, bool]:
        known = read_ratings(self.answers)
        rows = [
            {
                "key": key,
                "problem": p.problem.text,
                "solution": p.node.solution,
                "information": round(worth, 4),
            }
            for p, worth in zip(prefixes, information, strict=True)
            if (key := key_of(p)) not in self._listed and key not in known
        ]
        append_json_lines(self.questions, rows)
        self._listed |= {row["key"] for row in rows}
        asked, end = {key_of(p) for p in prefixes}, time.monotonic() + self.seconds
        while asked - set(known) and time.monotonic() < end:
            time.sleep(min(self.every, max(end - time.monotonic(), 0)))
            known = read_ratings(self.answers)
        return {key: good for key in asked if (good := known.get(key)) is not None}


class Replay:
    """The answers of a record, and no questions."""

    def __init__(self, record: Path):
        self._known = read_ratings(record)

    def __call__(self, prefixes: Sequence[Prefix], information: Sequence[float]) -> Mapping[str, bool]:
        found = {key: self._known.get(key) for key in map(key_of, prefixes)}
        return {key: good for key, good in found.items() if good is not None}


class Simulated:
    """A rater who knows the truth and is wrong as often as ``accuracy`` says; always in the same way about a prefix.

    Args:
        truth: an exact reward: 0 or 1.
    """

    def __init__(self, truth: Reward, accuracy: Accuracy, seed: int = 0):
        self.truth, self.accuracy, self.seed = truth, accuracy, seed

    def __call__(self, prefixes: Sequence[Prefix], information: Sequence[float]) -> Mapping[str, bool]:
        right = np.asarray(self.truth(prefixes)) > 0.5
        said = {}
        for prefix, good in zip(prefixes, right.tolist(), strict=True):
            name = key_of(prefix)
            u = float(uniforms(np.array([stream(self.seed, name)], np.uint64), np.zeros(1, np.int64))[0])
            said[name] = good == (u < (self.accuracy.sensitivity if good else self.accuracy.specificity))
        return said


def read_ratings(path: Path) -> dict[str, bool | None]:
    """Answers by key, the last of each; none where there is no file.

    Raises:
        DataError: a line that is no rating.
    """
    found = {}
    for number, row in enumerate(_rows(path), 1):
        good = row.get("good", "")
        if not isinstance(row.get("key"), str) or not (good is None or isinstance(good, bool)):
            raise DataError(
                f"{path}, rating {number}, is none: {json.dumps(row)[:80]}",
                'A rating is a line {"key": "...", "good": true} (or false), with the key of its question.',
            )
        found[row["key"]] = good
    return found


def _rows(path: Path) -> list[dict]:
    if not path.is_file():
        return []
    rows = []
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("it is no object")
        except ValueError as error:
            if number == len(lines):  # being written
                break
            raise DataError(
                f"{path}, line {number}, is not valid JSON: {error}.", "Correct or delete that line."
            ) from error
        rows.append(row)
    return rows
