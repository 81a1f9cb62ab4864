"""Judges of prefixes: the exact one, simple ones, and several as one.

A reward is a callable (``driver.Reward``). One that was trained or fitted has ``seen``, the fingerprints of the problems
that this was done on; it may not be used on them to report anything (``refuse_seen``).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from scipy.special import expit, logit

from reason.datasets.problems import Problem, Verdict
from reason.errors import ConfigError, DataError, RunError, unknown
from reason.methods.particle.driver import Prefix, Reward
from reason.methods.particle.noise import Channel, Noise
from reason.methods.particle.potentials import SUREST

RULES = ("mean", "pessimistic", "min", "median")


def logits(rewards: np.ndarray) -> np.ndarray:
    """Log-odds of rewards in [0, 1]; those of 0 and 1 are finite."""
    return logit(np.clip(rewards, SUREST, 1 - SUREST))


def parts(found: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What a reward returned, as (n,) rewards and (n, m) what its members said; m = 0 where it has none."""
    found = np.asarray(found, np.float64)
    return (found, found[:, None][:, 1:]) if found.ndim == 1 else (found[:, 0], found[:, 1:])


def seen(reward: Any) -> frozenset[str]:
    """Fingerprints of the problems that a reward was trained or fitted on."""
    return getattr(reward, "seen", frozenset())


def refuse_seen(reward: Any, problems: Iterable[Problem]) -> None:
    """Refuse a reward that was trained or fitted on any of ``problems``, which are tested.

    Raises:
        ConfigError: it was.
    """
    refuse_known("The reward was trained or calibrated", "the reward", seen(reward), problems)


def refuse_known(what: str, name: str, known: frozenset[str], problems: Iterable[Problem]) -> None:
    """Refuse what has learnt from any of ``problems``, which are tested. known: fingerprints of what it has learnt from.

    Raises:
        ConfigError: it has.
    """
    several = [problem for problem in problems if problem.fingerprint in known] if known else []
    if several:
        raise ConfigError(
            f"{what} on {len(several):,} of the problems that it would be tested on, such as {several[0].id!r}.",
            f"Test on other problems, or train {name} on the training split of this dataset.",
        )


# --- exact and simple ones ------------------------------------------------------------------------------


class Exact:
    """The problem's own judge of steps: 1 while the right answer can be reached, else 0.

    A finished solution is judged by its answer. The last line of an unfinished one counts once it is whole.

    Args:
        noise: a channel that the judgement comes through; None: it is given as it is.

    Raises:
        DataError: when called, for a problem that has no judge.
    """

    def __init__(self, noise: Noise | None = None):
        self._channel = Channel(noise) if noise else None
        self._alive = lru_cache(1 << 16)(_alive)  # many prefixes say the same

    def __call__(self, prefixes: Sequence[Prefix]) -> np.ndarray:
        """(n,)"""
        alive = np.empty(len(prefixes), bool)
        for i, (problem, node, _) in enumerate(prefixes):
            if problem.check is None:
                raise DataError(
                    f"Problem {problem.id!r} has no exact judge of its steps.",
                    "Choose another reward, or dataset=arithmetic, whose steps are judged exactly.",
                )
            alive[i] = self._alive(problem, node.solution, node.finished)
        return expit(self._channel(prefixes, alive)) if self._channel else alive.astype(np.float64)


def _alive(problem: Problem, solution: str, finished: bool) -> bool:
    assert problem.check is not None
    if not finished:
        solution = solution[: solution.rfind("\n") + 1]
    verdict: Verdict = problem.check(solution)
    return verdict.correct if finished else verdict.alive


class SelfCertainty:
    """The mean probability (geometric) of the tokens of the last chunk: what the policy itself says."""

    def __call__(self, prefixes: Sequence[Prefix]) -> np.ndarray:
        """(n,)"""
        return np.array([math.exp(p.node.log_p / max(len(p.node.tokens), 1)) for p in prefixes])


class Remembered:
    """A reward that is asked once for each prefix, and answers the same ever after.

    Args:
        keep: prefixes that are remembered, the last that were asked for.
    """

    def __init__(self, reward: Reward, keep: int = 1 << 18):
        self.reward, self.keep = reward, keep
        self.seen = seen(reward)
        self._known: OrderedDict[tuple[str, str, bool], np.ndarray] = OrderedDict()

    def __call__(self, prefixes: Sequence[Prefix]) -> np.ndarray:
        """As the reward's."""
        keys = [(p.problem.fingerprint, p.node.id, p.node.finished) for p in prefixes]
        new = {key: p for key, p in zip(keys, prefixes, strict=True) if key not in self._known}
        if new:
            found = np.asarray(self.reward(list(new.values())))
            if len(found) != len(new):
                raise RunError(f"The reward gave {len(found)} scores for {len(new)} prefixes.")
            self._known.update(zip(new, found, strict=True))
        answer = np.array([self._known[key] for key in keys])
        for key in keys:
            self._known.move_to_end(key)
        while len(self._known) > self.keep:
            self._known.popitem(last=False)
        return answer


