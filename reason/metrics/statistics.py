"""Intervals and fair comparison, from one row per example. numpy only; knows no run and no method.

Every metric here is a ratio of sums over examples, sum(numerator) / sum(denominator), the plain
mean being the case where every denominator is 1. Two sources of chance are kept apart:

*Examples* are resampled (Efron's bootstrap): had other users come, what would the number be?
*Seeds* are few, often three, and three values cannot be resampled honestly: there are ten distinct
resamples, their spread is a third too small, and none reaches beyond the seeds at hand. So the
values are first averaged over seeds for each example, examples are resampled, and the variance
*between* seeds (less the part that the finite number of examples explains) is added to every
resample as a Student-t draw with seeds - 1 degrees of freedom. Where seeds differ only by the noise
of their examples, nothing is added; where they truly differ, the interval is as wide as so few
seeds deserve. With one seed the interval speaks of examples alone, and ``seeds`` says so.

Comparisons are paired: the same examples, the same seeds, resampled together, which removes all that
two runs have in common.

Sources: Efron, "Better bootstrap confidence intervals", JASA 1987 (BCa); Wilson, JASA 1927; Owen,
"The pigeonhole bootstrap", AOAS 2007 (two crossed sources of chance); Holm, Scand. J. Statist. 1979.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

_CELLS = 100_000  # counts of resampled rows held at once: what a core keeps near
_NORMAL = NormalDist()


class Interval(NamedTuple):
    """A number, the bounds of its interval, and how many examples (and seeds) stand behind it."""

    value: float
    low: float
    high: float
    n: int
    seeds: int = 1


@dataclass(frozen=True)
class ExampleScores:
    """The outcome of one run on one split: an id and a value for each example."""

    id: np.ndarray  # (n,) of str, each once
    numerator: np.ndarray  # (n,)
    denominator: np.ndarray | None = None  # (n,); None = all ones, the metric is a mean

    @property
    def value(self) -> float:
        """The metric."""
        total = len(self.numerator) if self.denominator is None else self.denominator.sum()
        return float(self.numerator.sum() / total)

    def take(self, index: np.ndarray) -> ExampleScores:
        """Some of the examples: by place, or by a mask (n,) of bool."""
        down = None if self.denominator is None else self.denominator[index]
        return ExampleScores(self.id[index], self.numerator[index], down)


@dataclass(frozen=True)
class Difference:
    """``a - b`` over the same examples and seeds."""

    value: float
    low: float
    high: float
    p: float  # two-sided, for "there is no difference"
    n: int  # examples
    seeds: int

    @property
    def distinguishable(self) -> bool:
        """Whether the interval leaves 0 out, and there are examples enough to say so."""
        return (self.low > 0 or self.high < 0) and smallest_p(self.n) < 0.05


# --- one run ----------------------------------------------------------------------------------------


def bootstrap_interval(
    numerator: np.ndarray,
    denominator: np.ndarray | None = None,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """(low, high): the interval of a metric over one run's examples.

    BCa bootstrap over examples. Where every outcome is 0 or 1 Wilson's score interval is given in
    its place, for a bootstrap of twenty right answers out of twenty claims [1, 1]. An interval from
    a single example has no width and says nothing.

    Args:
        numerator, denominator: (n,) columns of an evaluation; no denominator means the mean.
        level: share of the time that the interval should hold the truth.
    Raises:
        ValueError: no examples, values that are not finite, or a denominator that sums to 0.
    """
    table = _table([(numerator, denominator)])[:, 0]  # (n, 2)
    n = len(table)
    value = float(_ratio(table.sum(0)))
    if denominator is None and np.isin(table[:, 0], (0.0, 1.0)).all():
        return _wilson(value, n, level)
    if n == 1 or np.all(table == table[0]):
        return value, value
    draws = _ratio(_resampled(table, resamples, np.random.default_rng(seed)))  # (resamples,)
    without = _ratio(table.sum(0) - table)  # (n,) the metric without each example
    low, high = np.nanquantile(draws, _bca_levels(value, draws, without, level))
    return float(low), float(high)


def _wilson(share: float, n: int, level: float) -> tuple[float, float]:
    z2 = _NORMAL.inv_cdf((1 + level) / 2) ** 2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = np.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    return min(share, max(0.0, float(centre - half))), max(share, min(1.0, float(centre + half)))


def _bca_levels(value: float, draws: np.ndarray, without: np.ndarray, level: float) -> list[float]:
    """The quantiles of ``draws`` that bound the interval: corrected for bias and skewness."""
    below = (np.sum(draws < value) + np.sum(draws == value) / 2) / len(draws)
    edge = 1 / (len(draws) + 1)
    bias = _NORMAL.inv_cdf(float(np.clip(below, edge, 1 - edge)))
    spread = without[np.isfinite(without)].mean() - without[np.isfinite(without)]
    square = np.sum(spread**2)
    skew = float(np.sum(spread**3) / (6 * square**1.5)) if square > 0 else 0.0
    levels = []
    for tail in ((1 - level) / 2, (1 + level) / 2):
        z = bias + _NORMAL.inv_cdf(tail)
        levels.append(_NORMAL.cdf(bias + z / (1 - skew * z)))
    return levels


# --- several seeds, and two sides -------------------------------------------------------------------


def seeded_interval(
    rows: Mapping[int, ExampleScores], *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """The mean over seeds of one configuration's metric, with an interval over examples and seeds.

    Args:
        rows: seed -> outcome; every seed on the same examples.
    Raises:
        ValueError: no seeds, or the examples differ.
    """
    if not rows:
        raise ValueError("There is no seed to judge.")
    (table,) = _aligned([list(rows.values())])
    if len(rows) == 1:
        (only,) = rows.values()
        value = float(_ratio(table.sum((0, 1))))
        bounds = bootstrap_interval(
            only.numerator, only.denominator, level=level, resamples=resamples, seed=seed
        )
        return Interval(value, *bounds, len(table))
    ((value, draws),) = _two_level([[table]], resamples, seed)
    low, high = np.nanquantile(draws, ((1 - level) / 2, (1 + level) / 2))
    return Interval(value, float(low), float(high), table.shape[0], table.shape[1])


def paired_difference(
    a: Mapping[int, ExampleScores],
    b: Mapping[int, ExampleScores],
    *,
    level: float = 0.95,
    resamples: int = 5000,
    seed: int = 0,
) -> Difference:
    """``metric(a) - metric(b)``, paired over examples (by id) and over the seeds both sides have.

    Args:
        a, b: seed -> outcome. Seeds that only one side has are left out.
    Returns:
        The difference of the means over seeds, its percentile interval, and p, twice the smaller
        share of resamples beyond 0 (no smaller than 2 / (resamples + 1)). Identical sides give
        0, [0, 0] and p = 1.
    Raises:
        ValueError: no seed in common, or the examples differ.
    """
    return paired_differences([(a, b)], level=level, resamples=resamples, seed=seed)[0]


def paired_differences(
    pairs: Sequence[tuple[Mapping[int, ExampleScores], Mapping[int, ExampleScores]]],
    *,
    level: float = 0.95,
    resamples: int = 5000,
    seed: int = 0,
) -> list[Difference]:
    """``paired_difference`` of several pairs on the same examples, from the same resamples of these.

    Drawing is what costs; ten pairs cost little more than one.
    """
    sides, counts = [], []
    for a, b in pairs:
        shared = sorted(a.keys() & b.keys())
        if not shared:
            raise ValueError(
                f"No seed in common: one side has {sorted(a)}, the other {sorted(b)}. "
                "Run both with the same seeds."
            )
        sides += [[a[s] for s in shared], [b[s] for s in shared]]
        counts.append(len(shared))
    tables = _aligned(sides)
    found = _two_level([tables[i : i + 2] for i in range(0, len(tables), 2)], resamples, seed)
    differences = []
    for (value, draws), seeds in zip(found, counts, strict=True):
        low, high = np.nanquantile(draws, ((1 - level) / 2, (1 + level) / 2))
        tail = min(np.sum(draws <= 0), np.sum(draws >= 0))
        p = min(1.0, max(2 * (1 + float(tail)) / (resamples + 1), smallest_p(len(tables[0]))))
        differences.append(Difference(value, float(low), float(high), p, len(tables[0]), seeds))
    return differences


def blend(parts: Sequence[tuple[float | np.ndarray, ExampleScores]]) -> ExampleScores:
    """The expected outcome where each example is served by one of several runs, drawn by weight.

    Args:
        parts: (weight, outcome) pairs on the same examples in the same order. A weight is a
            probability, for all examples or (n,) for each; an example's weights sum to 1. (Weights 1
            and -1 give the difference of two means, example by example.)
    """
    first = parts[0][1]
    up = sum((w * rows.numerator for w, rows in parts), start=np.zeros(len(first.id)))
    if all(rows.denominator is None for _, rows in parts):
        return ExampleScores(first.id, up)
    ones = np.ones(len(first.id))
    down = sum((w * (ones if r.denominator is None else r.denominator) for w, r in parts), start=0 * ones)
    return ExampleScores(first.id, up, down)


def smallest_p(n: int) -> float:
    """The least p value that ``n`` examples can give: that all of them lie on one side happens by chance in so many cases.

    A bootstrap knows no such bound: one example, drawn again and again, never differs from itself.
    """
    return 2.0 ** (1 - n)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction: p values as they stand when all of them are looked at together."""
    order = sorted(range(len(p)), key=lambda i: p[i])
    adjusted, worst = [0.0] * len(p), 0.0
    for place, i in enumerate(order):
        worst = max(worst, min(1.0, (len(p) - place) * p[i]))
        adjusted[i] = worst
    return adjusted


