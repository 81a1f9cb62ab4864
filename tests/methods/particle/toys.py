"""State-space models small enough to enumerate, which answer the requests of the algorithms."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable

import numpy as np

from reason.backbones.generation import uniforms
from reason.methods.particle.lineage import Node
from reason.methods.particle.potentials import Potential
from reason.methods.particle.requests import Algorithm, Extend, Splice


class Toy:
    """A chain of symbols whose next symbol depends on the last, whose reward is a function of the symbols so far.

    stop: symbols after which a path is finished. longest: symbols at most.
    """

    def __init__(
        self,
        first: np.ndarray,
        transition: np.ndarray,
        reward: Callable[[tuple[int, ...]], float],
        longest: int,
        stop: frozenset[int] = frozenset(),
    ):
        self.first, self.transition, self.reward = first, transition, reward
        self.longest, self.stop = longest, stop
        self._cdf = np.vstack([transition, first]).cumsum(1)
        self._cdf[:, -1] = 1.0
        self._rewards: dict[tuple[int, ...], float] = {}
        self.drawn = 0  # chunks

    def child(self, node: Node, symbol: int) -> Node:
        path = (*_symbols(node), symbol)
        if path not in self._rewards:
            self._rewards[path] = self.reward(path)
        finish = "eos" if symbol in self.stop else "steps" if len(path) == self.longest else ""
        child = Node(node, (symbol,), str(symbol), 0.0, self._rewards[path], finish)
        child.log_p = float(np.log(self.law(node)[symbol]))
        child.symbols = path  # type: ignore[attr-defined]
        return child

    def law(self, node: Node) -> np.ndarray:
        return self.first if node.parent is None else self.transition[node.tokens[-1]]

    def answer(self, request) -> list[Node]:
        if isinstance(request, Splice):
            return [self._spliced(prefix, request.path) for prefix in request.prefixes]  # type: ignore[misc]
        assert isinstance(request, Extend)
        last = [node.tokens[-1] if node.parent else -1 for node in request.nodes]
        u = uniforms(request.streams, request.ticks)
        if request.greedy:
            symbols = [int(self.law(node).argmax()) for node in request.nodes]
        else:
            symbols = (self._cdf[last] <= u[:, None]).sum(1).tolist()
        self.drawn += len(symbols)
        return [self.child(node, s) for node, s in zip(request.nodes, symbols, strict=True)]

    def _spliced(self, prefix: Node, path) -> Node | None:
        for step in path:
            if prefix.finished or self.law(prefix)[step.tokens[0]] == 0:
                return None
            prefix = self.child(prefix, step.tokens[0])
        return prefix if prefix.finished else None

    def run(self, algorithm: Algorithm):
        try:
            request = next(algorithm)
            while True:
                request = algorithm.send(self.answer(request))
        except StopIteration as end:
            return end.value

    def posterior(self, potential: Potential) -> tuple[dict[tuple[int, ...], float], float]:
        """The probability of every path, and the log-evidence, by enumeration."""
        found: dict[tuple[int, ...], float] = {}

        def visit(node: Node, log_p: float) -> None:
            if node.finished:
                found[_symbols(node)] = log_p
                return
            for symbol in np.flatnonzero(self.law(node)):
                child = self.child(node, int(symbol))
                visit(child, log_p + child.log_p + potential(child))

        visit(Node(None), 0.0)
        top = max(found.values())
        total = sum(np.exp(v - top) for v in found.values())
        return {k: float(np.exp(v - top) / total) for k, v in found.items()}, float(top + np.log(total))


def _symbols(node: Node) -> tuple[int, ...]:
    return getattr(node, "symbols", ())


symbols = _symbols


def hidden_markov(seed: int = 0, states: int = 3, length: int = 5) -> Toy:
    """3 states, 5 steps, random potentials: 243 paths."""
    rng = np.random.default_rng(seed)
    transition = rng.dirichlet(np.ones(states), states)
    table = rng.uniform(0.05, 0.95, (length, states))
    return Toy(
        np.full(states, 1 / states), transition, lambda path: float(table[len(path) - 1, path[-1]]), length
    )


def stopping() -> Toy:
    """Each step draws a quality (good with chance .6, reward .9; bad .3) and then stops with chance .4; 4 steps at most.

    Symbols: 0 good, 1 bad, 2 good and last, 3 bad and last.
    """
    law = np.array([0.36, 0.24, 0.24, 0.16])
    return Toy(law, np.tile(law, (4, 1)), lambda path: 0.3 if path[-1] % 2 else 0.9, 4, frozenset({2, 3}))


def total_variation(counts: dict, law: dict) -> float:
    total = sum(counts.values())
    return 0.5 * sum(abs(counts.get(k, 0) / total - law.get(k, 0)) for k in {*counts, *law})


def occupation(populations) -> dict:
    """Pooled weights of all particles, by path."""
    found: dict = defaultdict(float)
    for population in populations:
        for node, weight in zip(population.nodes, population.weights, strict=True):
            found[_symbols(node)] += weight
    return found


ALL = list(itertools.product(("multinomial", "systematic", "stratified", "residual"), (0.0, 0.5, 1.0)))
