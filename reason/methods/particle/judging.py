"""From what was solved to rows: particle filtering and its rivals on the same problems, with the tokens of each."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from reason.datasets.problems import Problem
from reason.methods.base import Evaluation, Ratio, Rival
from reason.methods.particle.driver import Ledger
from reason.methods.particle.genealogy import root_ancestors
from reason.methods.particle.lineage import Node, Population
from reason.methods.particle.monitors import MONITORS, readings
from reason.methods.particle.selection import ON_SAMPLES, Candidates, solved

ACCURACY = "Exact match"
REPORTED = ("weighted_vote", "argmax_last", "majority", "reward_vote", "lineage_vote", "sample")
MEANINGS = {
    "self-consistency": "the most frequent answer of as many samples",
    "best-of-n": "the highest reward among as many samples",
    "weighted best-of-n": "the answer with the largest sum of rewards over as many samples",
    "one sample": "the mean over as many samples of each alone",
    "oracle": "right if any of as many samples is; a bound, no method",
    "beam search": "beams of the highest reward, as many at a time",
    "DVTS": "subtrees that each go on with their best of a few steps",
}
EQUAL = " at equal tokens"
ALARM = "alarm "  # before the name of a monitor, in the rows
TIMED_AS = {
    "self-consistency": "samples", "best-of-n": "samples", "weighted best-of-n": "samples", "beam search": "beam",
    "DVTS": "dvts",
}  # fmt: skip
RULE_OF = {
    "self-consistency": ON_SAMPLES["self_consistency"],
    "best-of-n": ON_SAMPLES["best_of_n"],
    "weighted best-of-n": ON_SAMPLES["weighted_best_of_n"],
}


class Flops(NamedTuple):
    """Multiply-adds x 2: of the policy for a token (None: not known), of an external reward model for a token, which it reads
    once, its cache kept, and of a value head for a prefix."""

    token: float | None
    reward_token: float
    judged: float


@dataclass(frozen=True)
class Spent:
    """What each of P problems has cost, (P,) each: tokens drawn, tokens read otherwise, prefixes judged."""

    drawn: np.ndarray
    read: np.ndarray
    judged: np.ndarray

    @classmethod
    def of(cls, ledgers: Sequence[Ledger], prompts: np.ndarray) -> Spent:
        def column(name: str) -> np.ndarray:
            return np.array([getattr(ledger, name) for ledger in ledgers], float)

        return cls(column("drawn"), column("read") + prompts, column("judged"))

    def cost(self, flops: Flops, rewarded: bool = True) -> dict[str, float]:
        """The counters of an ``Evaluation``; without "flops" where nobody knows the policy's size.

        rewarded: whether the answer needed rewards; else nothing was judged.
        """
        tokens, read = float(self.drawn.sum()), float(self.read.sum())
        judged = float(self.judged.sum()) if rewarded else 0.0
        found = {"tokens": tokens, "prompt_tokens": read, "judged": judged}
        if flops.token is None:
            return found
        each = flops.token + (flops.reward_token if rewarded else 0.0)
        return {**found, "flops": each * (tokens + read) + flops.judged * judged}


class Samples:
    """Plain samples of P problems, of which the first n are what n samples would be.

    Args:
        solutions: of each problem.
        prompts: (P,) tokens of the prompts.
    """

    def __init__(self, problems: Sequence[Problem], solutions: Sequence[Sequence[Node]], prompts: np.ndarray):
        self._candidates = Candidates.of(solutions)
        self._right = self._candidates.correct(problems)
        shape = self._right.shape
        self._tokens = np.zeros(shape)
        for p, nodes in enumerate(solutions):
            self._tokens[p, : len(nodes)] = [node.length for node in nodes]
        self._prompts = prompts

    def outcomes(self, counts: np.ndarray) -> tuple[dict[str, np.ndarray], Spent]:
        """What the rivals score with the first ``counts`` (P,) samples of each problem: (P,) each; and what these cost."""
        inside = np.arange(self._right.shape[1]) < counts[:, None]
        cut = replace(
            self._candidates, present=self._candidates.present & inside,
            kinds=np.where(inside, self._candidates.kinds, -1),
        )  # fmt: skip
        right = self._right & inside
        found = {name: solved(cut.select(rule), right) for name, rule in RULE_OF.items()}
        found["one sample"] = right.sum(1) / np.maximum(inside.sum(1), 1)
        found["oracle"] = right.any(1).astype(float)
        drawn = (self._tokens * inside).sum(1)
        return found, Spent(drawn, self._prompts, inside.sum(1).astype(float))

    def affordable(self, tokens: np.ndarray) -> np.ndarray:
        """(P,) how many samples come nearest to ``tokens`` (P,); at least one."""
        if not self._tokens.size:  # a rank without a problem
            return np.ones(len(tokens), np.int64)
        return 1 + np.abs(np.cumsum(self._tokens, 1) - tokens[:, None]).argmin(1)


def evaluation(
    problems: Sequence[Problem],
    depth: int,
    populations: Sequence[Population],
    spent: Spent,
    rule: str,
    uniform: np.ndarray,
    flops: Flops,
    samples: Samples | None,
    searches: dict[str, tuple[Sequence[Sequence[Node]], Spent]],
    monitored: bool = False,
) -> Evaluation:
    """One row per problem.

    Args:
        populations: of each problem, that which answers. spent: on it.
        rule: the final selection. uniform: (P,) what the rule ``sample`` draws by.
        samples: None: no rivals of plain samples.
        searches: solutions that beam search and DVTS have found, by name, and what they cost.
        monitored: whether the populations are read by the monitors, too.
    """
    candidates = Candidates.of_populations(populations)
    right = candidates.correct(problems)
    judged = np.array([float(problem.judged) for problem in problems])
    by_rule = {name: solved(candidates.select(name, uniform=uniform), right) * judged for name in REPORTED}
    columns: dict[str, np.ndarray] = {
        "depth_used": np.full(len(problems), float(depth)),
        "judged": judged,
        "exact": by_rule[rule],
        "found": right.any(1).astype(float) * judged,
        **{f"by_{name}": column for name, column in by_rule.items()},
        "tokens": spent.drawn,
        "answered": (candidates.kinds != -1).any(1).astype(float),
        "contested": candidates.contested().astype(float),
        "dead": np.array([float(p.status == "dead") for p in populations]),
        "ess": np.array([_least_ess(p) for p in populations]),
        "ancestors": np.array([_ancestors(p) for p in populations]),
        "log_z": np.array([p.log_z for p in populations], float),
        "steps": np.array([np.mean([n.step for n in p.nodes]) for p in populations], float),
    }
    if monitored:
        read = [readings(population) for population in populations]
        columns |= {
            ALARM + name: np.array([float(r[k].alarm) for r in read]) for k, name in enumerate(MONITORS)
        }
    rivals: dict[str, Rival] = {}
    if samples is not None:
        found, cost = samples.outcomes(np.full(len(problems), depth))
        alone = replace(cost, drawn=cost.drawn / depth)
        for name, column in found.items():
            told = (alone if name == "one sample" else cost).cost(flops, "best-of-n" in name)
            _add(rivals, columns, name, column * judged, told)
    for name, (solutions, cost) in searches.items():
        several = Candidates.of(solutions)
        column = solved(several.select("argmax_last"), several.correct(problems)) * judged
        _add(rivals, columns, name, column, cost.cost(flops))
    if samples is not None:
        found, cost = samples.outcomes(samples.affordable(spent.drawn))
        for name in RULE_OF:
            _add(rivals, columns, name, found[name] * judged, cost.cost(flops, "best-of-n" in name), EQUAL)
    rows = pa.table({
        "id": pa.array([p.id for p in problems], pa.string()),
        "level": np.array([_level(p) for p in problems]),
        **columns,
    })  # fmt: skip
    metrics = {
        ACCURACY: Ratio("exact", "judged"),
        "Oracle": Ratio("found", "judged"),
        **{f"Exact match by {name}": Ratio(f"by_{name}", "judged") for name in REPORTED if name != rule},
        "Answered": Ratio("answered"),
        "Contested": Ratio("contested", larger_is_better=False),
        "Dead": Ratio("dead", larger_is_better=False),
        "Least effective size": Ratio("ess"),
        "First steps that survive": Ratio("ancestors"),
        "Steps": Ratio("steps"),
        "Tokens": Ratio("tokens", larger_is_better=False),
    }
    return Evaluation(rows, ACCURACY, metrics, spent.cost(flops), _alarms, rivals)


def _level(problem: Problem) -> float:
    """The level of difficulty as a number: that in "Level 5" is 5; 0 where there is none."""
    digits = re.search(r"\d+", str(problem.level))
    return float(digits[0]) if digits else 0.0


def _alarms(rows: pa.Table) -> dict[str, float]:
    """The share of problems in which each monitor raised its alarm, where any was asked."""
    names = [name for name in rows.column_names if name.startswith(ALARM)]
    return {name: float(rows.column(name).to_numpy().mean()) for name in names}


def _add(
    rivals: dict[str, Rival], columns: dict[str, np.ndarray], rule: str, column: np.ndarray, cost: dict[str, float],
    suffix: str = "",
) -> None:  # fmt: skip
    name, meaning, timed_as = rule + suffix, MEANINGS[rule], TIMED_AS.get(rule, "")
    if suffix:
        meaning = meaning.replace("as many samples", "as many samples as the filter's tokens pay for")
        timed_as = ""  # what was timed is another number of samples
    columns[name] = column
    rivals[name] = Rival(
        meaning, {ACCURACY: Ratio(name, "judged")}, cost, timed_as, rule == "oracle", rule if suffix else ""
    )


def _least_ess(population: Population) -> float:
    """The smallest effective sample size of its rounds, as a share of the particles."""
    return min((r.ess / len(r.nodes) for r in population.rounds), default=1.0)


def _ancestors(population: Population) -> float:
    """Different first steps among the last particles, as a share of them."""
    if not population.rounds:
        return 1.0
    return root_ancestors(population.rounds[-1]) / len(population.rounds[-1].nodes)
