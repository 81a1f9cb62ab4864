"""Solves problems with a policy and a reward: what evaluation, calibration, ``predict`` and ``inspect`` have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reason.backbones.generation import Sampling, Stop, Writer
from reason.backbones.tokens import Tokens
from reason.datasets.problems import Problem
from reason.methods.particle import ratings, searches, smc
from reason.methods.particle.allocation import pooled
from reason.methods.particle.audit import Recipe, Trail
from reason.methods.particle.calibrate import Calibrated, Calibration
from reason.methods.particle.config import ParticleConfig, spelt
from reason.methods.particle.driver import Driver, Outcome, Prefix, Reward, Task
from reason.methods.particle.judging import Flops
from reason.methods.particle.lineage import Population
from reason.methods.particle.network import Policy, opened_value
from reason.methods.particle.potentials import Potential
from reason.methods.particle.requests import Draws
from reason.methods.particle.rewards import Ensemble, Exact, Remembered, SelfCertainty
from reason.methods.particle.rules import Rules
from reason.methods.particle.smc import Filter
from reason.methods.particle.value import Value


class Constant:
    """No judgement: every prefix is as good as any other."""

    def __call__(self, prefixes: Sequence[Prefix]) -> np.ndarray:
        return np.full(len(prefixes), 0.5)


def prompt_of(config: ParticleConfig, tokens: Tokens) -> Callable[[Problem], list[int]]:
    """How a problem is put to a policy.

    Raises:
        ConfigError: a chat is asked for, and the model has no chat template.
    """
    chat = config.prompt == "chat" or (config.prompt == "auto" and bool(tokens.templates))
    if not chat:
        return lambda problem: tokens.prompt(problem.prompt)
    system = [{"role": "system", "content": config.system}] if config.system else []
    return lambda problem: tokens.chat([*system, {"role": "user", "content": problem.text}])


def sampling_of(config: ParticleConfig) -> Sampling:
    return Sampling(config.temperature, config.top_p)


def stop_of(config: ParticleConfig) -> Stop:
    return Stop(
        separators=(spelt(config.separator),) if config.separator else (), chunk=config.chunk, length=config.length or None,
        boxed=config.boxed,
    )  # fmt: skip


class Solver:
    """One policy at work, for as many problems as are asked of it.

    Args:
        config: the whole configuration of the run.
        policy: in memory.
        calibration: what ``Method.calibrate`` found; None: rewards are taken as they are.
        folder: where questions for people go, and their answers are looked for; None: nobody is asked.
    """

    def __init__(
        self, config: Any, policy: Policy, calibration: Mapping[str, Any] | None = None, folder: Path | None = None
    ):  # fmt: skip
        self.config: ParticleConfig = config.particle
        self.seed, self.offline, self.policy = config.seed, config.offline, policy
        self.sampling, self.stop = sampling_of(self.config), stop_of(self.config)
        self.tokens: Tokens = policy.lm.tokens
        self._prompt = prompt_of(self.config, self.tokens)
        self.calibration, self._folder = calibration, folder

    def prompt(self, problem: Problem) -> list[int]:
        """Token ids."""
        return self._prompt(problem)

    @cached_property
    def writer(self) -> Writer:
        return self.policy.lm.batch()

    # --- the reward -------------------------------------------------------------------------------------

    @cached_property
    def reward(self) -> Reward:
        """What judges prefixes, calibrated and with the ratings of people; each prefix is judged once."""
        reward = self.raw_reward
        if fitted := (self.calibration or {}).get("reward"):
            reward = Calibrated(reward, Calibration.from_json(fitted))
        told = self.config.reward
        if told.ratings or (told.questions and self._folder):
            accuracy = ratings.Accuracy(told.sensitivity, told.specificity)
            folder = self._folder or Path()
            answers = Path(told.ratings) if told.ratings else folder / ratings.ANSWERS
            if told.questions and self._folder:
                rater: ratings.Rater = ratings.Queue(folder / ratings.QUESTIONS, answers)
                reward = ratings.Rated(reward, rater, accuracy, told.questions)
            else:
                reward = ratings.Rated(reward, ratings.Replay(answers), accuracy, ratings.ALL)
        return Remembered(reward)

    @cached_property
    def raw_reward(self) -> Reward:
        """As it is, before anything was fitted to it."""
        members = {kind: self._member(kind) for kind in self.config.reward.kinds}
        if len(members) == 1:
            return next(iter(members.values()))
        return Ensemble(members, self.config.reward.combine, caution=self.config.reward.caution)

    @property
    def _prm(self) -> Any:
        """The external reward model: opened once for a run, as it may be large."""
        from reason.methods.particle.prm import open_prm

        kept, config = self.policy.__dict__, self.config.reward.prm  # with the network, whose life it shares
        if "prm" not in kept:
            device = next(self.policy.parameters(), torch.zeros(0)).device
            kept["prm"] = open_prm(config.source, config, offline=self.offline, device=device)
        return kept["prm"]

    def _member(self, kind: str) -> Reward:
        config = self.config.reward
        if kind == "exact":
            return Exact(None if config.noise.silent else config.noise)
        if kind == "value":
            head = self.policy.head
            assert head is not None
            known = opened_value(config.source, self.offline).seen if config.source else ()
            return Value(head, known)
        if kind == "prm":
            return self._prm
        if kind == "certainty":
            return SelfCertainty()
        return Rules() if kind == "rules" else Constant()

    @property
    def flops(self) -> Flops:
        """What writing and judging take."""
        kinds, head = self.config.reward.kinds, self.policy.head
        judged = 2.0 * sum(p.numel() for p in head.parameters()) if head is not None else 0.0
        read = 2.0 * self._prm.reward.parameters if "prm" in kinds else 0.0
        return Flops(self.policy.lm.flops_per_token, read, judged)

    # --- what is run ------------------------------------------------------------------------------------

    def filter(self, particles: int) -> Filter:
        config = self.config
        potential = Potential(config.weighing, config.tau, config.clip)
        length = (self.calibration or {}).get("steps", 10.0)
        anneal = "" if config.anneal == "none" else config.anneal
        return Filter(particles, potential, config.scheme, config.threshold, config.first, anneal, length)

    def recipe(self, problem: Problem, particles: int, seed: int | None = None) -> Recipe:
        """What is run on a problem."""
        config = self.config
        ratio = config.tau / config.hottest
        chains = config.chains
        temperatures = tuple(config.hottest * ratio ** (k / (chains - 1)) for k in range(chains)) if (
            config.algorithm == "tempering") else ()  # fmt: skip
        return Recipe(
            config.algorithm, self.filter(particles), self.draws(problem, seed),
            sweeps=config.sweeps if config.algorithm in ("gibbs", "tempering") else 1,
            chains=chains if config.algorithm in ("islands", "tempering") else 1, temperatures=temperatures,
            ancestor_sampling=config.ancestor_sampling, start=config.start, confidence=config.confidence,
        )  # fmt: skip

    def draws(self, problem: Problem, seed: int | None = None) -> Draws:
        """The same for particles and for plain samples: one particle is the first sample, token for token."""
        return Draws(self.seed if seed is None else seed, problem.id)

    def voters(self, trail: Trail) -> Population:
        """The particles that answer: of islands all, by their evidence; of several sweeps those after the burn-in."""
        config = self.config
        if config.algorithm in ("islands", "adaptive"):
            return pooled([chain[0] for chain in trail.chains])
        sweeps = trail.chains[-1]  # of parallel tempering the chain at the target
        return sweeps[0] if len(sweeps) == 1 else smc.pooled(sweeps[config.burn_in :] or sweeps[-1:])

    def run(
        self,
        tasks: Sequence[Task],
        *,
        reward: Reward | None = None,
        halted: Callable[[], str] = lambda: "",
    ) -> list[Outcome]:
        """What tasks come to, in their order. reward: another than the run's."""
        driver = Driver(
            self.writer, self.sampling, self.stop, reward or self.reward, steps=self.config.steps,
            width=self.config.together, halted=halted,
        )  # fmt: skip
        keyed = [Task(t.problem, t.prompt, t.algorithm, t.budget, i) for i, t in enumerate(tasks)]
        with torch.no_grad():
            return sorted(driver.run(keyed), key=lambda outcome: outcome.task.key)

    def filtered(self, problem: Problem, particles: int, **more: Any) -> Task:
        recipe = self.recipe(problem, particles, more.pop("seed", None))
        cap = more.pop("budget", None) or self.config.budget.tokens or None
        return Task(problem, self.prompt(problem), recipe.run, cap, **more)

    def samples(self, problem: Problem, count: int) -> Task:
        return Task(
            problem, self.prompt(problem), lambda root: searches.samples(root, count, self.draws(problem))
        )

    def beam(self, problem: Problem, beams: int) -> Task:
        draws, width = Draws(self.seed, problem.id, chain=1), self._width(beams)
        return Task(problem, self.prompt(problem), lambda root: searches.beam(root, beams, width, draws))

    def dvts(self, problem: Problem, beams: int) -> Task:
        draws, width = Draws(self.seed, problem.id, chain=2), self._width(beams)
        return Task(problem, self.prompt(problem), lambda root: searches.dvts(root, beams, width, draws))

    def greedy(self, problem: Problem) -> Task:
        return Task(problem, self.prompt(problem), searches.greedy)

    def _width(self, beams: int) -> int:
        """Children of a beam: as many as are asked for, or the largest number below that divides the beams."""
        return max(k for k in range(1, min(self.config.beam_width, beams) + 1) if beams % k == 0)
