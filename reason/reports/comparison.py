"""From a frame to a comparison: intervals over seeds, paired differences, choices, fronts.

Two rules hold throughout. Whatever is *chosen* (a depth, ``--best``) is chosen by validation
accuracy; whatever is *reported* is test accuracy. And every difference is paired: same examples,
same seeds, against the base (the same backbone trained without the method) where there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from reason.errors import ReasonError
from reason.metrics.statistics import (
    Difference,
    ExampleScores,
    Interval,
    holm,
    paired_difference,
    seeded_interval,
)
from reason.reports.frame import Frame, Key, Point, defaults, evaluation_keys, frames, overrides, read_rows
from reason.tracking.folder import RunFolder
from reason.tracking.result import Measure, Outcome, RunUnits

METHOD, BASE, RIVAL, BOUND, BASELINE = KINDS = "method", "base", "rival", "bound", "baseline"
ALPHA = 0.05


@dataclass
class Entry:
    """One line of a comparison: a configuration at a depth, over its seeds; a rival of it there, from the same
    samples, or a bound, which is a rival that is never ranked; or a trivial baseline."""

    label: str
    kind: str  # one of KINDS
    key: Key | None  # None for a trivial baseline
    points: list[Point]  # one per seed; empty for a trivial baseline
    rows: dict[int, ExampleScores]  # seed -> test outcome
    accuracy: Interval
    valid: Interval | None = None
    metrics: dict[str, float] = field(default_factory=dict)  # means over seeds
    costs: dict[str, float] = field(default_factory=dict)  # means over seeds; absent where not measured
    reference: str = ""  # label and depth of what it is compared with
    difference: Difference | None = None
    p: float | None = None  # of the difference, after Holm's correction over the table
    chosen: bool = False  # the depth that validation chooses in its family
    fronts: list[str] = field(default_factory=list)  # costs on whose Pareto front it lies

    @property
    def depth(self) -> int | None:
        return self.key.depth if self.key else None

    @property
    def name(self) -> str:
        """Label and depth, as other lines refer to it."""
        return self.label if self.kind in (BASE, BASELINE) else f"{self.label} at depth {self.depth}"

    @property
    def rival(self) -> str:
        """The rival whose outcome it is; "" for a method's own."""
        return self.key.rival if self.key else ""

    @property
    def variant_of(self) -> str:
        """The rival that this one is with another budget; "" for all others."""
        return self.points[0].entry.variant_of if self.points else ""

    @property
    def place(self) -> int:
        """The place of its rival among those of its method, as that lists them."""
        return list(self.points[0].result.head.rivals).index(self.rival) if self.rival else -1

    @property
    def on_demand(self) -> bool:
        """Whether examples were given less than the depth where less would do."""
        return self.costs.get("effective_depth", self.depth) != self.depth

    @property
    def distinguishable(self) -> bool | None:
        """Whether chance can be ruled out as the source of the difference; None without one."""
        if self.difference is None or self.p is None:
            return None
        return self.difference.distinguishable and self.p < ALPHA


@dataclass
class Comparison:
    """One table: entries that may be ranked, and what a reader has to know about them."""

    accuracy: str
    larger_is_better: bool
    dataset: str
    data_digest: str
    split: str
    n: int
    units: RunUnits
    entries: list[Entry]
    notes: list[str] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)  # commands that would make it fuller
    one_device: bool = True  # whether all times come from one kind of device

    @property
    def depth_units(self) -> list[str]:
        """The units of depth in it; several where methods are compared."""
        return list(dict.fromkeys(e.points[0].result.units.depth for e in self.entries if e.points))

    @property
    def spent(self) -> list[str]:
        """The counters per example that depth or a rival makes larger; others are constants of the data."""
        counted = {c: [e.costs[c] for e in self.entries if c in e.costs] for c in COUNTERS}
        return [c for c, values in counted.items() if varies(values)]

    def short(self, e: Entry) -> str:
        """The label of an entry; a rival's name alone where one method only has rivals."""
        owners = {other.key.family[:-1] for other in self.entries if other.key and other.rival}
        return e.rival if e.rival and len(owners) == 1 else e.label


COUNTERS = ("tokens_per_example", "flops_per_example")
TIMES = (
    "latency_p50_ms",
    "device_hours",
)  # of different devices not ranked; the costs that have a Pareto front are both