# --- the machinery ----------------------------------------------------------------------------------


def _two_level(metrics: list[list[np.ndarray]], resamples: int, seed: int) -> list[tuple[float, np.ndarray]]:
    """Each metric (of one table) or difference (of two), and draws of it over examples and seeds.

    metrics: one or two tables of (n, S, 2) each, the last axis numerator and denominator; n is the
    same for all, and so are the resamples of examples.
    """
    columns = [_to_resample(tables) for tables in metrics]
    sums = _resampled(np.concatenate(columns, axis=1), resamples, np.random.default_rng(seed))
    ends = np.cumsum([c.shape[1] for c in columns])
    found = []
    for tables, own in zip(metrics, np.split(sums, ends[:-1], axis=1), strict=True):
        n, seeds, _ = tables[0].shape
        value = float(_signed([_ratio(table.sum((0, 1))) for table in tables]))
        if own.shape[1] == 1:
            draws = own[:, 0] / n
        else:
            draws = _signed([_ratio(own[:, 2 * i : 2 * i + 2]) for i in range(len(tables))])
        if seeds > 1:
            draws = draws + _between_seeds(tables, resamples, np.random.default_rng([seed, 1]))
        found.append((value, draws))
    return found


def _to_resample(tables: list[np.ndarray]) -> np.ndarray:
    """Sums over seeds, example by example: (n, 2) for each table. Means and their difference are one column."""
    pooled = [table.sum(1) for table in tables]
    if all(np.all(table[:, 1] == table[0, 1]) for table in pooled):
        return _signed([table[:, 0] / table[:, 1] for table in pooled])[:, None]
    return np.concatenate(pooled, axis=1)


