"""Problems that people bring: the replies of ``predict`` and the figures of ``inspect``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from reason.datasets.problems import Problem
from reason.errors import DataError, ReasonError, unknown
from reason.methods.base import Context
from reason.methods.figures import Figure
from reason.methods.particle.audit import Trail
from reason.methods.particle.driver import Outcome
from reason.methods.particle.network import Policy
from reason.methods.particle.selection import Answer, Candidates, judge
from reason.methods.particle.show import figures
from reason.methods.particle.solver import Solver

KEYS = ("problem", "answer", "depth", "budget", "seed", "id")
CONTESTED_OF = 10  # problems that the most contested one is looked for among
MOST = 4096  # particles


@dataclass(frozen=True)
class Request:
    """A valid request. depth: particles. budget: tokens drawn at most; None = as many as it takes."""

    problem: Problem
    depth: int
    budget: int | None
    seed: int | None


def parse(request: Any, depth: int) -> Request:
    """The request, if it is valid.

    Raises:
        DataError: what is wrong with it, for its author.
    """
    if not isinstance(request, dict) or not isinstance(request.get("problem"), str):
        raise DataError(
            'A request is {"problem": "text"}; it may also have '
            + ", ".join(f'"{k}"' for k in KEYS[1:])
            + "."
        )
    if not request["problem"].strip():
        raise DataError("The problem is empty.", "Give its text.")
    for name in request:
        if name not in KEYS:
            raise unknown("key of a request", name, KEYS)
    for name, least, most in (("depth", 1, MOST), ("budget", 1, 10**12), ("seed", 0, 2**53)):
        value = request.get(name)
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most
        ):
            raise DataError(
                f'"{name}" is {json.dumps(value)}; it must be a whole number from {least:,} to {most:,}.'
            )
    answer = request.get("answer")
    if answer is not None and (isinstance(answer, bool) or not isinstance(answer, str | int | float)):
        raise DataError(f'"answer" is {json.dumps(answer)}; it must be text or a number.')
    name = request.get("id")
    if name is None:  # equal problems get equal particles
        name = hashlib.sha256(request["problem"].encode()).hexdigest()[:16]
    right = None if answer is None else str(answer)
    problem = Problem(str(name), request["problem"].rstrip("\n"), right)
    return Request(problem, request.get("depth") or depth, request.get("budget"), request.get("seed"))


class Answering:
    """Solves the problems of requests, all of them in one batch.

    Args:
        depth: particles, where a request names none.
        now: seconds on a clock that only goes forward.
    """

    def __init__(self, solver: Solver, depth: int, flops_per_token: float | None, now: Callable[[], float]):
        self.solver, self.depth, self.flops, self._now = solver, depth, flops_per_token, now

    def all(self, requests: Sequence[Any]) -> list[dict[str, Any]]:
        """A reply for each request, in order."""
        replies: dict[int, dict[str, Any]] = {}
        valid: dict[int, Request] = {}
        context = self.solver.writer.context
        for i, request in enumerate(requests):
            try:
                one = parse(request, self.depth)
                if "exact" in self.solver.config.reward.kinds:
                    raise DataError(
                        "This run is rewarded by its dataset's judge of steps, which does not know this problem.",
                        "Evaluate it with another reward first: reason evaluate RUN particle.reward.kind=certainty",
                    )
                size = len(self.solver.prompt(one.problem))
                if size >= context:
                    raise DataError(
                        f"The problem has {size:,} tokens; the model has room for {context:,}, its answer included."
                    )
                valid[i] = one
            except ReasonError as error:
                replies[i] = {"error": str(error).replace("\n", " ")}
        tasks = [
            self.solver.filtered(one.problem, one.depth, seed=one.seed, budget=one.budget)
            for one in valid.values()
        ]
        outcomes = self.solver.run(tasks, halted=self._caps())
        for (i, one), outcome in zip(valid.items(), outcomes, strict=True):
            replies[i] = self._reply(one, outcome)
        return [replies[i] for i in range(len(requests))]

    def _caps(self) -> Callable[[], str]:
        """Why no further token may be drawn; "" while there is time and money."""
        budget, writer = self.solver.config.budget, self.solver.writer
        start, spent = self._now(), writer.drawn + writer.read

        def halted() -> str:
            if budget.seconds and self._now() - start >= budget.seconds:
                return "out of time"
            tokens = writer.drawn + writer.read - spent
            if budget.money and tokens * budget.price / 1e6 >= budget.money:
                return "out of money"
            return ""

        return halted

    def _reply(self, request: Request, outcome: Outcome) -> dict[str, Any]:
        trail: Trail = outcome.result
        answer = answer_of(self.solver, request.problem, trail)
        population = self.solver.voters(trail)
        reply: dict[str, Any] = {
            "answer": answer.value, "mass": round(answer.mass, 4), "margin": round(answer.margin, 4),
            "contested": answer.contested, "particles": request.depth, "tokens": outcome.ledger.drawn,
            "status": population.status,
            "solution": answer.node.solution if answer.node else None,
            "answers": [
                {"answer": c.value, "mass": round(c.mass, 4), "particles": c.candidates} for c in answer.classes[:5]
            ],
        }  # fmt: skip
        if self.flops is not None:
            reply["flops"] = self.flops * (outcome.ledger.drawn + outcome.ledger.read + outcome.ledger.prompt)
        if price := self.solver.config.budget.price:
            reply["cost"] = price * (outcome.ledger.drawn + outcome.ledger.read + outcome.ledger.prompt) / 1e6
        if request.problem.answer is not None:
            reply["right"] = judge([request.problem], [answer.value])[0]
        if answer.value is None:
            reply["note"] = _why_none(population.status, population.finished)
        return reply


def _why_none(status: str, finished: np.ndarray) -> str:
    if status == "dead":
        return "The reward gave every particle the weight zero, so none of them answers."
    if not finished.any():
        return "No particle came to an end: allow more tokens or steps."
    return "No solution states an answer: it is read from \\boxed{...}, '#### ...' or a line 'answer ...'."


def answer_of(solver: Solver, problem: Problem, trail: Trail) -> Answer:
    """The answer of the final selection."""
    candidates = Candidates.of_populations([solver.voters(trail)])
    uniform = solver.draws(problem).uniforms("selection").random()
    return candidates.answer(0, candidates.select(solver.config.final_selection, uniform=uniform))


class Inspection:
    """What happened on one problem."""

    def __init__(self, config: Any, ctx: Context, model: Policy):
        self.config, self.ctx = config, ctx
        self.solver = Solver(config, model, ctx.calibration)

    def figures(self, example: str) -> list[Figure]:
        """See ``Particle.inspect``.

        Raises:
            DataError: no such problem.
        """
        depth = self.config.depth
        if example.lstrip().startswith("{"):
            try:
                told = json.loads(example)
            except ValueError as error:
                raise DataError(
                    f"The problem is not valid JSON: {error}.", 'Write {"problem": "text"}.'
                ) from error
            request = parse(told, depth)
            problem, depth = request.problem, request.depth
            (outcome,) = self.solver.run([self.solver.filtered(problem, depth)])
        else:
            problem, outcome = self._found(example, depth)
        trail: Trail = outcome.result
        shown = [population for chain in trail.chains for population in chain]
        if self.config.particle.algorithm == "tempering":
            shown = trail.chains[-1]
        uniform = float(self.solver.draws(problem).uniforms("selection").random()[0])
        pool = self.solver.voters(trail) if len(shown) > 1 else None
        return figures(problem, shown, self.config.particle.final_selection, pool, uniform)

    def _found(self, example: str, depth: int) -> tuple[Problem, Outcome]:
        test = self.ctx.data.test
        if example:
            problem = test[test.find(example)]
            (outcome,) = self.solver.run([self.solver.filtered(problem, depth)])
            return problem, outcome
        problems = list(test[:CONTESTED_OF])
        outcomes = self.solver.run([self.solver.filtered(p, depth) for p in problems])
        margins = [
            answer_of(self.solver, p, o.result).margin for p, o in zip(problems, outcomes, strict=True)
        ]
        chosen = int(np.argmin(margins))
        return problems[chosen], outcomes[chosen]
