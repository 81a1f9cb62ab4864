"""What it would mean in business: some of the requests are answered deep, the others at the least depth."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from reason.metrics.statistics import ExampleScores, blend
from reason.reports.study.models import Evidence, Model, Pair, Tested, compared, pooled, shared, tested

SHARES = (0.10, 0.25, 0.50)
AT_RANDOM = "at random"


@dataclass
class ShareResult:
    """One share of requests answered deep, chosen in one way. Differences: the total against its rival."""

    model: str
    share: float
    chosen: str  # "at random", "largest history"
    deep: int
    least: int
    inside: float  # metric of the requests answered deep
    outside: float
    total: float
    ms: float | None  # a request, from the medians at both depths
    to_none: Tested  # against all answered at the least depth
    to_random: Tested | None  # against the same share chosen at random
    n: int
    seeds: list[int]


def deep_shares(model: Model, evidence: Evidence) -> list[ShareResult]:
    """Each of SHARES, at random (the expected outcome, exact) and by what is known before the answer.

    That is the column of the first such cohort on the method's card, its largest values first and its
    smallest first. Where the border runs through equal values, all of these are chosen with the same
    probability. p values are corrected over all lines, for each rival on its own.

    Raises:
        ValueError: the model was judged at one depth alone, or its depths share no seed.
    """
    if model.deep == model.least:
        raise ValueError("it was evaluated at one depth only, so there is no deeper one")
    deep, least = model.depths[model.deep], model.depths[model.least]
    seeds = shared([deep, least])
    n = len(evidence.ids)
    ways = [(share, AT_RANDOM, np.full(n, share)) for share in SHARES]
    column = next((c.column for c in evidence.cohorts.get(model.key.method, ()) if c.known), None)
    if column in evidence.columns:
        values = evidence.columns[column]
        for name, order in (("largest", -values), ("smallest", values)):
            ways += [(share, f"{name} {column}", first(order, share)) for share in SHARES]
    shallow = {s: least.rows[s] for s in seeds}
    served = [
        {s: blend([(weight, deep.rows[s]), (1 - weight, shallow[s])]) for s in seeds} for _, _, weight in ways
    ]
    at_random = {share: rows for (share, how, _), rows in zip(ways, served, strict=True) if how == AT_RANDOM}
    pairs: list[Pair | None] = [(rows, shallow) for rows in served]
    lines = zip(ways, served, strict=True)
    pairs += [None if how == AT_RANDOM else (rows, at_random[share]) for (share, how, _), rows in lines]
    found = compared(pairs)
    to_none, to_random = tested(found[: len(ways)]), tested(found[len(ways) :])
    ms = None
    if evidence.table.one_device and deep.ms is not None and least.ms is not None:
        ms = (least.ms, deep.ms)
    results = []
    for i, (share, how, weight) in enumerate(ways):
        against = to_none[i]
        assert against
        results.append(
            ShareResult(
                model.label, share, how, model.deep, model.least,
                inside=pooled({s: _weighted(deep.rows[s], weight) for s in seeds}),
                outside=pooled({s: _weighted(least.rows[s], 1 - weight) for s in seeds}),
                total=pooled(served[i]),
                ms=(1 - share) * ms[0] + share * ms[1] if ms else None,
                to_none=against, to_random=to_random[i], n=n, seeds=seeds,
            )
        )  # fmt: skip
    return results


def first(order: np.ndarray, share: float) -> np.ndarray:
    """(n,) -> (n,): the probability of being among the ``share`` of examples with the least ``order``.

    1 or 0, but for the value through which the border runs: there all are chosen alike. Sums to share * n.
    """
    n = len(order)
    _, block, count = np.unique(order, return_inverse=True, return_counts=True)
    before = np.cumsum(count) - count
    return np.clip((share * n - before) / count, 0.0, 1.0)[block]


def _weighted(rows: ExampleScores, weight: np.ndarray) -> ExampleScores:
    """The metric of a random part of the examples, each in it with its weight."""
    down = np.ones(len(weight)) if rows.denominator is None else rows.denominator
    return ExampleScores(rows.id, rows.numerator * weight, down * weight)