def varies(costs: Sequence[float]) -> bool:
    """Whether costs differ by enough, a tenth, to be told apart by."""
    return len(costs) > 1 and max(costs) > 1.1 * min(costs)


def compare(root: Path | str, names: Sequence[str] = (), *, best: bool = False) -> list[Comparison]:
    """Compare the finished runs under ``root``.

    Args:
        names: as for ``frames``. best: keep one line for each experiment, method and backbone, the
            one with the best *validation* accuracy, and order the lines by test accuracy.
    Raises:
        ConfigError: see ``frames``. RunError: rows that cannot be read.
    """
    return [compare_frame(frame, best=best) for frame in frames(root, names)]


def compare_frame(frame: Frame, *, best: bool = False) -> Comparison:
    first, labels = frame.points[0].result, _labels(list(frame.groups))
    table = Comparison(
        accuracy=frame.what["accuracy"],
        larger_is_better=first.accuracy.larger_is_better,
        dataset=", ".join(sorted({key.dataset for key in frame.groups})),
        data_digest=frame.what["data digest"],
        split=frame.what["split"],
        n=frame.what["number of examples"],
        units=first.units,
        entries=[_entry(key, points, labels[key]) for key, points in frame.groups.items()],
        notes=list(frame.notes),
    )
    sign = 1 if table.larger_is_better else -1
    _choose(table.entries, sign)
    references = {id(e): _reference(e, table.entries) for e in table.entries}
    if best:
        kept = _best(table.entries, sign)
        needed = {id(references[id(e)]) for e in kept}
        table.entries = [e for e in table.entries if e in kept or id(e) in needed]
    table.entries += _baselines(frame)
    _compare_all(table, references)
    _fronts(table, sign)
    table.entries.sort(key=lambda e: _place(e, best, sign))
    table.hints += _hints(table)
    return table


def _place(entry: Entry, best: bool, sign: int) -> tuple:
    """Base first, then the methods by family and depth (for --best by accuracy), rivals, bounds, and baselines."""
    kind = (BASE, METHOD, RIVAL, BOUND, BASELINE).index(entry.kind)
    if best or entry.key is None:
        return (kind, -sign * entry.accuracy.value, entry.name)
    return (kind, str(entry.key.family[:-1]), entry.place, entry.key.depth)


# --- one line -----------------------------------------------------------------------------------


def _entry(key: Key, points: list[Point], label: str) -> Entry:
    rows = {p.seed: p.rows(p.entry.accuracy, p.entry.rows) for p in points}
    shared = [n for n in points[0].entry.metrics if all(n in p.entry.metrics for p in points)]
    return Entry(
        label=label,
        kind=(BOUND if points[0].entry.bound else RIVAL)
        if key.rival
        else METHOD
        if key.train_depth
        else BASE,
        key=key,
        points=points,
        rows=rows,
        accuracy=_over_seeds([p.entry.accuracy for p in points], lambda: rows),
        valid=_validation(points),
        metrics={n: float(np.mean([p.entry.metrics[n].value for p in points])) for n in shared},
        costs=_costs(points),
    )


def _labels(keys: list[Key]) -> dict[Key, str]:
    """A name for each group, as short as tells it from the others: the experiment, then what differs. A model that is
    judged as usual needs no words for that."""
    plain = {k: k.experiment if k.train_depth else f"{k.experiment} base" for k in keys if not k.rival}
    labels = {}
    for key in plain:
        same = [k for k in plain if plain[k] == plain[key]]
        words = [plain[key]]
        words += [key.backbone] * (len({k.backbone for k in same}) > 1)
        trained = {k.train_depth for k in same if k.settings == key.settings}
        words += [f"train_depth={key.train_depth}"] * (len(trained) > 1)
        for i, (name, value) in enumerate(key.settings):
            alike = [k for k in same if k.backbone == key.backbone and k.method == key.method]
            usual = name in evaluation_keys(key.method) and value == str(defaults(key.method).get(name))
            if value != "None" and not usual and len({k.settings[i] for k in alike}) > 1:
                words.append(f"{name.removeprefix(f'{key.method}.')}={value}")
        labels[key] = " ".join(words)
    rivals = [k for k in keys if k.rival]
    return labels | {k: f"{labels.get(replace(k, rival=''), k.experiment)}: {k.rival}" for k in rivals}


def _over_seeds(measures: list[Measure], rows: Callable[[], dict[int, ExampleScores]]) -> Interval:
    """The mean over seeds with its interval; one seed's own stands as it is."""
    return measures[0].interval if len(measures) == 1 else seeded_interval(rows())


