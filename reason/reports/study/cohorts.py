"""For whom: examples cut into groups by what a method's card says of them, each group judged for itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from reason.methods.base import Cohort
from reason.metrics.statistics import Difference, ExampleScores, blend, paired_difference
from reason.reports import formatting
from reason.reports.study.models import Evidence, Model, Outcome, Tested, compared, pooled, tested

QUARTERS = 4
FEWEST = 20  # examples of a group; below, an interval would be a guess


@dataclass(frozen=True)
class Group:
    """Examples whose value lies between two bounds, both included."""

    label: str
    low: float
    high: float
    index: np.ndarray  # (m,) their places, ascending


@dataclass
class GroupResult:
    label: str
    low: float
    high: float
    n: int
    at: dict[int, float]  # depth -> metric, over seeds
    base: float | None  # over the seeds that it shares with the deep depth
    to_base: Tested | None  # the deep depth against the base; null without a base or with fewer than FEWEST
    to_least: Tested | None  # and against the model's least depth
    exits: dict[str, float] = field(default_factory=dict)  # policy -> mean depth that it gives to the group


@dataclass
class CohortResult:
    """One model, its examples cut in one way."""

    model: str
    column: str
    label: str
    known: bool  # before the answer is
    deep: int
    least: int
    groups: list[GroupResult]

    @property
    def tests(self) -> int:
        """How many differences were corrected together, to the base and to the least depth each."""
        return max((t.tests for g in self.groups for t in (g.to_base, g.to_least) if t), default=0)


def cut(values: np.ndarray, edges: Sequence[float] = ()) -> list[Group]:
    """Groups by value (n,), ascending; empty ones are left out.

    With edges, the i-th group holds what is above edge i - 1 and not above edge i; the last one the
    rest. Without, four groups of nearly equal mass: equal values are never parted, and go to the
    quarter in which the middle of their block lies.
    """
    if edges:
        place = np.searchsorted(np.asarray(edges, dtype=float), values, side="left")
    else:
        _, block, count = np.unique(values, return_inverse=True, return_counts=True)
        middle = (np.cumsum(count) - count / 2) / len(values)
        place = np.minimum((QUARTERS * middle).astype(int), QUARTERS - 1)[block]
    groups = []
    for i in np.unique(place):
        index = np.flatnonzero(place == i)
        low, high = float(values[index].min()), float(values[index].max())
        label = _bins(i, edges, values) if edges else _span(low, high)
        groups.append(Group(label, low, high, index))
    return groups


def _span(low: float, high: float) -> str:
    return formatting.tick(low) if low == high else f"{formatting.tick(low)} to {formatting.tick(high)}"


def _bins(i: int, edges: Sequence[float], values: np.ndarray) -> str:
    if i == 0:
        return f"up to {formatting.tick(edges[0])}"
    if i == len(edges):
        return f"above {formatting.tick(edges[-1])}"
    if np.all(values == np.round(values)):  # counts: 6 to 10 rather than above 5, up to 10
        return _span(edges[i - 1] + 1, edges[i])
    return f"above {formatting.tick(edges[i - 1])}, up to {formatting.tick(edges[i])}"


def cohort(model: Model, by: Cohort, evidence: Evidence) -> CohortResult:
    """A model's examples cut by ``by``: the metric of each group at every depth, and what depth brought it.

    Differences are paired, p values corrected over the groups, for each reference on its own. The
    evidence must have the column.

    Raises:
        ValueError: a group's denominators sum to 0.
    """
    groups = cut(evidence.columns[by.column], by.edges)
    deep, least = model.depths[model.deep], model.depths[model.least]
    found = [within(g, deep, [model.base, least if least is not deep else None]) for g in groups]
    to_base, to_least = (tested([differences[i] for differences in found]) for i in range(2))
    base = {s: r for s, r in model.base.rows.items() if s in deep.rows} if model.base else {}
    results = []
    for g, against_base, against_least in zip(groups, to_base, to_least, strict=True):
        results.append(
            GroupResult(
                g.label, g.low, g.high, len(g.index),
                at={depth: pooled(o.rows, g.index) for depth, o in model.depths.items()},
                base=pooled(base, g.index) if base else None,
                to_base=against_base,
                to_least=against_least,
                exits={p.label: float(np.mean([u[g.index].mean() for u in p.used.values()])) for p in model.policies},
            )
        )  # fmt: skip
    return CohortResult(model.label, by.column, by.label, by.known, model.deep, model.least, results)


def within(group: Group, a: Outcome, others: Sequence[Outcome | None]) -> list[Difference | None]:
    """The difference of ``a`` to each of the others, in one group; None in a group that is too small."""

    def inside(outcome: Outcome) -> dict[int, ExampleScores]:
        return {s: r.take(group.index) for s, r in outcome.rows.items()}

    few = len(group.index) < FEWEST
    return compared([None if o is None or few else (inside(a), inside(o)) for o in others])


def contrast(a: Outcome, b: Outcome, one: Group, other: Group) -> Difference:
    """How much more ``a`` gains over ``b`` in one group than in another, over the examples of both.

    Raises:
        ValueError: the metric is no mean, a group is too small, or no seed is shared.
    """
    if min(len(one.index), len(other.index)) < FEWEST:
        raise ValueError(f"a group has fewer than {FEWEST} examples")
    both = np.concatenate([one.index, other.index])
    first = np.arange(len(both)) < len(one.index)
    sides: tuple[dict[int, ExampleScores], dict[int, ExampleScores]] = ({}, {})
    for seed in a.rows.keys() & b.rows.keys():
        gain = blend([(1.0, a.rows[seed]), (-1.0, b.rows[seed])]).take(both)
        if gain.denominator is not None:
            raise ValueError("gains of groups can be compared for means only")
        # A mean over a group is a ratio of sums.
        for side, inside in zip(sides, (first, ~first), strict=True):
            side[seed] = ExampleScores(gain.id, gain.numerator * inside, inside.astype(float))
    return paired_difference(*sides)
