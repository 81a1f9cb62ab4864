"""Sampled solutions cut into prefixes, each with what it came to: what rewards are trained, weighed and calibrated on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from reason.answers import stated
from reason.backbones.generation import Sampling, Stop, Writer
from reason.datasets.problems import Problem
from reason.errors import DataError
from reason.methods.particle.driver import Driver, Prefix, Reward, Task
from reason.methods.particle.lineage import Node
from reason.methods.particle.requests import Algorithm, Draws, together
from reason.methods.particle.searches import samples
from reason.methods.particle.value import known_of
from reason.metrics.grading import grade


@dataclass(frozen=True)
class Rollouts:
    """n prefixes of solutions of some problems. ``Examples`` for the trainer of a value head.

    known: (n, D + F) float32 what a value head reads: the policy's state, and signs of the path; (n, 0) from a server. label: (n,) the chance that the solution ends right.
    step: (n,) chunks. problem: (n,) index into ``fingerprints``. finished: (n,) bool.
    reward: (n,), members: (n, m): what a reward said of them, NaN and m = 0 where none was asked.
    """

    known: Tensor
    label: np.ndarray
    step: np.ndarray
    problem: np.ndarray
    finished: np.ndarray
    reward: np.ndarray
    members: np.ndarray
    fingerprints: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.label)

    @property
    def seen(self) -> frozenset[str]:
        """Fingerprints of the problems: what is trained or fitted on these has seen them."""
        return frozenset(self.fingerprints[i] for i in np.unique(self.problem))

    def order(self, rng: np.random.Generator, batch_size: int) -> np.ndarray:
        return rng.permutation(len(self))

    def batch(self, index: np.ndarray) -> dict[str, Tensor]:
        """known (n, D + F) and label (n,) float32."""
        return {
            "known": self.known[torch.from_numpy(np.asarray(index))],
            "label": torch.from_numpy(self.label[index]).float(),
        }

    def take(self, index: np.ndarray) -> Rollouts:
        """The prefixes at ``index`` (or where a mask is True)."""
        index = np.arange(len(self))[index]
        columns = {
            name: getattr(self, name)[index]
            for name in ("label", "step", "problem", "finished", "reward", "members")
        }
        return replace(self, known=self.known[torch.from_numpy(index)], **columns)

    def split(self, share: float, seed: int = 0) -> tuple[Rollouts, Rollouts]:
        """Those of most problems, and those of the share that is held out. No problem is in both."""
        order = np.random.default_rng(seed).permutation(len(self.fingerprints))
        held = np.isin(self.problem, order[: round(share * len(order))])
        return self.take(~held), self.take(held)


def solved(problem: Problem, node: Node) -> bool:
    """Whether a solution gives the right answer. Without any it is wrong.

    Raises:
        DataError: nobody knows the right answer.
    """
    if not problem.judged:
        raise DataError(
            f"Problem {problem.id!r} has no answer, so nothing can be learnt from its solutions.",
            "Leave it out, or give its answer.",
        )
    answer = stated(node.solution)
    if problem.score is not None:
        return answer is not None and bool(problem.score(answer))
    assert problem.answer is not None
    return grade(answer, problem.answer)


def collect(
    batch: Writer,
    sampling: Sampling,
    stop: Stop,
    problems: Sequence[Problem],
    prompts: Sequence[Sequence[int]],
    *,
    count: int,
    seed: int = 0,
    completions: int = 0,
    reward: Reward | None = None,
    steps: int = 40,
    width: int = 128,
    grade: Callable[[Problem, Node], bool] = solved,
) -> Rollouts:
    """Sample ``count`` solutions of each problem, and label every prefix of them.

    Args:
        batch, sampling, stop, steps, width: see ``Driver``.
        prompts: token ids of each problem.
        completions: an unfinished prefix is labelled by the share of so many completions of it that end right (Wang et al.
            2024, Math-Shepherd); 0: by what it came to itself, which costs nothing and is right on average.
        reward: asked about every prefix, so that it can be calibrated or weighed; None: none.
        grade: whether a solution is right.

    Raises:
        DataError: a problem whose answer is not known, or there are none.
    """
    recorder = _Recorder(reward)
    driver = Driver(batch, sampling, stop, recorder, steps=steps, width=width)
    tasks = [
        Task(p, prompt, lambda root, p=p: _written(root, count, completions, Draws(seed, p.id)), key=i)
        for i, (p, prompt) in enumerate(zip(problems, prompts, strict=True))
    ]
    if not tasks:
        raise DataError("There are no problems to sample solutions of.")
    nodes: list[Node] = []
    label: list[float] = []
    place: list[int] = []
    for outcome in sorted(driver.run(tasks), key=lambda o: o.task.key):
        ends, completed = outcome.result
        problem = outcome.task.problem
        shares = {
            name: float(np.mean([grade(problem, e) for e in several])) for name, several in completed.items()
        }
        for end in ends:
            own = float(grade(problem, end))
            for node in end.path:
                nodes.append(node)
                label.append(own if node.finished else shares.get(node.id, own))
                place.append(outcome.task.key)
    return Rollouts(
        recorder.known(nodes),
        np.array(label),
        np.array([node.step for node in nodes]),
        np.array(place),
        np.array([node.finished for node in nodes]),
        np.array([node.reward if reward else np.nan for node in nodes]),
        np.array([node.members for node in nodes], np.float64).reshape(len(nodes), -1),
        tuple(problem.fingerprint for problem in problems),
    )


def _written(
    root: Node, count: int, completions: int, draws: Draws
) -> Algorithm[tuple[list[Node], dict[str, list[Node]]]]:
    """Solutions, and completions of each of their unfinished prefixes by its id."""
    ends = yield from samples(root, count, draws, scored=True)
    prefixes = (
        {node.id: node for end in ends for node in end.path if not node.finished} if completions else {}
    )
    several = yield from together(
        [
            samples(node, completions, replace(draws, sweep=1 + i), scored=False)
            for i, node in enumerate(prefixes.values())
        ]
    )
    return ends, dict(zip(prefixes, several, strict=True))


class _Recorder:
    """Keeps what is known of all prefixes that are judged."""

    def __init__(self, reward: Reward | None):
        self.reward = reward
        self._asked: dict[Node, Prefix] = {}

    def known(self, nodes: Sequence[Node]) -> Tensor:
        """(n, D + F) float32 on CPU, see ``value.known_of``; (n, 0) where the policy shows no states."""
        prefixes = [self._asked[node] for node in nodes]
        if any(prefix.hidden is None for prefix in prefixes):
            return torch.zeros(len(nodes), 0)
        return known_of(prefixes).float().cpu()

    def __call__(self, prefixes: Sequence[Prefix]) -> np.ndarray:
        self._asked |= {prefix.node: prefix for prefix in prefixes}
        return np.full(len(prefixes), 0.5) if self.reward is None else self.reward(prefixes)