def _validation(points: list[Point]) -> Interval | None:
    """Validation accuracy over seeds, where every run has it."""
    judged = [
        (p, m, p.entry.valid_rows) for p in points if (m := p.entry.valid_accuracy) and p.entry.valid_rows
    ]
    if len(judged) < len(points):
        return None
    return _over_seeds([m for _, m, _ in judged], lambda: {p.seed: p.rows(m, rows) for p, m, rows in judged})


def _per_example(point: Point, counter: str) -> float | None:
    count = point.entry.cost.get(counter)
    return None if count is None else count / point.entry.accuracy.n


_COSTS: dict[str, Callable[[Point], float | None]] = {
    "latency_p50_ms": lambda p: p.entry.latency_p50_ms,
    "latency_p95_ms": lambda p: p.entry.latency_p95_ms,
    "throughput_per_s": lambda p: p.judged and p.judged.throughput_per_s,
    "effective_depth": lambda p: p.judged and p.judged.effective_depth,
    "flops_per_example": lambda p: _per_example(p, "flops"),
    "tokens_per_example": lambda p: _per_example(p, "tokens"),
    # Hours are those of a run, with all that its method's rivals took.
    "device_hours": lambda p: p.judged and p.device_hours,
    "gpu_hours": lambda p: p.judged and p.result.metrics.get("gpu_hours"),
}


def _costs(points: list[Point]) -> dict[str, float]:
    """Means over seeds of what was measured for all of them."""
    values = {name: [v for p in points if (v := of(p)) is not None] for name, of in _COSTS.items()}
    return {name: float(np.mean(seen)) for name, seen in values.items() if len(seen) == len(points)}


def _baselines(frame: Frame) -> list[Entry]:
    """The trivial rivals, read from the newest run that has each. They know neither seed nor depth."""
    found: dict[str, tuple[Point, Outcome]] = {}
    for point in sorted(frame.points, key=lambda p: p.result.created):
        for name, baseline in point.result.baselines.items():
            if (point.folder / baseline.rows).is_file():
                found[name] = (point, baseline)
    entries = []
    for name, (point, baseline) in sorted(found.items()):
        rows = read_rows(point.folder, point.result, baseline.rows, baseline.accuracy)
        metrics, interval = {k: m.value for k, m in baseline.metrics.items()}, baseline.accuracy.interval
        entries.append(Entry(name, BASELINE, None, [], {0: rows}, interval, metrics=metrics))
    return entries


# --- choices: validation only -------------------------------------------------------------------


def _choose(entries: list[Entry], sign: int) -> None:
    """Mark in each family the depth that validation chooses; a tie goes to the shallowest."""
    families: dict[tuple, list[Entry]] = {}
    for entry in entries:
        if entry.kind in (METHOD, RIVAL) and entry.key and entry.valid is not None:
            families.setdefault(entry.key.family, []).append(entry)
    for members in families.values():
        if len(members) > 1:
            _by_validation(members, sign).chosen = True


def _best(entries: list[Entry], sign: int) -> list[Entry]:
    """One entry for each experiment, method and backbone, and for each rival; bases stay."""
    sides: dict[tuple, list[Entry]] = {}
    for entry in entries:
        if entry.kind in (METHOD, RIVAL) and (key := entry.key) and entry.valid is not None:
            sides.setdefault((key.experiment, key.method, key.backbone, key.rival), []).append(entry)
    return [
        *(_by_validation(members, sign) for members in sides.values()),
        *(e for e in entries if e.kind == BASE),
    ]


def _by_validation(entries: list[Entry], sign: int) -> Entry:
    return max(entries, key=lambda e: (sign * e.valid.value if e.valid else float("-inf"), -(e.depth or 0)))


# --- differences --------------------------------------------------------------------------------


def _reference(entry: Entry, entries: list[Entry]) -> Entry | None:
    """What an entry is measured against: a rival or a bound, its method at the same depth; a method, its base, else
    the least depth of its family.

    A base is of the same method and backbone and shares a seed; of several the one nearest in
    experiment and settings is taken.
    """
    key = entry.key
    if entry.rival and key is not None:
        return next((e for e in entries if e.key == replace(key, rival="")), None)
    if entry.kind != METHOD or key is None:
        return None
    bases = [
        e for e in entries
        if e.kind == BASE and e.key and (e.key.method, e.key.backbone) == (key.method, key.backbone)
        and e.rows.keys() & entry.rows.keys()
    ]  # fmt: skip
    if bases:
        return min(bases, key=lambda e: _distance(e, entry))
    model = (key.experiment, key.method, key.backbone, key.dataset, key.train_depth, key.trained)
    family = [
        e for e in entries
        if e.key and not e.rival and (*e.key.family[:-2], e.key.trained) == model and e.rows.keys() & entry.rows.keys()
    ]  # fmt: skip
    least = min(family, key=lambda e: (e.depth or 0, e.on_demand))
    return None if least is entry else least