# --- several as one -------------------------------------------------------------------------------------


def combine(
    members: np.ndarray, rule: str = "mean", weights: np.ndarray | None = None, pessimism: float = 1.0
) -> np.ndarray:
    """(n,) logits of rewards (n, m).

    mean: the sum of weight times logit, by default their mean. pessimistic: that, less ``pessimism`` times the standard deviation
    of the logits. min: the least. median: the middle one, which outliers do not move.
    """
    z = logits(members)
    if rule in ("mean", "pessimistic"):
        mean = z.mean(1) if weights is None else z @ weights
        return mean - pessimism * z.std(1) if rule == "pessimistic" else mean
    if rule == "min":
        return z.min(1)
    if rule == "median":
        return np.median(z, 1)
    raise unknown("rule of an ensemble", rule, RULES)


def disagreement(members: np.ndarray) -> np.ndarray:
    """(n,) standard deviation of the logits of rewards (n, m)."""
    return logits(members).std(1)


class Ensemble:
    """Several rewards as one, in log-odds. What each said is kept on the nodes, in the order of ``names``.

    Args:
        members: by name.
        rule: see ``combine``. weights: of each member, "mean" and "pessimistic" alone; None: equal, summing to 1. bias: added.
        caution: where members disagree, the combined log-odds are divided by sqrt(1 + std^2 / caution); 0 = not.

    Raises:
        ConfigError: no members, an unknown rule, or weights that do not fit.
    """

    def __init__(
        self,
        members: Mapping[str, Reward],
        rule: str = "mean",
        weights: Mapping[str, float] | None = None,
        *,
        bias: float = 0.0,
        pessimism: float = 1.0,
        caution: float = 0.0,
    ):
        if not members:
            raise ConfigError("An ensemble of rewards needs at least one member.")
        if rule not in RULES:
            raise unknown("rule of an ensemble", rule, RULES)
        if weights is not None and set(weights) != set(members):
            raise ConfigError(
                f"The weights of the ensemble are for {', '.join(sorted(weights))}; its members are "
                f"{', '.join(members)}.",
                "Give one weight for each member.",
            )
        self.names, self._members = tuple(members), list(members.values())
        self.rule, self.bias, self.pessimism, self.caution = rule, bias, pessimism, caution
        self.weights = None if weights is None else np.array([weights[name] for name in self.names])
        self.seen = frozenset().union(*map(seen, self._members))

    def __call__(self, prefixes: Sequence[Prefix]) -> np.ndarray:
        """(n, 1 + m): the reward, and what each member said."""
        said = np.stack([parts(member(prefixes))[0] for member in self._members], 1)
        wrong = ~((said >= 0) & (said <= 1))
        if wrong.any():  # told here, where it is known whose it is
            i, k = np.argwhere(wrong)[0]
            raise _no_reward(prefixes[i], float(said[i, k]), self.names[k])
        z = combine(said, self.rule, self.weights, self.pessimism) + self.bias
        if self.caution:
            z = z / np.sqrt(1 + disagreement(said) ** 2 / self.caution)
        return np.column_stack([expit(z), said])


def _no_reward(prefix: Prefix, reward: float, name: str) -> RunError:
    return RunError(
        f"Member {name!r} of the rewards gave {reward:g} for problem {prefix.problem.id!r}, step {prefix.node.step}; "
        "it must lie between 0 and 1.",
        "Check the reward model: its precision, and the token that its scores are read at.",
    )


def stack(members: np.ndarray, outcome: np.ndarray, ridge: float = 1e-3) -> tuple[np.ndarray, float]:
    """Weights (m,), none below 0, and a bias that predict outcomes best: logistic stacking.

    Args:
        members: (n, m) rewards of prefixes of held-out problems. outcome: (n,) in [0, 1], the chance that each ended right.
        ridge: times the squared weights is added to the mean NLL; it decides between members that say the same.
    """
    from scipy.optimize import minimize

    z, y = logits(members), np.asarray(outcome, np.float64)
    m = z.shape[1]

    def objective(x: np.ndarray) -> tuple[float, np.ndarray]:
        s = z @ x[:m] + x[m]
        error = (expit(s) - y) / len(y)
        slope = np.append(z.T @ error + 2 * ridge * x[:m], error.sum())
        return float((np.logaddexp(0, s) - y * s).mean() + ridge * (x[:m] ** 2).sum()), slope

    start = np.append(np.full(m, 1 / m), 0.0)
    found = minimize(objective, start, jac=True, method="L-BFGS-B", bounds=[(0, None)] * m + [(None, None)])
    return found.x[:m], float(found.x[m])