def _between_seeds(tables: list[np.ndarray], resamples: int, rng: np.random.Generator) -> np.ndarray:
    """(resamples,): draws of what the seeds add to the chance of the examples."""
    n, seeds, _ = tables[0].shape
    per_seed = _signed([_ratio(table.sum(0)) for table in tables])  # (S,)
    # What each example adds to a seed's number, to first order, and what of it is the example's
    # alone, whatever the seed. The rest is noise that makes seeds look different.
    influence = _signed([_influence(table) for table in tables])  # (n, S)
    rest = influence - influence.mean(1, keepdims=True)
    noise = float(np.sum(rest**2)) / ((n - 1) * (seeds - 1)) / n if n > 1 else 0.0
    between = max(0.0, float(per_seed.var(ddof=1)) - noise)
    return np.sqrt(between / seeds) * rng.standard_t(seeds - 1, size=resamples)


def _signed(sides: list[np.ndarray]) -> np.ndarray:
    """a, or a - b."""
    return sides[0] if len(sides) == 1 else sides[0] - sides[1]


def _influence(table: np.ndarray) -> np.ndarray:
    """(n, S, 2) -> (n, S): derivative of each seed's ratio in the weight of each example, times n."""
    total = table.sum(0)  # (S, 2)
    return (table[..., 0] - _ratio(total) * table[..., 1]) / (total[:, 1] / len(table))