def _distance(base: Entry, entry: Entry) -> tuple:
    assert base.key and entry.key
    apart = sum(a != b for a, b in zip(base.key.trained, entry.key.trained, strict=True))
    return (apart, base.key.experiment != entry.key.experiment, -len(base.rows.keys() & entry.rows.keys()))


def _compare_all(table: Comparison, references: dict[int, Entry | None]) -> None:
    """Fill in every paired difference, and correct all p values together. That from a bound is no test."""
    runs = [e for e in table.entries if e.points]
    common = min(runs, key=lambda e: (e.kind != BASE, e.on_demand), default=None)
    for entry in table.entries:
        reference = references.get(id(entry)) if entry.points else common
        if reference is None:
            continue
        mine = entry.rows
        if entry.kind == BASELINE:  # the same whatever the seed
            mine = dict.fromkeys(reference.rows, next(iter(entry.rows.values())))
        entry.reference = reference.name
        if entry.kind == METHOD and reference.kind == BASE and (note := _otherwise(entry, reference)):
            table.notes += [note] * (note not in table.notes)
        try:
            entry.difference = paired_difference(mine, reference.rows)
        except ValueError as error:
            table.notes.append(f"{entry.name} is not compared with {reference.name}: {error}")
            continue
        unshared = entry.rows.keys() ^ reference.rows.keys()
        if entry.points and unshared:
            seeds = ", ".join(map(str, sorted(entry.rows.keys() & reference.rows.keys())))
            note = f"{entry.label} and {reference.name} are compared on their common seeds: {seeds}."
            table.notes += [note] * (note not in table.notes)
    compared = [e for e in table.entries if e.difference is not None and e.kind != BOUND]
    for entry, p in zip(compared, holm([e.difference.p for e in compared if e.difference]), strict=True):
        entry.p = p


def _otherwise(entry: Entry, base: Entry) -> str:
    """In what, beside the method's own keys, a model and its base were trained differently; '' where in nothing."""
    assert entry.key and base.key
    theirs, own = dict(base.key.trained), f"{entry.key.method}."
    differing = [(k, v) for k, v in entry.key.trained if not k.startswith(own) and theirs.get(k) != v]
    apart = [f"{k}={v} instead of {theirs.get(k)}" for k, v in differing]
    if not apart:
        return ""
    return f"{entry.key.experiment} was trained with other settings than {base.name}: {', '.join(apart)}. Their difference is not due to the method alone."


# --- fronts, hints ------------------------------------------------------------------------------


def pareto_front(accuracy: Sequence[float], cost: Sequence[float | None]) -> list[bool]:
    """Which points no other point dominates: is at least as accurate for no more, and strictly better in one of the two.

    accuracy: larger is better. cost: smaller is better; a point without one (None) takes no part.
    """
    front = [False] * len(accuracy)
    known = [(c, -a, i) for i, (a, c) in enumerate(zip(accuracy, cost, strict=True)) if c is not None]
    best, cost_of_best = float("-inf"), float("nan")
    for c, negative, i in sorted(known):  # from cheap to dear; of equal cost the most accurate first
        front[i] = -negative > best or (-negative == best and c == cost_of_best)
        if -negative > best:
            best, cost_of_best = -negative, c
    return front


def _fronts(table: Comparison, sign: int) -> None:
    """Mark the Pareto fronts; times of different devices are not ranked, and bounds never."""
    devices = sorted({p.device for e in table.entries for p in e.points})
    table.one_device = len(devices) <= 1
    if not table.one_device:
        told = "Device-hours and latencies were measured on different devices and are not ranked"
        table.notes.append(f"{told}: {'; '.join(devices)}.")
    ranked = [e for e in table.entries if e.kind != BOUND]
    values = [sign * e.accuracy.value for e in ranked]
    for cost in (*table.spent, *(TIMES if table.one_device else ())):
        front = pareto_front(values, [e.costs.get(cost) for e in ranked])
        for entry, on in zip(ranked, front, strict=True):
            if on:
                entry.fronts.append(cost)


