"""What the algorithms ask for, and what answers them.

An algorithm is a generator for one problem: plain code that yields a request and is sent the answer. It knows neither
a language model nor other problems; a *driver* collects the requests of many problems and answers them
together (``driver`` by a language model with one cache, the tests by a hidden Markov model).

Randomness is counted, not drawn: each token of each slot has a uniform number of its own, a function of a stream
(seed, problem, sweep, chain, slot) and a tick, the count of tokens that the slot has drawn in this sweep. It is not the token's
position: a slot that was given a shorter prefix would use again the very numbers that its dead particle
had drawn, and that decided its death. With one particle both are the same.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from reason.backbones.generation import stream, uniforms
from reason.methods.particle.lineage import Node


@dataclass(frozen=True)
class Extend:
    """One chunk more for each of n nodes, which are unfinished. The answer: their n children, in order.

    streams: (n,) uint64, ticks: (n,) int64: which uniform numbers each draws its tokens by.
    scored: whether the children need a reward; "finished" = only those that are.
    greedy: the likeliest token always; streams and ticks are then not read.
    """

    nodes: Sequence[Node]
    streams: np.ndarray
    ticks: np.ndarray
    scored: bool | str = True
    greedy: bool = False


@dataclass(frozen=True)
class Splice:
    """The chunks of ``path`` after each of n other prefixes, in place of those they were drawn after.

    The answer: for each prefix its last node, with the log-probability and the reward of every step in its new
    place; None where the path cannot follow there (the prefix is finished, or it would grow too long).
    """

    prefixes: Sequence[Node]
    path: Sequence[Node]


class Halted(Exception):
    """Thrown into an algorithm by its driver: a cap is reached. It returns what it has."""


Request = Extend | Splice
Result = TypeVar("Result")
Answer = Sequence[Any]  # of nodes; an answer to Splice may hold None
Algorithm = Generator[Request, Answer, Result]


class Uniforms:
    """The uniform numbers of one stream, one after the other."""

    def __init__(self, stream: int):
        self._stream, self._tick = np.array([stream], np.uint64), 0

    def random(self, count: int = 1) -> np.ndarray:
        """(count,) in [0, 1)."""
        ticks = np.arange(self._tick, self._tick + count)
        self._tick += count
        return uniforms(np.repeat(self._stream, count), ticks)


@dataclass(frozen=True)
class Draws:
    """Where the randomness of one problem comes from."""

    seed: int
    problem: str
    sweep: int = 0
    chain: int = 0

    def streams(self, slots: int) -> np.ndarray:
        """(slots,) uint64: the streams of the slots' tokens."""
        return np.array([self._stream("slot", slot) for slot in range(slots)], np.uint64)

    def uniforms(self, purpose: str, number: int = 0) -> Uniforms:
        """For choices of the algorithm itself, such as resampling in round ``number``."""
        return Uniforms(self._stream(purpose, number))

    def _stream(self, purpose: str, number: int) -> int:
        return stream(self.seed, self.problem, self.sweep, self.chain, purpose, number)


class Slots:
    """The particles of a sweep: a node in each slot, and how many tokens each slot has drawn."""

    def __init__(self, root: Node, count: int, draws: Draws):
        self.nodes = [root] * count
        self._streams = draws.streams(count)
        self._ticks = np.zeros(count, np.int64)

    def unfinished(self, count: int | None = None) -> list[int]:
        """Slots below ``count`` whose nodes are unfinished."""
        return [slot for slot, node in enumerate(self.nodes[:count]) if not node.finished]

    def extend(self, slots: Sequence[int], scored: bool | str = True) -> Generator[Request, Answer, None]:
        """Add a chunk in these slots."""
        children = yield Extend(
            [self.nodes[slot] for slot in slots], self._streams[list(slots)], self._ticks[list(slots)], scored
        )
        for slot, child in zip(slots, children, strict=True):
            self._ticks[slot] += len(child.tokens)
            self.nodes[slot] = child


def together(algorithms: Sequence[Algorithm[Result]]) -> Algorithm[list[Result]]:
    """Run several algorithms of one problem side by side: their requests of a kind are joined into one.

    Raises:
        Halted: none; it is handed on to each, and what they have is returned.
    """
    results: dict[int, Result] = {}
    waiting: dict[int, Request] = {}

    def resume(i: int, answer: Answer | None, halt: Halted | None = None) -> None:
        try:
            if halt is not None:
                waiting[i] = algorithms[i].throw(halt)
            else:
                waiting[i] = algorithms[i].send(answer)  # type: ignore[arg-type]
        except StopIteration as end:
            waiting.pop(i, None)
            results[i] = end.value

    for i in range(len(algorithms)):
        resume(i, None)
    while waiting:
        for joined, members in _joined(waiting):
            try:
                answers = yield joined
            except Halted as halt:
                for i in list(waiting):
                    resume(i, None, halt)
                break
            start = 0
            for i, count in members:
                resume(i, answers[start : start + count])
                start += count
    return [results[i] for i in range(len(algorithms))]


def _joined(waiting: dict[int, Request]) -> list[tuple[Request, list[tuple[int, int]]]]:
    """Requests that can be answered as one, and who asked for how many of the answers."""
    groups: dict[tuple[bool | str, bool], list[tuple[int, Extend]]] = {}
    joined: list[tuple[Request, list[tuple[int, int]]]] = []
    for i, request in waiting.items():
        if isinstance(request, Extend):
            groups.setdefault((request.scored, request.greedy), []).append((i, request))
        else:
            joined.append((request, [(i, len(request.prefixes))]))
    for (scored, greedy), several in groups.items():
        nodes = [node for _, request in several for node in request.nodes]
        streams = np.concatenate([request.streams for _, request in several])
        ticks = np.concatenate([request.ticks for _, request in several])
        members = [(i, len(request.nodes)) for i, request in several]
        joined.append((Extend(nodes, streams, ticks, scored, greedy), members))
    return joined
