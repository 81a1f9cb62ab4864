"""Does deciding the depth case by case beat spending the same at random?

A policy is measured against three things that cost as much thought: one depth for all, the same
depths dealt out at random (a mixture; its expected outcome is known exactly and needs no drawing),
and the straight line between the two neighbouring depths at the same mean depth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from reason.metrics.statistics import ExampleScores, Interval, blend
from reason.reports.study.models import Evidence, Model, Outcome, Pair, Tested, compared, shared, tested
from reason.reports.study.oracle import best_fixed

RESAMPLES = 10_000


@dataclass
class PolicyResult:
    """A policy point of a model; differences are policy - rival."""

    model: str
    policy: str
    seeds: list[int]
    n: int
    accuracy: Interval
    mean_depth: float
    shares: dict[float, float]  # depth -> share of examples that were given it
    ms: float | None
    fixed: int  # the depth that is the best for all
    fixed_is: str
    to_fixed: Tested | None
    to_mixture: Tested | None  # the same depths dealt out at random
    to_line: Tested | None  # neighbouring fixed depths mixed to the same mean depth
    why: str = ""  # what of it could not be computed, and why


def policies(model: Model, evidence: Evidence) -> list[PolicyResult]:
    """Every policy of a model; p values corrected over its policies, for each rival on its own.

    Raises:
        ValueError: the model has no policy.
    """
    if not model.policies:
        key = f"{model.key.method}.policy"
        told = model.depths[model.deep].entry.points[0]
        hint = f"; try `reason evaluate {told.run} {key}=...`" if key in told.config else ""
        raise ValueError(f"no run uses an adaptive depth policy{hint}")
    fixed, fixed_is = best_fixed(model, evidence.sign)
    rivals: tuple[Rival, ...] = (
        lambda model, seed, used: model.depths[fixed].rows[seed],
        _mixture,
        lambda model, seed, used: mixed_at(model, seed, float(used.mean())),
    )
    pairs: list[Pair | None] = []
    whys: list[str] = []
    for policy in model.policies:
        said: list[str] = []
        for rival in rivals:
            try:
                pairs.append(_against(policy, model, rival))
            except ValueError as error:
                pairs.append(None)
                said.append(str(error))
        whys.append("; ".join(dict.fromkeys(said)))
    found = compared(pairs, resamples=RESAMPLES)
    columns = [tested(found[i::3]) for i in range(3)]
    results = []
    for place, (policy, why) in enumerate(zip(model.policies, whys, strict=True)):
        depths, counts = np.unique(np.concatenate(list(policy.used.values())), return_counts=True)
        results.append(
            PolicyResult(
                model.label, policy.label, sorted(policy.rows), len(evidence.ids), policy.entry.accuracy,
                policy.mean_depth,
                {float(d): float(c / counts.sum()) for d, c in zip(depths, counts, strict=True)},
                policy.ms if evidence.table.one_device else None,
                fixed, fixed_is, *(column[place] for column in columns), why=why,
            )
        )  # fmt: skip
    return results


Rival = Callable[[Model, int, np.ndarray], ExampleScores]  # (model, seed, depths used (n,)) -> outcome


def _against(policy: Outcome, model: Model, rival: Rival) -> Pair:
    """A policy and its rival, on the seeds they share. The shares of a mixture are taken as observed."""
    seeds = shared([policy, *model.depths.values()])
    return {s: policy.rows[s] for s in seeds}, {s: rival(model, s, policy.used[s]) for s in seeds}


def _mixture(model: Model, seed: int, used: np.ndarray) -> ExampleScores:
    depths, counts = np.unique(used, return_counts=True)
    absent = [d for d in depths if d not in model.depths]
    if absent:
        told = ", ".join(f"{d:g}" for d in absent[:3])
        raise ValueError(f"depth {told} was not evaluated as a fixed depth, so the mixture is not known")
    parts = zip(depths, counts, strict=True)
    return blend([(c / len(used), model.depths[int(d)].rows[seed]) for d, c in parts])


def mixed_at(model: Model, seed: int, mean_depth: float) -> ExampleScores:
    """The fixed depths next to ``mean_depth``, mixed so that this is spent on average.

    Raises:
        ValueError: it lies outside the depths judged.
    """
    depths = list(model.depths)
    if not depths[0] <= mean_depth <= depths[-1]:
        raise ValueError(
            f"a mean depth of {mean_depth:.2f} lies outside the fixed depths that were evaluated"
        )
    above = next(i for i, d in enumerate(depths) if d >= mean_depth)
    if depths[above] == mean_depth:
        return model.depths[depths[above]].rows[seed]
    low, high = depths[above - 1], depths[above]
    share = (mean_depth - low) / (high - low)
    return blend([(1 - share, model.depths[low].rows[seed]), (share, model.depths[high].rows[seed])])
