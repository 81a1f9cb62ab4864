"""A policy that does sums with slips, without a language model: real problems and texts, and their exact judge."""

from __future__ import annotations

import hashlib
import re
from functools import partial

import numpy as np

from reason.backbones.generation import uniforms
from reason.datasets.arithmetic import STEP, Sum, check
from reason.datasets.problems import Problem
from reason.methods.particle.lineage import Node
from reason.methods.particle.requests import Algorithm, Extend


def problem(
    name: str = "p", start: int = 7, operations=(("+", 5), ("*", 3), ("-", 4), ("*", 8)), modulus: int = 97
):
    """The problem and its sum."""
    asked = Sum(start, tuple(operations), modulus)
    return Problem(name, asked.question, str(asked.answer), check=partial(check, asked)), asked


class Policy:
    """Writes a line at a time: the next step, with a slip at chance ``slip``; a slip is mended at chance ``redo``.

    The reward is the exact judge behind noise: logit +-2 and ``sigma`` times a normal number that only depends on the prefix.
    """

    def __init__(self, asked: Sum, slip: float = 0.35, redo: float = 0.3, sigma: float = 1.0):
        self.asked, self.slip, self.redo, self.sigma = asked, slip, redo, sigma

    def run(self, algorithm: Algorithm):
        try:
            request = next(algorithm)
            while True:
                assert isinstance(request, Extend)
                request = algorithm.send(self.extend(request))
        except StopIteration as end:
            return end.value

    def extend(self, request: Extend) -> list[Node]:
        draws = [uniforms(np.repeat(request.streams, 3), (request.ticks[:, None] + np.arange(3)).ravel())]
        return [
            self.child(node, *u)
            for node, u in zip(request.nodes, draws[0].reshape(-1, 3).tolist(), strict=True)
        ]

    def child(self, node: Node, again: float, wrong: float, result: float) -> Node:
        lines = [line for line in node.solution.split("\n") if line]
        steps = [STEP.fullmatch(line) for line in lines]
        done = sum(1 for step in steps if step and not step[1])
        value = int(steps[-1][5]) if lines and steps[-1] else self.asked.start
        verdict = check(self.asked, node.solution)
        redone = lines and verdict.lines[-1].kind == "slip" and not lines[-1].startswith("redo")
        if redone and again < self.redo:
            number = re.split("[-+*]", lines[-1].split("=")[0])[0]
            text = f"redo {lines[-1].split('=')[0]}={self._result(int(number), done - 1, 1.0, 0.0)}\n"
            finish = ""
        elif done == self.asked.depth:
            text, finish = f"answer {value}\n", "eos"
        else:
            sign, number = self.asked.operations[done]
            text, finish = f"{value}{sign}{number}={self._result(value, done, wrong, result)}\n", ""
        child = Node(node, tuple(text.encode()), text, -1.0, finish=finish)
        child.reward = self.reward(child)
        return child

    def _result(self, value: int, done: int, wrong: float, result: float) -> int:
        right = self.asked.apply(value, *self.asked.operations[done])
        return (right + 1 + int(result * 5)) % self.asked.modulus if wrong < self.slip else right

    def reward(self, node: Node) -> float:
        seed = int(hashlib.sha256(node.solution.encode()).hexdigest()[:8], 16)
        noise = np.random.default_rng(seed).normal()
        sure = 2.0 if check(self.asked, node.solution).alive else -2.0
        return float(1 / (1 + np.exp(-(sure + self.sigma * noise))))
