"""Signs that a population is not what it should be, and what to do about each.

Every reading needs a population alone, finished or halted. A reading that cannot be taken (a correlation over two
solutions) has no value and raises no alarm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from reason.answers import stated
from reason.methods.particle.genealogy import root_ancestors, split_sweeps, written
from reason.methods.particle.lineage import Node, Population
from reason.methods.particle.selection import Candidates

LEAST_ESS = 0.1  # share of N, two rounds in a row
SATURATED = 0.999  # a reward above this, or below 1 less this
MOST_SATURATED = 0.8
MOST_CORRELATED = 0.6
FEWEST = 8  # solutions that a correlation is told of
MOST_BAD = 0.2  # share of solutions that loop, are cut off, or give no answer
CUT_OFF = ("length", "steps", "")  # how a solution ends that did not end itself
REPEATS, LOOP, LONGEST = 4, 12, 16  # a loop: so often the same, so many tokens in all, of so many at most


MONITORS = (
    "effective size", "round with one ancestor left", "saturated rewards", "reward follows length", "in a loop", "cut off",
    "without an answer", "contested",
)  # fmt: skip


@dataclass(frozen=True)
class Reading:
    """What a monitor says. value: None where there is nothing to read. alarm: the limit is passed; then see ``advice``."""

    name: str
    value: float | None
    limit: float
    alarm: bool
    advice: str


def readings(population: Population, length: float | None = None) -> list[Reading]:
    """All monitors, in the order of ``MONITORS``.

    Args:
        length: steps that a solution is expected to take; None: as many as those of this population do.
    """
    nodes = population.nodes
    finished = [node for node in nodes if node.finished]
    distinct = list(dict.fromkeys(finished))
    if length is None:
        length = float(np.mean([node.step for node in finished or nodes]))
    rewards = np.array([node.reward for node in written(population)])
    rewards = rewards[~np.isnan(rewards)]
    candidates = Candidates.of_populations([population])
    return [
        _below("effective size", _worst_ess(population), LEAST_ESS,
            "Weights collapse on one particle: raise the temperature of the reward, or calibrate it."),
        _below("round with one ancestor left", _round_of_one_ancestor(population), length / 2,
            "All descend from one early chunk: more particles, a lower resampling threshold, or anneal=ess."),
        _above("saturated rewards", _share(np.maximum(rewards, 1 - rewards) > SATURATED), MOST_SATURATED,
            "The reward is surer than it can be: calibrate it."),
        _above("reward follows length", _correlation(distinct), MOST_CORRELATED,
            "The reward may pay for length: look at its highest-scored solutions."),
        _above("in a loop", _share([loops(node.all_tokens) for node in nodes]), MOST_BAD,
            "Texts repeat themselves: raise the temperature of the policy, or cap the tokens of a step."),
        _above("cut off", _share([node.finish in CUT_OFF for node in nodes]), MOST_BAD,
            "Solutions do not end: check the stop strings and the prompt, or allow more tokens or steps."),
        _above("without an answer", _share([stated(node.solution) is None for node in finished]), MOST_BAD,
            "No answer can be read: ask in the prompt for a final \\boxed{...} or '#### ...'."),
        _above("contested", float(candidates.contested()[0]) if finished else None, 0.0,
            "The best-rewarded answer is not the one that wins the vote: trust neither without a look."),
    ]  # fmt: skip


def loops(tokens: Sequence[int]) -> bool:
    """Whether a run of 1 to 16 tokens is repeated, at once, 4 times or more, over 12 tokens at least."""
    text = np.asarray(tokens)
    for period in range(1, min(LONGEST, len(text) // 2) + 1):
        needed = max(REPEATS * period, LOOP) - period  # tokens that equal the one a period before
        differs = np.flatnonzero(text[period:] != text[:-period])
        ends = np.concatenate([[-1], differs, [len(text) - period]])
        if np.diff(ends).max() - 1 >= needed:
            return True
    return False


def _below(name: str, value: float | None, limit: float, advice: str) -> Reading:
    return Reading(name, value, limit, value is not None and value < limit, advice)


def _above(name: str, value: float | None, limit: float, advice: str) -> Reading:
    return Reading(name, value, limit, value is not None and value > limit, advice)


def _share(flags: Sequence[bool] | np.ndarray) -> float | None:
    return float(np.mean(flags)) if len(flags) else None


def _worst_ess(population: Population) -> float | None:
    """The smallest ESS / N that two rounds in a row do not exceed."""
    pairs = [
        max(a.ess, b.ess) / len(a.nodes)
        for rounds in split_sweeps(population.rounds)
        for a, b in pairwise(rounds)
    ]
    return min(pairs, default=None)


def _round_of_one_ancestor(population: Population) -> float | None:
    """The first round after which all particles descend from one first chunk."""
    if len(population.nodes) == 1:
        return None
    found = [
        t
        for rounds in split_sweeps(population.rounds)
        for t, round in enumerate(rounds, 1)
        if root_ancestors(round) == 1
    ]
    return float(min(found)) if found else None


def _correlation(nodes: Sequence[Node]) -> float | None:
    """Of reward and length over solutions."""
    rewards = np.array([node.reward for node in nodes])
    lengths = np.array([node.length for node in nodes], float)
    if len(nodes) < FEWEST or np.isnan(rewards).any() or not rewards.std() or not lengths.std():
        return None
    return float(np.corrcoef(rewards, lengths)[0, 1])
