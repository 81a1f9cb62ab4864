"""From a comparison to models: what each did at every depth, example by example, all in one order.

A *model* is what was trained once for each seed and judged at several depths. A *policy* is a way of
judging it where each request is given a depth of its own; it is told by the rows (``depth_used``
differs) or by the configuration, and belongs to the model whose weights it used.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from reason.errors import ReasonError
from reason.methods.base import Cohort
from reason.metrics.statistics import Difference, ExampleScores, holm, paired_differences
from reason.reports.comparison import ALPHA, BASE, METHOD, RIVAL, Comparison, Entry, _labels, compare_frame
from reason.reports.frame import Frame, Key, Point, footing, read, read_columns
from reason.tracking.overview import overviews

# Columns whose mean is told at every depth where the rows have them, and what it says.
MEANS = {
    "step_cosine": "cosine of the last two states (1: the last step changed nothing)",
    "tail@10": "share of the answer's items outside the most frequent 20%",
    "popularity@10": "mean number of occurrences of the answer's items in training",
}


@dataclass(frozen=True)
class Outcome:
    """What a model did at one depth, or under one policy, over its seeds."""

    label: str
    entry: Entry
    rows: dict[int, ExampleScores]  # seed -> outcome, in the order of ``Evidence.ids``
    used: dict[int, np.ndarray]  # seed -> (n,) depth that each example was given
    means: dict[str, float] = field(default_factory=dict)  # of MEANS, over examples and seeds

    @property
    def depth(self) -> int:
        """The depth asked for; of a policy the most that it may spend."""
        return self.entry.depth or 0

    @property
    def mean_depth(self) -> float:
        return float(np.mean([used.mean() for used in self.used.values()]))

    @property
    def ms(self) -> float | None:
        """Latency of the median request, over seeds."""
        return self.entry.costs.get("latency_p50_ms")

    @property
    def overall(self) -> dict[str, float]:
        """Numbers of a whole evaluation that are no ratio of sums over rows; means over seeds."""
        told = [p.judged.overall if p.judged else {} for p in self.entry.points]
        return {n: float(np.mean([t[n] for t in told])) for n in told[0] if all(n in t for t in told)}


@dataclass
class Model:
    """One configuration trained for one depth, over its seeds."""

    label: str
    key: Key
    depths: dict[int, Outcome]  # judged at, ascending
    base: Outcome | None  # the same backbone trained without the method
    chosen: int | None  # the depth that validation chooses; None where it had no choice
    policies: list[Outcome] = field(default_factory=list)

    @property
    def train_depth(self) -> int:
        return self.key.train_depth

    @property
    def least(self) -> int:
        return min(self.depths)

    @property
    def deep(self) -> int:
        """The depth that stands for "deep": validation's choice, or the deepest where that is the least."""
        return self.chosen if self.chosen is not None and self.chosen > self.least else max(self.depths)

    @property
    def deep_is(self) -> str:
        """Where ``deep`` comes from, in words."""
        if self.chosen == self.deep:
            return "chosen on validation"
        return f"the deepest; validation chooses {self.chosen}" if self.chosen is not None else "the deepest"


@dataclass
class Evidence:
    """All that a study reads: models, bases, and what is known of each example."""

    table: Comparison
    ids: np.ndarray  # (n,)
    models: list[Model]
    bases: list[Outcome]
    cohorts: dict[str, tuple[Cohort, ...]]  # method -> what its card lists
    columns: dict[str, np.ndarray]  # (n,) by column of a cohort
    notes: list[str] = field(default_factory=list)

    @property
    def sign(self) -> int:
        """1 where a larger metric is better, else -1."""
        return 1 if self.table.larger_is_better else -1


@dataclass(frozen=True)
class Tested:
    """A paired difference, tested beside others."""

    difference: Difference
    p: float  # after Holm's correction
    tests: int  # that were corrected together

    @property
    def distinguishable(self) -> bool:
        return self.difference.distinguishable and self.p < ALPHA

    def verdict(self, sign: int) -> str:
        if not self.distinguishable:
            return "not distinguishable"
        return "better" if sign * self.difference.value > 0 else "worse"


