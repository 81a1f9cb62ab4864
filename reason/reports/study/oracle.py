"""What the best depth for every example would bring, and how much of that is luck.

Taking the better of several answers after the fact gains even where they differ by noise alone. So
the same maximum is taken over as many runs of the base, which know nothing of depth: the *null*.
Only what the depths gain beyond it speaks for a choice of depth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np

from reason.metrics.statistics import Difference, ExampleScores, Interval, paired_difference, seeded_interval
from reason.reports.study.models import Evidence, Model, Tested, shared, tested

BySeed = dict[int, np.ndarray]  # one array for each seed


@dataclass
class Null:
    """The maximum over base runs beside the maximum over depths. Gains: positive is better."""

    runs: int  # as many as depths, or as many as there are
    seeds: list[int]  # the base runs they were taken from
    oracle: Interval  # the metric of the best of ``runs`` base runs
    over_base: Interval | None  # its gain over one base run, as a share of that
    gain: Interval  # over one base run
    model_gain: Interval  # of the best of as many depths over the best fixed one
    excess: Difference  # model_gain - gain, paired over examples and seeds
    tested: Tested | None  # the excess, corrected for the models that are looked at beside this one

    @property
    def verdict(self) -> str:
        if self.tested is None or not self.tested.distinguishable:
            return "not distinguishable from luck"
        return "more than luck" if self.excess.value > 0 else "less than luck"


@dataclass
class Oracle:
    """The best depth of every example, known only afterwards. Gains: positive is better."""

    model: str
    depths: list[int]
    n: int
    seeds: list[int]
    fixed: int  # the best depth for all
    fixed_is: str  # where that comes from
    fixed_accuracy: Interval
    oracle: Interval  # the ceiling
    over_base: Interval | None  # the ceiling's gain over the base, as a share of that
    gain: Interval  # over the best fixed depth
    histogram: dict[int, float]  # depth -> share of examples it is the best of; ties go to the shallowest
    alike: float  # share of examples for which all depths are equally good
    null: Null | None
    why_no_null: str = ""
    recovery: dict[str, Interval] = field(default_factory=dict)  # policy -> share of the gain that it brings


def best_fixed(model: Model, sign: int) -> tuple[int, str]:
    """The one depth to judge others by, and how it was chosen."""
    if model.chosen is not None:
        return model.chosen, "chosen on validation"
    best = max(model.depths, key=lambda d: (sign * model.depths[d].entry.accuracy.value, -d))
    return best, "chosen on test, which is optimistic, as there are no validation rows"


def oracle(model: Model, evidence: Evidence) -> Oracle:
    """The ceiling of a perfect choice of depth, and its null.

    For a ratio of sums the best depth of an example is that of its own ratio, defined where its
    denominator is the same at every depth.

    Raises:
        ValueError: one depth alone, denominators that depth changes, or no seed in common.
    """
    if len(model.depths) < 2:
        raise ValueError("it was evaluated at one depth only, so there is no depth to choose")
    sign, depths = evidence.sign, list(model.depths)
    outcomes = [model.depths[d] for d in depths]
    seeds = shared(outcomes)
    sides = [{s: o.rows[s] for s in seeds} for o in outcomes]
    down = _denominator([rows for side in sides for rows in side.values()])
    fixed, fixed_is = best_fixed(model, sign)
    at_fixed = sides[depths.index(fixed)]
    values = {s: sign * np.stack([side[s].numerator for side in sides]) for s in seeds}  # (K + 1, n)
    pick = {s: v.argmax(0) for s, v in values.items()}  # the first of equals: the shallowest

    def rows(of: BySeed, below: BySeed | None = None) -> dict[int, ExampleScores]:
        return {s: ExampleScores(evidence.ids, of[s], below[s] if below else down) for s in of}

    top = {s: v.max(0) for s, v in values.items()}
    gain = {s: top[s] - sign * at_fixed[s].numerator for s in seeds}
    found = Oracle(
        model.label, depths, len(evidence.ids), seeds, fixed, fixed_is,
        fixed_accuracy=seeded_interval(at_fixed),
        oracle=seeded_interval(rows({s: sign * t for s, t in top.items()})),
        over_base=None,
        gain=seeded_interval(rows(gain)),
        histogram={d: float(np.mean([(p == i).mean() for p in pick.values()])) for i, d in enumerate(depths)},
        alike=float(np.mean([(np.ptp(v, axis=0) == 0).mean() for v in values.values()])),
        null=None,
    )  # fmt: skip
    for policy in model.policies:
        both = sorted(set(seeds) & policy.rows.keys())
        if both and all(gain[s].any() for s in both):
            _denominator([*(policy.rows[s] for s in both), *at_fixed.values()])
            brought = {s: sign * (policy.rows[s].numerator - at_fixed[s].numerator) for s in both}
            found.recovery[policy.label] = seeded_interval(rows(brought, gain))
    if model.base is None:
        found.why_no_null = "there is no base to compute the null from"
        return found
    base = {s: sign * r.numerator for s, r in model.base.rows.items()}
    _denominator([*model.base.rows.values(), *at_fixed.values()])
    paired = sorted(set(seeds) & base.keys())
    if paired and all(b.sum() != 0 for b in base.values()):
        over = {s: top[s] - base[s] for s in paired}
        found.over_base = seeded_interval(rows(over, {s: sign * base[s] for s in paired}))
    if not paired:
        found.why_no_null = "the base has no seed in common with the model's depths"
        return found
    if len(base) < 2:
        need = f"a null for {len(depths)} depths needs {len(depths)} runs"
        more = ",".join(map(str, _more_seeds(base, len(depths))))
        found.why_no_null = f"the base has one seed, but {need}: add train_depth=0 with seed={more}"
        return found
    found.null = _null(values, depths.index(fixed), base, sign, rows)
    return found


def _null(values: BySeed, fixed: int, base: BySeed, sign: int, rows) -> Null:
    """values: seed -> (K + 1, n) of the model; base: seed -> (n,); both so that larger is better."""
    runs = min(len(next(iter(values.values()))), len(base))
    seeds = sorted(base)
    best = {s: _best_of(np.stack([base[t] for t in seeds]), seeds.index(s), runs) for s in seeds}
    gain = {s: best[s] - base[s] for s in seeds}
    mine = {s: _best_of(v, fixed, runs) - v[fixed] for s, v in values.items()}
    zero = any(b.sum() == 0 for b in base.values())
    excess = paired_difference(rows(mine), rows(gain))
    return Null(
        runs, seeds,
        # One number for each example: a maximum over all seeds is no sample of seeds. Examples alone vary in it.
        oracle=seeded_interval(rows({seeds[0]: sign * np.mean(list(best.values()), axis=0)})),
        over_base=None if zero else seeded_interval(rows(gain, {s: sign * b for s, b in base.items()})),
        gain=seeded_interval(rows(gain)),
        model_gain=seeded_interval(rows(mine)),
        excess=excess, tested=tested([excess])[0],
    )  # fmt: skip


def _best_of(values: np.ndarray, held: int, count: int) -> np.ndarray:
    """(m, n) -> (n,): the maximum over ``count`` of the m rows, averaged over all choices that hold ``held``."""
    others = [i for i in range(len(values)) if i != held]
    best = [values[[held, *some]].max(0) for some in combinations(others, count - 1)]
    return np.mean(best, axis=0)


def _denominator(rows: Sequence[ExampleScores]) -> np.ndarray | None:
    """The denominators that all share (None for a mean).

    Raises:
        ValueError: they differ.
    """
    first = rows[0].denominator
    for r in rows:
        own = r.denominator
        if own is not first and (own is None or first is None or not np.array_equal(own, first)):
            raise ValueError(
                "its accuracy is a ratio whose denominators change with depth, so an example has no best depth"
            )
    return first


def _more_seeds(base: BySeed, wanted: int) -> list[int]:
    """Seeds that would make ``wanted`` base runs of those there are."""
    free = (s for s in range(wanted + len(base)) if s not in base)
    return [next(free) for _ in range(wanted - len(base))]
