"""What a paper claims beside what we measured: every claim is data, every verdict is computed.

A claim names a model by configuration keys, never by a run, and says which comparison would bear it
out. It is *reproduced* where the interval of that comparison lies on the claimed side of 0 (and the p
value, corrected over all claims judged together, below 0.05), *contradicted* where it lies on the
other side, and else *not distinguishable*: all at the size of what was run here.

    {kind: difference, a: MODEL, b: base | MODEL}    a is more accurate than b
    {kind: best_trained, model: MODEL}               MODEL is more accurate than all other train depths
    {kind: contrast, model: MODEL, to: base | least, column, more: first | last}
                                                     one end of the groups gains more than the other
    {kind: group, model: MODEL, to: base | least, column, group: first | last, better: true | false}
                                                     the first or last group gains, or loses
    {kind: oracle, model: MODEL}                     the best depth for each gains more than luck
    {kind: time, model: MODEL, of: batch | request, at_most: 1.1}
                                                     it takes at most so many times as long as at depth 0

MODEL is ``{train_depth: 2, depth: 2, latent.loss: prl}``: keys of the configuration, and the depth it is
judged at (left out: its train_depth). ``deepest`` is the largest train depth there is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from reason.metrics.statistics import Difference, paired_difference
from reason.reports import formatting
from reason.reports.study import Study
from reason.reports.study.cohorts import Group, contrast, cut, within
from reason.reports.study.models import Model, Outcome, Tested, tested

REPRODUCED, CONTRADICTED = "reproduced", "contradicted"
UNCLEAR, ABSENT = "not distinguishable", "not computed"


class NoModel(ValueError):
    """Nothing here was trained like that."""


@dataclass
class Finding:
    """What one set of runs says of one claim."""

    claim: str  # its id
    where: str  # name of the set
    measured: str  # the comparison with its interval, in words; why not, where it could not be computed
    verdict: str
    p: float | None = None  # corrected over all findings judged together
    n: int | None = None
    seeds: int | None = None


@dataclass
class _Judged:
    """A comparison before it is corrected: gains, so that positive bears the claim out."""

    told: str
    gains: list[Difference]  # all of which must be positive
    low: float | None = None  # of what is no difference of rows (time): decided by its interval alone
    high: float | None = None


def judge(claims: Sequence[Mapping[str, Any]], studies: Mapping[str, Study | str]) -> list[Finding]:
    """Every claim in every one of its sets.

    Args:
        claims: ``{id, test, sets}``; see the module for ``test``. studies: set -> study, or why there is none.
    """
    judged: list[tuple[str, str, _Judged | str]] = []
    for claim in claims:
        for where in claim["sets"]:
            study = studies[where]
            test = claim["test"]
            try:
                found = study if isinstance(study, str) else _KINDS[test["kind"]](study, test)
            except ValueError as error:
                found = str(error)
            judged.append((claim["id"], where, found))
    gains = [d for _, _, found in judged if isinstance(found, _Judged) for d in found.gains]
    corrected = iter(tested(gains))
    findings = []
    for claim, where, found in judged:
        if isinstance(found, str):
            findings.append(Finding(claim, where, found, ABSENT))
            continue
        tests = [t for t in (next(corrected) for _ in found.gains) if t]
        if not tests:
            findings.append(Finding(claim, where, found.told, _by_interval(found.low, found.high)))
            continue
        p, d = max(t.p for t in tests), tests[0].difference
        findings.append(Finding(claim, where, found.told, _verdict(tests), p, d.n, d.seeds))
    return findings


def _verdict(tests: Sequence[Tested]) -> str:
    """All must be on the claimed side; one that is on the other contradicts."""
    verdicts = [t.verdict(1) for t in tests]
    if "worse" in verdicts:
        return CONTRADICTED
    return REPRODUCED if all(v == "better" for v in verdicts) else UNCLEAR


def _by_interval(low: float | None, high: float | None) -> str:
    if low is None or high is None or low <= 0 <= high:
        return UNCLEAR
    return REPRODUCED if low > 0 else CONTRADICTED


# --- finding models -------------------------------------------------------------------------------


def find(study: Study, wanted: Mapping[str, Any]) -> tuple[Model, Outcome]:
    """The one model that a claim means, and what it did at the depth in question.

    Raises:
        ValueError: none, several, or not judged at that depth.
    """
    keys = {k: v for k, v in wanted.items() if k not in ("depth", "train_depth")}
    alike = [m for m in study.evidence.models if all(str(_key(m, k)) == str(v) for k, v in keys.items())]
    train_depth = wanted.get("train_depth")
    if train_depth == "deepest":
        train_depth = max((m.train_depth for m in alike), default=None)
    found = [m for m in alike if train_depth in (None, m.train_depth)]
    said = ", ".join(f"{k}={v}" for k, v in {**keys, "train_depth": train_depth}.items() if v is not None)
    if len(found) != 1:
        raise ValueError(f"several models with {said}") if found else NoModel(f"no model with {said}")
    model = found[0]
    depth = wanted.get("depth", model.train_depth)
    if depth not in model.depths:
        raise ValueError(f"{model.label} was not evaluated at depth {depth}")
    return model, model.depths[depth]


def _key(model: Model, key: str) -> Any:
    return model.depths[model.least].entry.points[0].config.get(key)


def _reference(model: Model, to: str) -> tuple[Outcome, str]:
    """The base, or the model itself at its least depth; and what it is called."""
    if to == "least":
        return model.depths[model.least], f"depth {model.least}"
    if model.base is None:
        raise ValueError(f"{model.label} has no base run")
    return model.base, "the base"


# --- the kinds ------------------------------------------------------------------------------------


def _gain(study: Study, a: Outcome, b: Outcome) -> Difference:
    return _towards(paired_difference(a.rows, b.rows), study.sign)


def _towards(d: Difference, sign: int) -> Difference:
    """The difference as a gain: positive is better."""
    return d if sign > 0 else Difference(-d.value, -d.high, -d.low, d.p, d.n, d.seeds)


def _difference(study: Study, test: Mapping[str, Any]) -> _Judged:
    model, a = find(study, test["a"])
    if test["b"] == "base":
        b, name = _reference(model, "base")
    else:
        other, b = find(study, test["b"])
        name = f"trained at depth {other.train_depth}"
        if other is model and b is a:
            raise ValueError(f"no model was trained at a greater depth than {model.train_depth}")
    d = _gain(study, a, b)
    share = f" ({d.value / b.entry.accuracy.value:+.1%})" if b.entry.accuracy.value else ""
    return _Judged(f"vs. {name}: {formatting.difference(d)}{share}", [d])


def _best_trained(study: Study, test: Mapping[str, Any]) -> _Judged:
    model, mine = find(study, test["model"])
    series = {k: v for k, v in test["model"].items() if k not in ("depth", "train_depth")}
    trained = {m.train_depth for m in study.evidence.models} - {model.train_depth}
    others = []
    for train_depth in sorted(trained):
        try:
            others.append((train_depth, find(study, {**series, "train_depth": train_depth})[1]))
        except NoModel:  # that depth belongs to another configuration
            continue
    if not others:
        raise ValueError(f"it was trained at depth {model.train_depth} only")
    gains = [_gain(study, mine, other) for _, other in others]
    pairs = zip(others, gains, strict=True)
    return _Judged("; ".join(f"vs. {depth}: {formatting.difference(d)}" for (depth, _), d in pairs), gains)


def _groups(study: Study, model: Model, column: str) -> list[Group]:
    """The groups of the first cohort on the card with that column."""
    cards = study.evidence.cohorts[model.key.method]
    by = next((c for c in cards if c.column == column), None)
    if by is None or column not in study.evidence.columns:
        raise ValueError(f"the rows have no column {column}")
    return cut(study.evidence.columns[column], by.edges)


def _contrast(study: Study, test: Mapping[str, Any]) -> _Judged:
    model, mine = find(study, test["model"])
    groups = _groups(study, model, test["column"])
    other, name = _reference(model, test["to"])
    more, less = (groups[0], groups[-1]) if test["more"] == "first" else (groups[-1], groups[0])
    d = _towards(contrast(mine, other, more, less), study.sign)
    told = f"gain over {name} at {test['column']} {more.label} minus that at {less.label}: {formatting.difference(d)}"
    return _Judged(told, [d])


def _group(study: Study, test: Mapping[str, Any]) -> _Judged:
    model, mine = find(study, test["model"])
    groups = _groups(study, model, test["column"])
    other, name = _reference(model, test["to"])
    group = groups[0] if test["group"] == "first" else groups[-1]
    (found,) = within(group, mine, [other])
    if found is None:
        raise ValueError(f"{test['column']} {group.label} has too few examples, or no common seed")
    d = _towards(found, study.sign)
    told = f"gain over {name} at {test['column']} {group.label}: {formatting.difference(d)}"
    return _Judged(told, [d if test["better"] else _towards(d, -1)])


def _oracle(study: Study, test: Mapping[str, Any]) -> _Judged:
    model, _ = find(study, test["model"])
    found = next((o for o in study.oracle if o.model == model.label), None)
    if found is None or found.null is None:
        raise ValueError(found.why_no_null if found else "; ".join(study.missing["oracle"]))
    null = found.null
    over, luck = found.over_base, null.over_base
    percent = f"{over.value:+.0%} [{over.low:+.0%}, {over.high:+.0%}] over the base, " if over else ""
    if luck:
        percent += f"{luck.value:+.0%} [{luck.low:+.0%}, {luck.high:+.0%}] from {null.runs} base runs; "
    return _Judged(f"{percent}excess over luck: {formatting.difference(null.excess)}", [null.excess])


_CLOCKS = {"request": ("latency_p50_ms", 1), "batch": ("throughput_per_s", -1)}


def _time(study: Study, test: Mapping[str, Any]) -> _Judged:
    """Ratio of the time at the train depth to that at the least; interval over seeds (t, on logs)."""
    model, mine = find(study, test["model"])
    least = model.depths[model.least]
    if mine is least or not study.evidence.table.one_device:
        raise ValueError("its times at the two depths were not measured on the same kind of device")
    key, power = _CLOCKS[test["of"]]
    deep, shallow = ({p.seed: getattr(p.judged, key, None) for p in o.entry.points} for o in (mine, least))
    ratios = [(value / shallow[s]) ** power for s, value in deep.items() if value and shallow.get(s)]
    if not ratios:
        raise ValueError("no time was measured")
    logs = np.log(ratios)
    told = f"a {test['of']} takes {np.exp(logs.mean()):.2f} times as long as at depth {model.least}"
    if len(logs) < 2:
        return _Judged(f"{told}; only one seed, so no interval", [])
    from scipy.stats import t

    half = float(t.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / np.sqrt(len(logs)))
    low, high = logs.mean() - half, logs.mean() + half
    told += f" [{np.exp(low):.2f}, {np.exp(high):.2f}] over {len(logs)} seeds; claimed: at most {test['at_most']:.4g}"
    limit = float(np.log(test["at_most"]))
    return _Judged(told, [], limit - high, limit - low)


_KINDS = {
    "difference": _difference,
    "best_trained": _best_trained,
    "contrast": _contrast,
    "group": _group,
    "oracle": _oracle,
    "time": _time,
}