def tested(found: Sequence[Difference | None]) -> list[Tested | None]:
    """Differences that are looked at together, their p values corrected together; None stays None."""
    corrected = iter(holm([d.p for d in found if d is not None]))
    count = sum(d is not None for d in found)
    return [None if d is None else Tested(d, next(corrected), count) for d in found]


Pair = tuple[Mapping[int, ExampleScores], Mapping[int, ExampleScores]]


def compared(pairs: Sequence[Pair | None], **keys: int) -> list[Difference | None]:
    """The paired difference of every pair, from the same resamples; None stays None, and so does a pair
    without a seed in common."""
    possible = [p for p in pairs if p is not None and p[0].keys() & p[1].keys()]
    found = iter(paired_differences(possible, **keys) if possible else [])
    return [next(found) if p is not None and p[0].keys() & p[1].keys() else None for p in pairs]


def pooled(rows: Mapping[int, ExampleScores], index: np.ndarray | slice = slice(None)) -> float:
    """The metric over all seeds, of some of the examples."""
    parts = [(r.numerator[index], r.denominator) for r in rows.values()]
    down = sum(float(len(up) if below is None else below[index].sum()) for up, below in parts)
    return sum(float(up.sum()) for up, _ in parts) / down


def shared(outcomes: Iterable[Outcome]) -> list[int]:
    """The seeds that all of them have.

    Raises:
        ValueError: there is none.
    """
    seeds = sorted(set.intersection(*(set(o.rows) for o in outcomes)))
    if not seeds:
        raise ValueError("its depths have no common seed. Evaluate all depths with the same seeds")
    return seeds


# --- gathering ----------------------------------------------------------------------------------


def gather(frame: Frame) -> Evidence:
    """The models of a frame with their rows.

    Raises:
        RunError: rows that cannot be read.
    """
    table = compare_frame(frame)
    runs = [e for e in table.entries if e.points]
    cohorts = {e.key.method: _cohorts(e.key.method) for e in runs if e.key}
    wanted = {c.column for own in cohorts.values() for c in own}
    ids = runs[0].rows[min(runs[0].rows)].id
    evidence = Evidence(table, ids, [], [], cohorts, {}, list(frame.notes))
    outcomes: dict[int, Outcome] = {}
    for entry in runs:
        try:
            outcomes[id(entry)] = _outcome(entry, evidence, wanted)
        except ValueError as error:
            evidence.notes.append(f"{entry.name} is omitted: {error}")
    evidence.bases = [outcomes[id(e)] for e in runs if e.kind == BASE and id(e) in outcomes]
    methods = [e for e in runs if e.kind in (METHOD, RIVAL) and id(e) in outcomes]
    policies = [e for e in methods if e.kind == METHOD and _is_policy(outcomes[id(e)])]
    fixed = [e for e in methods if e not in policies]
    labels = _labels(list(dict.fromkeys(e.key for e in fixed if e.key)))
    families: dict[tuple, list[Entry]] = {}
    for entry in fixed:
        assert entry.key
        families.setdefault(entry.key.family, []).append(entry)
    for members in families.values():
        members.sort(key=lambda e: e.depth or 0)
        deepest = members[-1]
        assert deepest.key
        base = next((b for b in evidence.bases if b.entry.name == deepest.reference), None)
        chosen = next((e.depth for e in members if e.chosen), None)
        depths = {e.depth or 0: outcomes[id(e)] for e in members}
        evidence.models.append(Model(labels[deepest.key], deepest.key, depths, base, chosen))
    for entry in policies:
        _attach(outcomes[id(entry)], evidence)
    return evidence


def _cohorts(method: str) -> tuple[Cohort, ...]:
    from reason import registry

    try:
        return registry.card("methods", method).cohorts
    except ReasonError:  # its package is no longer installed
        return ()