def _hints(table: Comparison) -> list[str]:
    """The commands that train a missing base, one for each experiment."""
    hints = []
    based = {(e.key.method, e.key.backbone) for e in table.entries if e.kind == BASE and e.key}
    lacking: dict[tuple, list[Point]] = {}
    for entry in table.entries:
        if entry.kind == METHOD and entry.key and (entry.key.method, entry.key.backbone) not in based:
            who = (entry.key.experiment, entry.key.method, entry.key.backbone, entry.key.trained)
            lacking.setdefault(who, []).extend(entry.points)
    for points in lacking.values():
        if not _has_base(points[0].result.method):
            continue
        seeds = sorted({p.seed for p in points})
        verb = "run" if len(seeds) == 1 else "sweep"
        judging = evaluation_keys(points[0].result.method)
        owner = points[0].result.trained_by
        trainer = points[0].folder.path.parent / owner if owner else points[0].folder.path
        typed = [word for word in overrides(RunFolder(trainer)) if word.split("=")[0] not in judging]
        words = [points[0].result.experiment, *typed, "train_depth=0"]
        words += ["depth=0"] * (verb == "sweep") + [f"seed={','.join(map(str, seeds))}"]
        hints.append(
            f"{points[0].result.experiment} has no base run on this data, so differences are against its "
            f"smallest depth. Train the base with: reason {verb} {' '.join(words)}"
        )
    return list(dict.fromkeys(hints))


def _has_base(method: str) -> bool:
    """Whether the method can be left out of training: its least depth is 0."""
    from reason import registry

    try:
        return registry.card("methods", method).depth.least == 0
    except ReasonError:  # its package is no longer installed
        return False


# --- as plain data ------------------------------------------------------------------------------


def as_dict(table: Comparison) -> dict[str, Any]:
    """The comparison as JSON data; keys are stable, what was not measured is null."""
    return {**_shared(table), "units": asdict(table.units), "notes": table.notes, "hints": table.hints,
            "rows": [_line(e) | {"metrics": e.metrics} for e in table.entries]}  # fmt: skip


def as_lines(table: Comparison) -> list[dict[str, Any]]:
    """One flat dict per entry, every one with the same keys: lines of a CSV."""
    flat = []
    for entry in table.entries:
        line = _shared(table) | _line(entry)
        line["settings"] = " ".join(f"{k}={v}" for k, v in line["settings"].items())
        for name in ("seeds", "runs", "pareto"):
            line[name] = " ".join(map(str, line[name]))
        flat.append(line)
    return flat


def _shared(table: Comparison) -> dict[str, Any]:
    return {
        "accuracy_metric": table.accuracy,
        "dataset": table.dataset,
        "data_digest": table.data_digest,
        "split": table.split,
        "n": table.n,
    }


def _line(e: Entry) -> dict[str, Any]:
    d, key = e.difference, e.key
    return {
        "label": e.label,
        "kind": e.kind,
        "experiment": key.experiment if key else None,
        "method": key.method if key else None,
        "rival": key.rival if key and key.rival else None,
        "backbone": key.backbone if key else None,
        "train_depth": key.train_depth if key else None,
        "depth": e.depth,
        "depth_unit": e.points[0].result.units.depth if e.points else None,
        "settings": dict(key.settings) if key else {},
        "seeds": [p.seed for p in e.points],
        "runs": [p.run for p in e.points],
        "accuracy": e.accuracy.value,
        "accuracy_low": e.accuracy.low,
        "accuracy_high": e.accuracy.high,
        "valid_accuracy": e.valid.value if e.valid else None,
        "valid_accuracy_low": e.valid.low if e.valid else None,
        "valid_accuracy_high": e.valid.high if e.valid else None,
        "chosen_on_validation": e.chosen,
        "reference": e.reference or None,
        "difference": d.value if d else None,
        "difference_low": d.low if d else None,
        "difference_high": d.high if d else None,
        "p": d.p if d else None,
        "p_holm": e.p,
        "distinguishable": e.distinguishable,
        "paired_seeds": d.seeds if d else None,
        **{name: e.costs.get(name) for name in _COSTS},
        "pareto": e.fronts,
        "device": "; ".join(sorted({p.device for p in e.points})) or None,
    }