def _ratio(sums: np.ndarray) -> np.ndarray:
    """(..., 2) -> (...). A resample whose denominators sum to 0 gives no number (NaN)."""
    down = sums[..., 1]
    return np.divide(sums[..., 0], down, out=np.full(np.shape(down), np.nan), where=down != 0)


def _resampled(table: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Column sums of ``resamples`` samples with replacement of the rows of ``table``.

    (n, c) -> (resamples, c). Rows that are equal are drawn together, as one multinomial count, where
    there are many of each: a ranking metric has a dozen distinct values however many users there
    are. Else the most common row (no hit) is counted, and only the others are drawn one by one.
    """
    n = len(table)
    distinct, counts = np.unique(table, axis=0, return_counts=True)
    common = distinct[np.argmax(counts)]
    others = n - counts.max()
    if len(distinct) * 20 < others:
        return rng.multinomial(n, counts / n, size=resamples) @ distinct
    sums = np.tile(common * n, (resamples, 1))
    drawn = rng.binomial(n, others / n, size=resamples)  # how many rows of a sample are not the common one
    rest = table[np.any(table != common, axis=1)] - common
    at_once = max(1, _CELLS // max(others, 1))
    for start in range(0, resamples if others else 0, at_once):
        here = drawn[start : start + at_once]
        index = rng.integers(0, others, size=here.sum(), dtype=np.int32)
        index += np.repeat(np.arange(len(here), dtype=np.int32) * others, here)
        counts = np.bincount(index, minlength=len(here) * others).reshape(len(here), others)
        sums[start : start + at_once] += counts.astype(np.float64) @ rest
    return sums


def _aligned(sides: list[list[ExampleScores]]) -> list[np.ndarray]:
    """Each side's outcomes as (n, S, 2), all in the order of the first one's ids."""
    first = np.asarray(sides[0][0].id).astype(str)
    wanted = np.argsort(first)
    if len(np.unique(first)) != len(first):
        raise ValueError("An example id occurs more than once in the rows of a run.")
    tables = []
    for side in sides:
        pairs = []
        for rows in side:
            ids = np.asarray(rows.id).astype(str)
            order = slice(None)
            if not np.array_equal(ids, first):
                mine = np.argsort(ids)
                if not np.array_equal(ids[mine], first[wanted]):
                    raise ValueError(
                        f"The runs were judged on different examples ({len(first)} and {len(ids)} rows, "
                        "ids not the same), so they cannot be paired."
                    )
                order = np.empty_like(mine)
                order[wanted] = mine
            down = None if rows.denominator is None else np.asarray(rows.denominator)[order]
            pairs.append((np.asarray(rows.numerator)[order], down))
        tables.append(_table(pairs))
    return tables


def _table(pairs: list[tuple[np.ndarray, np.ndarray | None]]) -> np.ndarray:
    """S pairs of columns (n,) -> (n, S, 2), checked."""
    columns = []
    for numerator, denominator in pairs:
        up = np.asarray(numerator, dtype=np.float64)
        down = np.ones_like(up) if denominator is None else np.asarray(denominator, dtype=np.float64)
        columns.append(np.stack([up, down], axis=-1))
    table = np.stack(columns, axis=1)
    if not len(table):
        raise ValueError("There is no example to judge.")
    if not np.isfinite(table).all():
        raise ValueError("The rows hold values that are not finite; an accuracy of them would mean nothing.")
    if np.any(table[..., 1].sum(0) == 0):
        raise ValueError("The denominator is 0 over all examples.")
    return table