def _outcome(entry: Entry, evidence: Evidence, wanted: set[str]) -> Outcome:
    rows, used, means = {}, {}, {}
    for point in entry.points:
        here = entry.rows[point.seed]
        order = _order(here.id, evidence.ids)
        columns = _columns(point, {"depth_used", *MEANS, *(wanted - evidence.columns.keys())})
        down = None if here.denominator is None else here.denominator[order]
        rows[point.seed] = ExampleScores(evidence.ids, here.numerator[order], down)
        depth = columns.pop("depth_used", None)
        used[point.seed] = np.full(len(order), float(point.depth)) if depth is None else depth[order]
        for name in wanted & columns.keys():
            evidence.columns[name] = columns[name][order]
        for name in MEANS.keys() & columns.keys():
            means.setdefault(name, []).append(float(columns[name].mean()))
    complete = [name for name in MEANS if len(means.get(name, ())) == len(entry.points)]
    return Outcome(entry.label, entry, rows, used, {name: float(np.mean(means[name])) for name in complete})


def _order(ids: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The places in ``ids`` of each of ``wanted``."""
    if np.array_equal(ids, wanted):
        return np.arange(len(ids))
    mine, theirs = np.argsort(ids), np.argsort(wanted)
    if not np.array_equal(ids[mine], wanted[theirs]):
        raise ValueError("it was evaluated on other examples")
    order = np.empty(len(ids), dtype=np.int64)
    order[theirs] = mine
    return order


def _columns(point: Point, names: set[str]) -> dict[str, np.ndarray]:
    """Those of the columns that the rows of a run have, as floats."""
    read = read_columns(point.folder, point.result, point.entry.rows, names)
    return {name: np.asarray(column, dtype=float) for name, column in read.items()}


def _is_policy(outcome: Outcome) -> bool:
    told = outcome.entry.points[0]
    policy = told.config.get(f"{told.result.method}.policy")
    return policy not in (None, "fixed") or any(np.any(u != outcome.depth) for u in outcome.used.values())


def _owner(point: Point) -> str:
    """The run that trained the weights."""
    return point.result.trained_by or point.run


def _attach(policy: Outcome, evidence: Evidence) -> None:
    """Give a policy to the model whose weights it used; of several readings of them to the most alike."""
    assert policy.entry.key
    settings = dict(policy.entry.key.settings)
    owners = {_owner(p) for p in policy.entry.points}
    candidates = [
        m for m in evidence.models
        if owners & {_owner(p) for o in m.depths.values() for p in o.entry.points}
    ]  # fmt: skip
    if not candidates:
        evidence.notes.append(
            f"{policy.label} is omitted, because its model was not evaluated at fixed depths. "
            f"Evaluate them with: reason evaluate {policy.entry.points[0].run} "
            f"{policy.entry.points[0].result.method}.policy=fixed eval.curve=true"
        )
        return
    own = min(candidates, key=lambda m: sum(settings.get(k) != v for k, v in m.key.settings))
    prefix = f"{own.key.method}."
    apart = [(k.removeprefix(prefix), settings[k]) for k, v in own.key.settings if settings.get(k) != v]
    apart.sort(key=lambda setting: setting[0] != "policy")  # its name first
    words = [v if k == "policy" else f"{k}={v}" for k, v in apart if v != "None"]
    label = " ".join(words) or f"policy up to {policy.depth}"
    if any(other.label == label for other in own.policies):  # the same policy under another cap
        label += f" up to {policy.depth}"
    own.policies.append(Outcome(label, policy.entry, policy.rows, policy.used, policy.means))


def bases_elsewhere(root: Path | str, frame: Frame) -> list[str]:
    """Experiments under ``root`` whose base runs belong to the data of ``frame`` but were not named."""
    known = {(k.method, k.backbone) for k in frame.groups}
    bases = [
        run for run in overviews(root)
        if run.train_depth == 0 and (run.method, run.backbone) in known and run.data_digest == frame.what["data digest"]
    ]  # fmt: skip
    return sorted({p.result.experiment for p in read(bases)[0] if footing(p) == frame.what})
