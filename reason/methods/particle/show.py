"""Figures of ``reason inspect``: who was copied from whom, how the population fared, and what the answer rests on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from reason.answers import stated
from reason.datasets.problems import Problem
from reason.methods.figures import Figure, Lines, Table, Tree
from reason.methods.particle.genealogy import (
    Alive,
    Extinction,
    alive_by_check,
    alive_by_outcome,
    coalescence,
    extinction,
    root_ancestors,
    split_sweeps,
    written,
)
from reason.methods.particle.lineage import Node, Population
from reason.methods.particle.monitors import readings
from reason.methods.particle.selection import Answer, Candidates, judge
from reason.methods.particle.smc import pooled

MOST_NODES = 300  # of a tree; with more, dropped branches are told by their number alone
KEPT = 2  # dropped branches that are drawn behind a prefix that lives
LABEL = 90  # characters of a step in it
SOLUTIONS = 12  # listed
WIDTH = 240  # characters of a solution


def figures(
    problem: Problem,
    populations: Sequence[Population],
    rule: str = "weighted_vote",
    pool: Population | None = None,
    uniform: float = 0.5,
) -> list[Figure]:
    """Figures of one solved problem.

    Args:
        populations: of its sweeps or islands, in order. The lineage is that of the last.
        rule: the final selection; uniform: the number it draws by, where it draws.
        pool: what the answer is chosen from; None: all populations, each counting the same.
    """
    if pool is None:
        pool = populations[0] if len(populations) == 1 else pooled(populations)
    last = populations[-1]
    candidates = Candidates.of_populations([pool])
    correct = candidates.correct([problem])
    chosen = candidates.select(rule, uniform=np.array([uniform]), scores=candidates.rewards, correct=correct)
    answer = candidates.answer(0, chosen)
    right = _Right(problem)
    alive = _alive(problem, last, right)
    found: list[Figure] = [_lineage(problem, last, right, alive)]
    found += [_rounds(populations)]
    if alive is not None and not np.isnan([node.reward for node in written(last)]).all():
        found.append(_rewards(last, alive, problem.check is not None))
    found += [_answers(rule, answer, right), _solutions(pool, right), _monitors(pool)]
    return found


class _Right:
    """Whether an answer is right; None where nobody knows."""

    def __init__(self, problem: Problem):
        self.problem = problem
        self._known: dict[str | None, bool | None] = {}

    def __call__(self, answer: str | None) -> bool | None:
        if answer not in self._known:
            self._known[answer] = judge([self.problem], [answer])[0]
        return self._known[answer]

    def said(self, answer: str | None) -> str:
        return {True: "right", False: "wrong", None: ""}[self(answer)]


def _alive(problem: Problem, population: Population, right: _Right) -> Alive | None:
    if problem.check is not None:
        return alive_by_check(problem)
    if not problem.judged:
        return None
    return alive_by_outcome(written(population), lambda node: bool(right(stated(node.solution))))


# --- the lineage --------------------------------------------------------------------------------------


def _lineage(problem: Problem, population: Population, right: _Right, alive: Alive | None) -> Tree:
    """The tree of all that was written in a sweep, dropped branches cut short."""
    nodes, weights = written(population), population.weights
    count: dict[Node, int] = {}
    share: dict[Node, float] = {}
    for node, weight in zip(population.nodes, weights, strict=True):
        share[node] = share.get(node, 0.0) + float(weight)
        for step in node.path:
            count[step] = count.get(step, 0) + 1
    children: dict[Node | None, list[Node]] = {}
    for node in nodes:
        above = node.parent if node.parent is not None and node.parent.parent is not None else None
        children.setdefault(above, []).append(node)
    died = extinction(population.rounds, alive) if alive is not None else None
    marks = _marks(problem, population, share, died, alive, right)
    tree = Tree(
        "Lineage", [-1], [_line(problem.text)], [None], [len(population.nodes)], [""], 0.0, 1.0, "reward of the prefix",
        _fate(population, died, alive),
    )  # fmt: skip
    waiting: list[tuple[Node | None, int, Node]] = [(None, 0, node) for node in _order(children, None, count)]
    waiting.reverse()
    told: dict[Node | None, int] = {}
    while waiting:
        above, parent, node = waiting.pop()
        lives = count.get(node, 0)
        if not lives:
            kept = KEPT if len(nodes) <= MOST_NODES and (above is None or count.get(above)) else 0
            gone = sum(not count.get(c, 0) for c in children[above])
            told[above] = told.get(above, 0) + 1
            if gone > kept + 1 and told[above] > kept:
                if told[above] == kept + 1:
                    label = f"{gone - kept} more" if kept else f"all {gone}"
                    _add(tree, parent, label, None, 0, "dropped")
                continue
        place = _add(tree, parent, _line(node.text) or "(end)", node.reward, lives, marks(node))
        waiting += [(node, place, child) for child in reversed(_order(children, node, count))]
    return tree


def _add(tree: Tree, parent: int, label: str, value: float | None, count: int, mark: str) -> int:
    tree.parents.append(parent)
    tree.labels.append(label)
    tree.values.append(None if value is None or np.isnan(value) else value)
    tree.counts.append(count)
    tree.marks.append(mark)
    return len(tree.parents) - 1


def _order(children: dict[Node | None, list[Node]], node: Node | None, count: dict[Node, int]) -> list[Node]:
    """Those with the most descendants first, then the best rewarded."""
    return sorted(children.get(node, []), key=lambda c: (-count.get(c, 0), -np.nan_to_num(c.reward)))


def _marks(
    problem: Problem,
    population: Population,
    share: dict[Node, float],
    died: Extinction | None,
    alive: Alive | None,
    right: _Right,
) -> Callable[[Node], str]:
    """What is said beside a node."""
    copies: dict[Node, int] = {}
    for round in population.rounds:
        if round.ancestors is not None:
            for slot in round.ancestors:
                copies[round.nodes[slot]] = copies.get(round.nodes[slot], 0) + 1
    follows = {node.parent for node in written(population)}
    judged = alive if problem.check is not None else None  # the other kind knows nothing of what was dropped

    def mark(node: Node) -> str:
        said = []
        if died and node in died.last:
            said.append("the right answer died here")
        elif (
            judged is not None
            and not (node in share and node.finished)  # its answer says as much
            and not judged(node)
            and node.parent is not None
            and judged(node.parent)
        ):
            said.append("wrong from here")
        if node in share:
            there = population.nodes.count(node)
            weighs = f"weight {share[node]:.2f}" + (f", {there} particles" if there > 1 else "")
            if node.finished:
                answer = stated(node.solution)
                verdict = "no answer" if answer is None else " ".join([answer, right.said(answer)]).strip()
                said.append(f"{verdict}, {weighs}")
            else:
                said.append(f"unfinished, {weighs}")
        elif node not in follows:
            still = judged is not None and judged(node) and not (died and node in died.last)
            said.append("dropped, though right" if still else "dropped")
        if node not in share and copies.get(node, 0) > 1:
            said.append(f"{copies[node]} copies")
        return ", ".join(filter(None, said))

    return mark


def _fate(population: Population, died: Extinction | None, alive: Alive | None) -> str:
    """Sentences below the tree."""
    n, shared = len(population.nodes), coalescence(population.nodes)
    said = [f"{n} particles; heavy branches have descendants among the last."]
    if population.status != "finished":
        said.append(f"It ended: {population.status}.")
    if n > 1:
        said.append(
            f"All that are left share {shared} step{'s' * (shared != 1)}."
            if shared
            else "Those that are left have no step in common."
        )
    if died is not None and died.last:
        how = (
            "resampling copied no prefix that led there"
            if died.cause == "dropped"
            else "every chunk that followed was wrong"
        )
        said.append(f"The right answer died in round {died.round}: {how}.")
    elif died is not None and alive is not None:
        said.append("No prefix was ever on the way to the right answer.")
    return " ".join(said)


def _line(text: str) -> str:
    """In one line; of a long one how it begins and how it ends."""
    return _cut(" ".join(text.split()), LABEL // 2, LABEL // 2)


def _cut(line: str, head: int, tail: int) -> str:
    return line if len(line) <= head + tail else f"{line[:head]} … {line[-tail:]}"


# --- the rounds ---------------------------------------------------------------------------------------


def _rounds(populations: Sequence[Population]) -> Lines:
    """ESS before resampling, and ancestors after it."""
    rounds = [round for population in populations for round in population.rounds]
    starts, at = [], 1
    for sweep in (sweep for p in populations for sweep in split_sweeps(p.rounds)):
        starts.append(at)
        at += len(sweep)
    note = "ESS: before resampling. Continued: particles that resampling kept. Ancestors: first chunks they descend from."
    if len(starts) > 1:
        note += f" Sweeps begin at rounds {', '.join(map(str, starts))}."
    series: dict[str, list[float | None]] = {
        "ESS": [float(round.ess) for round in rounds],
        "continued": [float(round.survivors) for round in rounds],
        "ancestors": [float(root_ancestors(round)) for round in rounds],
    }
    x = [float(t) for t in range(1, len(rounds) + 1)]
    return Lines("Effective size and ancestors", x, series, "round", "particles", note)


def _rewards(population: Population, alive: Alive, checked: bool) -> Figure:
    """Rewards of prefixes that can still end right, and of those that cannot, by step."""
    nodes = [node for node in written(population) if not np.isnan(node.reward)]
    steps = range(1, max(node.step for node in nodes) + 1)
    series: dict[str, list[float | None]] = {}
    lives = {node: alive(node) for node in nodes}
    names = ("right so far", "wrong") if checked else ("led to the right answer", "did not")
    for name, side in zip(names, (True, False), strict=True):
        rewards = [[n.reward for n in nodes if n.step == step and lives[n] is side] for step in steps]
        series[name] = [float(np.mean(some)) if some else None for some in rewards]
    above = [(n.reward, lives[n]) for n in nodes]
    area = _area(np.array([r for r, side in above if side]), np.array([r for r, side in above if not side]))
    note = f"Mean over the {len(nodes)} prefixes of the last sweep, copies counted once."
    if area is not None:
        note += f" A right prefix is scored above a wrong one in {area:.0%} of pairs, whatever their steps."
    return Lines("Reward against correctness", [float(s) for s in steps], series, "step", "mean reward", note)


def _area(right: np.ndarray, wrong: np.ndarray) -> float | None:
    """Share of pairs in which the right one is higher, ties half."""
    if not len(right) or not len(wrong):
        return None
    differences = right[:, None] - wrong[None, :]
    return float(((differences > 0) + 0.5 * (differences == 0)).mean())


# --- the answer ---------------------------------------------------------------------------------------


def _answers(rule: str, answer: Answer, right: _Right) -> Table:
    rows: list[list[Any]] = [
        [
            c.value + (" (chosen)" if c.value == answer.value else ""),
            c.candidates,
            c.mass,
            None if np.isnan(c.reward) else c.reward,
            right.said(c.value),
        ]
        for c in answer.classes
    ]
    if answer.value is None:
        note = "No answer: no particle finished with one that can be read."
    else:
        note = f"Chosen by {rule}: mass {answer.mass:.2f}, margin {answer.margin:+.2f}."
        if answer.contested:
            note += " Contested: the best-rewarded solution gives another answer than the weighted vote."
    return Table("Answers", ["answer", "particles", "weight", "best reward", ""], rows, note)


def _solutions(pool: Population, right: _Right) -> Table:
    """The last texts, equal ones together."""
    groups: dict[tuple[str, str], list[tuple[Node, float]]] = {}
    for node, weight in zip(pool.nodes, pool.weights, strict=True):
        groups.setdefault((node.solution, node.finish), []).append((node, float(weight)))
    order = sorted(groups.items(), key=lambda group: -sum(weight for _, weight in group[1]))
    rows: list[list[Any]] = []
    for (solution, finish), group in order[:SOLUTIONS]:
        said = stated(solution) if finish else None
        text = " / ".join(filter(None, (" ".join(line.split()) for line in solution.split("\n"))))
        verdict = " ".join(filter(None, [said, right.said(said)])) if said else "none"
        rewards = [node.reward for node, _ in group if not np.isnan(node.reward)]
        rows.append([
            sum(weight for _, weight in group), len(group), max(rewards, default=None), verdict,
            finish or "unfinished", _cut(text, WIDTH // 3, WIDTH * 2 // 3),
        ])  # fmt: skip
    note = f"The {SOLUTIONS} heaviest of {len(order)}." if len(order) > SOLUTIONS else ""
    return Table("Solutions", ["weight", "particles", "reward", "answer", "end", "solution"], rows, note)


def _monitors(pool: Population) -> Table:
    rows = [[r.name, r.value, r.limit, r.advice if r.alarm else ""] for r in readings(pool)]
    alarms = sum(bool(row[3]) for row in rows)
    note = "Nothing is wrong." if not alarms else f"{alarms} limit{'s are' if alarms > 1 else ' is'} passed."
    return Table("Monitors", ["monitor", "value", "limit", "advice"], rows, note)
