"""Who descends from whom in a population, when all came to descend from one, and where the right answer died out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from reason.datasets.problems import Problem
from reason.methods.particle.lineage import Node, Population, Round, distinct_ancestors


def split_sweeps(rounds: Iterable[Round]) -> list[list[Round]]:
    """The rounds of several sweeps, a list for each. In the first round of a sweep all paths are one chunk long, and new."""
    found: list[list[Round]] = []
    for round in rounds:
        begins = all(node.step == 1 for node in round.nodes)
        if not found or (begins and not set(round.nodes) <= set(found[-1][-1].nodes)):
            found.append([])
        found[-1].append(round)
    return found


def offspring(round: Round) -> np.ndarray:
    """(N,) int64: how often the particle in each slot was continued."""
    n = len(round.nodes)
    return np.ones(n, np.int64) if round.ancestors is None else np.bincount(round.ancestors, minlength=n)


def survivors(round: Round) -> list[Node]:
    """The nodes in the slots after the round's resampling."""
    ancestors = range(len(round.nodes)) if round.ancestors is None else round.ancestors
    return [round.nodes[slot] for slot in ancestors]


def root_ancestors(round: Round) -> int:
    """First chunks that the particles descend from, after the round's resampling."""
    return distinct_ancestors(survivors(round), 1)


def coalescence(nodes: Sequence[Node]) -> int:
    """The step of the last common ancestor of ``nodes``; 0 = they have none but the empty solution."""
    paths = [node.path for node in nodes]
    shared = 0
    for step in range(min(map(len, paths), default=0)):
        if any(path[step] is not paths[0][step] for path in paths):
            break
        shared = step + 1
    return shared


# --- the right answer ---------------------------------------------------------------------------------

Alive = Callable[[Node], bool]


def alive_by_check(problem: Problem) -> Alive:
    """Whether the right answer can still be reached from a prefix, by the problem's exact judge of steps."""
    check, known = problem.check, dict[Node, bool]()
    assert check is not None

    def alive(node: Node) -> bool:
        if node not in known:
            known[node] = node.parent is None or check(node.solution).alive
        return known[node]

    return alive


def alive_by_outcome(nodes: Iterable[Node], right: Callable[[Node], bool]) -> Alive:
    """Where no step is judged: whether a prefix, of all that were written, led to a right answer.

    Args:
        nodes: all that were written.
        right: whether a finished one gives the right answer.
    """
    led = {step for node in nodes if node.finished and right(node) for step in node.path}
    return lambda node: node.parent is None or node in led


@dataclass(frozen=True)
class Extinction:
    """Where the right answer died out: in which round of its sweep, by what, and the last prefixes that led there.

    cause: "written" = the chunks that followed were wrong, all of them; "dropped" = resampling copied none of
    those that were right, among others that were not.
    """

    round: int  # from 1
    cause: str
    last: tuple[Node, ...]


def extinction(rounds: Sequence[Round], alive: Alive) -> Extinction | None:
    """Where the right answer died out in one sweep; None if it did not."""
    before: tuple[Node, ...] = ()
    for t, round in enumerate(rounds, 1):
        now = _living(round.nodes, alive)
        if not now:
            return Extinction(t, "written", before)
        after = _living(survivors(round), alive)
        if not after:
            return Extinction(t, "dropped", now)
        before = after
    return None


def _living(nodes: Iterable[Node], alive: Alive) -> tuple[Node, ...]:
    return tuple(dict.fromkeys(node for node in nodes if alive(node)))


def written(population: Population) -> list[Node]:
    """All nodes that were written, in the order of the rounds; parents come before children."""
    return list(
        dict.fromkeys(step for round in population.rounds for node in round.nodes for step in node.path)
    )
