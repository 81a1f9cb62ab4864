"""From the solutions of a search to one answer, by every rule, for many problems at once.

A *candidate* is a finished solution whose weight is not zero. What is unfinished is never one, whatever its reward; a
candidate that gives no answer has no vote, and is chosen only where no other is there. Classes of equal answers
are found once, numbered by first appearance, so a prefix of a list of samples (best of 4 of 32) is a cut
of arrays, and so is every rule.

    argmax_last    the highest reward of the whole solution
    argmax_orm     the highest score of another scorer, which is given
    majority       most candidates
    weighted_vote  most posterior weight
    reward_vote    largest sum of rewards (weighted best-of-n, where candidates are samples)
    lineage_vote   most candidates, copies of one particle counted once: copies are no independent votes
    sample         one candidate, drawn by weight
    oracle         a right one if there is any: no rule but a bound, for diagnosis

Resampling chooses who is continued, selection who answers; nothing is resampled for the answer's sake.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from reason.answers import stated
from reason.datasets.problems import Problem
from reason.errors import ConfigError, unknown
from reason.methods.particle.lineage import Node, Population
from reason.metrics import voting
from reason.metrics.grading import grader, simple

RULES = (
    "weighted_vote",
    "argmax_last",
    "argmax_orm",
    "majority",
    "reward_vote",
    "lineage_vote",
    "sample",
    "oracle",
)
NONE = voting.NONE


@dataclass(frozen=True)
class Selection:
    """What a rule chose for each of P problems.

    index: (P,) int64 places among the candidates, NONE where there is no answer. mass: (P,) the part of all votes that the
    answer has, by reward where the rule sums rewards, by count where it counts, else by posterior weight.
    margin: (P,) mass less that of the next answer; below 0 where the rule chose against the vote.
    """

    index: np.ndarray
    mass: np.ndarray
    margin: np.ndarray


@dataclass(frozen=True)
class Class:
    """Candidates whose answers are equal. mass: their part of the posterior weight. reward: the highest of theirs."""

    value: str
    candidates: int
    mass: float
    reward: float


@dataclass(frozen=True)
class Answer:
    """The answer to one problem; ``value`` is None where there is none.

    node: the solution that gave it. contested: the highest reward and the weighted vote give different answers.
    classes: what there was to choose from, the heaviest first.
    """

    value: str | None
    node: Node | None
    mass: float
    margin: float
    contested: bool
    classes: tuple[Class, ...]


@dataclass(frozen=True)
class Candidates:
    """The solutions of P problems, up to N each.

    nodes: for each problem; what is no candidate keeps its place. answers: (P, N) object, what they state, None = no
    answer. present: (P, N) bool, is a candidate. kinds: (P, N) int64 classes of equal answers. log_weights: (P, N)
    unnormalised. rewards: (P, N), NaN = none. copies: (P, N) bool, the very node of an earlier place.
    """

    nodes: tuple[tuple[Node, ...], ...]
    answers: np.ndarray
    present: np.ndarray
    kinds: np.ndarray
    log_weights: np.ndarray
    rewards: np.ndarray
    copies: np.ndarray

    @classmethod
    def of(
        cls,
        solutions: Sequence[Sequence[Node]],
        log_weights: Sequence[np.ndarray] | None = None,
        same: voting.Same | None = None,
    ) -> Candidates:
        """From lists of solutions, such as samples or beams.

        Args:
            log_weights: (N,) each, unnormalised; None: all alike.
            same: whether two answers are equal; default: the shared grader's.
        """
        shape = len(solutions), max(map(len, solutions), default=0)
        answers = np.full(shape, None, object)
        present, copies = np.zeros(shape, bool), np.zeros(shape, bool)
        kinds, rewards = np.full(shape, NONE), np.full(shape, np.nan)
        weighed = np.full(shape, -np.inf)
        for p, nodes in enumerate(solutions):
            n = len(nodes)
            weighed[p, :n] = 0.0 if log_weights is None else log_weights[p]
            present[p, :n] = [node.finished for node in nodes]
            said: dict[int, str | None] = {}
            for i, node in enumerate(nodes):
                copies[p, i] = id(node) in said
                if not present[p, i]:
                    said.setdefault(id(node), None)
                elif not copies[p, i]:
                    said[id(node)] = stated(node.solution)
                answers[p, i] = said[id(node)]
            rewards[p, :n] = [node.reward for node in nodes]
            kinds[p, :n] = voting.classes(list(answers[p, :n]), same)
        present &= weighed > -np.inf
        kinds[~present] = NONE
        return cls(tuple(map(tuple, solutions)), answers, present, kinds, weighed, rewards, copies)

    @classmethod
    def of_populations(cls, populations: Sequence[Population], same: voting.Same | None = None) -> Candidates:
        """From weighted particles. A dead population has no candidate; several sweeps of a problem are pooled before."""
        return cls.of([p.nodes for p in populations], [p.log_weights for p in populations], same)

    def first(self, n: int) -> Candidates:
        """The first ``n`` solutions of each problem: what would be there if no more had been drawn."""
        return self._cut(slice(None), slice(n))

    @property
    def weights(self) -> np.ndarray:
        """(P, N), summing to 1 over candidates that have an answer, or over all where none has; else 0."""
        some = self.kinds != NONE
        counted = np.where(some.any(1, keepdims=True), some, self.present)
        logs = np.where(counted, self.log_weights, -np.inf)
        top = logs.max(1, initial=-np.inf, keepdims=True)
        weights = np.exp(logs - np.where(np.isneginf(top), 0.0, top))
        total = weights.sum(1, keepdims=True)
        return np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)

    def select(
        self,
        rule: str,
        *,
        uniform: np.ndarray | None = None,
        scores: np.ndarray | None = None,
        correct: np.ndarray | None = None,
    ) -> Selection:
        """One solution for each problem.

        Args:
            rule: one of ``RULES``.
            uniform: (P,) in [0, 1), for ``sample``: a number for each problem.
            scores: (P, N), for ``argmax_orm``.
            correct: (P, N), for ``oracle``: see ``correct``.

        Raises:
            ConfigError: an unknown rule, or one that needs rewards where there are none.
        """
        if rule not in RULES:
            raise unknown("final_selection", rule, RULES)
        problems, n = self.present.shape
        if not problems or not n:
            nothing = np.zeros(problems)
            return Selection(np.full(problems, NONE), nothing, nothing)
        if rule == "majority":
            return self._vote(self.present.astype(float))
        if rule == "weighted_vote":
            return self._vote(self.weights)
        if rule == "lineage_vote":
            return self._vote((self.present & ~self.copies).astype(float))
        if rule == "reward_vote":
            return self._vote(self._scores(self.rewards, rule, 0.0))
        if rule == "argmax_last":
            return self._chosen(voting.argmax(self._scores(self.rewards, rule), self.kinds))
        if rule == "argmax_orm":
            assert scores is not None
            return self._chosen(voting.argmax(self._scores(scores, rule), self.kinds))
        if rule == "sample":
            assert uniform is not None
            return self._chosen(voting.sample(self.weights, uniform, self.kinds))
        assert correct is not None
        best = voting.argmax(np.where(self.present, correct + self.weights / 2, -np.inf), self.kinds)
        return self._chosen(best)

    def correct(self, problems: Sequence[Problem]) -> np.ndarray:
        """(P, N) bool: which solutions give the right answer; False for what is no candidate, and where nobody knows."""
        places: dict[tuple[int, str], list[int]] = {}
        for p, i in zip(*np.nonzero(self.kinds != NONE), strict=True):
            places.setdefault((int(p), str(self.answers[p, i])), []).append(int(i))
        judged = judge([problems[p] for p, _ in places], [answer for _, answer in places])
        found = np.zeros(self.present.shape, bool)
        for (p, _), right in zip(places, judged, strict=True):
            found[p, places[p, _]] = bool(right)
        return found

    def contested(self) -> np.ndarray:
        """(P,) bool: the highest reward gives another answer than the weighted vote. False where nothing has a reward."""
        found = np.zeros(len(self.nodes), bool)
        scored = (self.present & ~np.isnan(self.rewards)).any(1)
        if scored.any():
            rewards = np.where(self.present & ~np.isnan(self.rewards), self.rewards, -np.inf)
            best, voted = voting.argmax(rewards, self.kinds), voting.vote(self.kinds, self.weights)
            found = scored & (self.kinds[np.arange(len(found)), best] != voted.winner)
        return found

    def answer(self, p: int, chosen: Selection) -> Answer:
        """What ``chosen`` says of problem ``p``."""
        one = self._cut(slice(p, p + 1), slice(None))
        kinds, weights, rewards = one.kinds[0], one.weights[0], one.rewards[0]
        classes = []
        for kind in range(int(kinds.max(initial=NONE)) + 1):
            there = np.flatnonzero(kinds == kind)
            if len(there):  # a class may have only appeared beyond a cut
                known = rewards[there][~np.isnan(rewards[there])]
                best = float(known.max()) if len(known) else float("nan")
                classes.append(
                    Class(self.answers[p, there[0]], len(there), float(weights[there].sum()), best)
                )
        i = int(chosen.index[p])
        return Answer(
            None if i == NONE else self.answers[p, i],
            None if i == NONE else self.nodes[p][i],
            float(chosen.mass[p]),
            float(chosen.margin[p]),
            bool(one.contested()[0]),
            tuple(sorted(classes, key=lambda c: -c.mass)),
        )

    def _cut(self, problems: slice, places: slice) -> Candidates:
        arrays = (self.answers, self.present, self.kinds, self.log_weights, self.rewards, self.copies)
        nodes = tuple(several[places] for several in self.nodes[problems])
        return Candidates(nodes, *(array[problems, places] for array in arrays))

    def _scores(self, scores: np.ndarray, rule: str, absent: float = -np.inf) -> np.ndarray:
        """Scores of candidates; ``absent`` for what is none."""
        if np.isnan(scores[self.present]).any():
            raise ConfigError(
                f"final_selection={rule} needs a reward for every finished solution, and one has none.",
                "Use weighted_vote or majority where particles are weighed without rewards.",
            )
        return np.where(self.present, scores, absent)

    def _vote(self, votes: np.ndarray) -> Selection:
        found = voting.vote(self.kinds, votes)
        return Selection(found.first, found.mass, found.margin)

    def _chosen(self, index: np.ndarray) -> Selection:
        """A rule that is no vote: mass and margin are those of the posterior weights."""
        rows, weights = np.arange(len(index)), self.weights
        kind = self.kinds[rows, index]
        answered = kind != NONE
        mine = (self.kinds == kind[:, None]) & answered[:, None]
        mass = (weights * mine).sum(1)
        next_ = voting.vote(np.where(mine, NONE, self.kinds), weights)
        margin = np.where(answered, mass - next_.mass * (1 - mass), 0.0)
        present = self.present[rows, index]
        return Selection(np.where(present, index, NONE), mass, margin)


# --- the rivals on one list of samples ----------------------------------------------------------------

ON_SAMPLES = {
    "self_consistency": "majority",
    "best_of_n": "argmax_last",
    "weighted_best_of_n": "reward_vote",
}


def nested(
    samples: Candidates, correct: np.ndarray, sizes: Sequence[int]
) -> dict[int, dict[str, np.ndarray]]:
    """What the rivals score with the first n of the same samples, for each n of ``sizes``.

    Args:
        correct: (P, N) as ``samples.correct`` gives it.

    Returns:
        For each n and name (``ON_SAMPLES``, "sample" = the mean of n single samples, "oracle" = any is right)
        (P,) float in [0, 1]: whether the problem is solved.
    """
    found: dict[int, dict[str, np.ndarray]] = {}
    for n in sizes:
        cut, right = samples.first(n), correct[:, :n]
        found[n] = {name: solved(cut.select(rule), right) for name, rule in ON_SAMPLES.items()}
        found[n]["sample"] = right.sum(1) / max(1, min(n, right.shape[1]))
        found[n]["oracle"] = right.any(1).astype(float)
    return found


def solved(chosen: Selection, correct: np.ndarray) -> np.ndarray:
    """(P,) float: 1 where the chosen solution is right. correct: (P, N)."""
    if not correct.shape[1]:
        return np.zeros(len(chosen.index))
    right = correct[np.arange(len(chosen.index)), chosen.index]
    return np.where(chosen.index == NONE, 0.0, right.astype(float))


def judge(problems: Sequence[Problem], answers: Sequence[str | None]) -> list[bool | None]:
    """Whether each answer is right: by the problem's own judge if it has one, else by the shared grader. No answer is wrong;
    None where the problem does not say what is right."""
    found: dict[int, bool] = {}
    hard: list[int] = []  # mathematics: for the workers, all at once
    for i, (problem, answer) in enumerate(zip(problems, answers, strict=True)):
        if answer is not None and problem.score is None and problem.answer is not None:
            if simple(answer) and simple(problem.answer):
                found[i] = grader().grade(answer, problem.answer)
            else:
                hard.append(i)
    golds = [str(problems[i].answer) for i in hard]
    found |= zip(hard, grader().grade_all([answers[i] for i in hard], golds), strict=True)
    return [
        None if not problem.judged
        else False if answer is None
        else found[i] if i in found
        else bool(problem.score(answer)) if problem.score is not None
        else None
        for i, (problem, answer) in enumerate(zip(problems, answers, strict=True))
    ]  # fmt: skip
