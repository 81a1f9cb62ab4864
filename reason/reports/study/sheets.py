"""A study as sheets: for each section tables of words, and remarks. How they are drawn is ``views``'s."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from reason.metrics.statistics import Interval
from reason.reports import formatting
from reason.reports.study import Study
from reason.reports.study.cohorts import FEWEST, CohortResult
from reason.reports.study.models import MEANS, Tested
from reason.reports.study.oracle import Oracle
from reason.reports.study.policies import PolicyResult
from reason.reports.study.shares import AT_RANDOM, ShareResult
from reason.reports.study.triangle import Answer, Line
from reason.reports.summaries import _Column, _Signs

UNICODE = _Signs("◂", "▲", "▼", "≈")


@dataclass
class Sheet:
    """One table, its title above and what a reader has to know below."""

    title: str
    columns: list[_Column]
    notes: list[str] = field(default_factory=list)
    styles: list[str] = field(default_factory=list)
    rules: set[int] = field(default_factory=set)

    @property
    def height(self) -> int:
        return len(self.columns[0].cells)


Made = tuple[list[Sheet], list[str]]


def section(study: Study, name: str, signs: _Signs = UNICODE, width: int | None = None) -> Made:
    """The tables of one section, and remarks on it as a whole.

    Args:
        width: characters there are; a triangle too wide for them leaves its intervals out.
    """
    sheets, remarks = _SECTIONS[name](study, signs, width) if study.evidence.models else ([], [])
    return sheets, [*remarks, *(f"Not computed: {why}" for why in study.missing[name])]


# --- words ----------------------------------------------------------------------------------------


def mark(test: Tested | None, sign: int, signs: _Signs) -> str:
    """A difference with its interval and the sign of its verdict."""
    if test is None:
        return ""
    found = {"better": signs.better, "worse": signs.worse}.get(test.verdict(sign), signs.unclear)
    return f"{formatting.difference(test.difference)} {found}"


def _p(test: Tested | None) -> str:
    return formatting.probability(test.p) if test else ""


def _value(number: float | None) -> str:
    return "" if number is None else f"{number:.4f}"


def _percent(i: Interval | None) -> str:
    return "" if i is None else f"{i.value:+.1%} [{i.low:+.1%}, {i.high:+.1%}]"


def _legend(signs: _Signs, tests: Sequence[int]) -> str:
    after = f" after Holm's correction for {_range(tests)} tests" if max(tests, default=0) > 1 else ""
    told = f"{signs.better} better, {signs.worse} worse, {signs.unclear} not distinguishable"
    return f"{told} at p < 0.05{after}."


def _range(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low}" if low == high else f"{low} to {high}"


def _over(n: int, seeds: Sequence[int], example: str) -> str:
    return f"{n:,} {example}s and {len(seeds)} seed{'s' * (len(seeds) != 1)}"


# --- the sections ---------------------------------------------------------------------------------


def _answer(study: Study, signs: _Signs, width: int | None) -> Made:
    told, table = study.answer, study.evidence.table
    columns = [
        _Column("", [a.model for a in told], right=False),
        _Column("depth", [f"{a.deep} {signs.chosen}" if a.deep_is == "chosen on validation" else str(a.deep) for a in told]),
        _Column("vs. base [95%]", [mark(a.to_base, study.sign, signs) for a in told], right=False),
        _Column("p", [_p(a.to_base) for a in told], 3),
        _Column("vs. own smallest depth [95%]", [mark(a.to_least, study.sign, signs) for a in told], 2, right=False),
        _Column("p", [_p(a.to_least) for a in told], 4),
        _Column("ms", [_times(a.ms_least, a.ms_deep) for a in told], 1),
    ]  # fmt: skip
    tests = [t.tests for a in told for t in (a.to_base, a.to_least) if t]
    notes = [f"{signs.chosen} the depth chosen on validation; otherwise the deepest."]
    if any(a.ms_deep is not None for a in told):
        notes.append("ms: median latency at the smallest depth and at this one.")
    if tests:
        seeds = _range([t.difference.seeds for a in told for t in (a.to_base, a.to_least) if t])
        over = f"{table.n:,} {table.units.example}s and {seeds} seed{'s' * (seeds != '1')}"
        notes += [f"Paired over {over}.", _legend(signs, tests)]
    remarks = [_sentence(study, a) for a in told]
    if not table.one_device:
        remarks.append("Latencies were measured on different devices and are not compared.")
    return [Sheet("", columns, notes)], remarks


def _times(least: float | None, deep: float | None) -> str:
    if least is None or deep is None:
        return ""
    return ("" if least == deep else f"{formatting.number(least)} to ") + formatting.number(deep)


def _sentence(study: Study, a: Answer) -> str:
    """What the sections say of one model, in words."""
    references = ((a.to_base, "the base"), (a.to_least, f"its own depth {a.least}"))
    parts = [_verdict(test, study.sign, other) for test, other in references if test]
    if a.ms_least is not None and a.ms_deep is not None and a.deep != a.least:
        parts.append(f"a request takes {a.ms_deep / a.ms_least:.1f} times as long as at depth {a.least}")
    tests = [g.to_base or g.to_least for c in study.cohorts if c.model == a.model for g in c.groups]
    verdicts = [t.verdict(study.sign) for t in tests if t]
    if verdicts:
        better, worse = (verdicts.count(v) or "none" for v in ("better", "worse"))
        parts.append(f"{better} of {len(verdicts)} groups improve and {worse} get worse")
    for o in study.oracle:
        if o.model == a.model and o.null:
            parts.append(f"the gain from a perfect choice of depth is {o.null.verdict}")
    mine = [p for p in study.policies if p.model == a.model and p.to_mixture]
    if mine:
        won = [p.policy for p in mine if p.to_mixture and p.to_mixture.verdict(study.sign) == "better"]
        winners = f"{', '.join(won) or 'none'} beat{'s' * (len(won) < 2)}"
        parts.append(f"of {len(mine)} policies {winners} a random choice at the same mean depth")
    told = "; ".join(parts or ["there is nothing to compare it with"])
    return f"{a.model} at depth {a.deep} ({a.deep_is}): {told}."


def _verdict(test: Tested, sign: int, other: str) -> str:
    verdict = test.verdict(sign)
    return f"not distinguishable from {other}" if verdict.startswith("not") else f"{verdict} than {other}"


def _triangle(study: Study, signs: _Signs, width: int | None) -> Made:
    lines = study.triangle
    depths = sorted({d for line in lines for d in line.cells})
    labels = [line.label for line in lines]
    trained = ["base" if line.base else str(line.train_depth) for line in lines]

    def cells(depth: int, text: Callable[[Any], str]) -> list[str]:
        return [text(line.cells[depth]) if depth in line.cells else "" for line in lines]

    def stars(cell: Any) -> int:
        return 2 if cell.best else 1 if cell.chosen else 0

    def columns(text: Callable[[Interval], str]) -> list[_Column]:
        def marked(cell: Any) -> str:
            sign = signs.chosen * stars(cell)
            return f"{text(cell.accuracy)} {sign:<{most}}" if most else text(cell.accuracy)

        return [
            _Column("", labels, right=False),
            _Column("train depth", trained),
            *(_Column(f"depth {d}", cells(d, marked)) for d in depths),
            _Column("seeds", [str(len(line.seeds)) for line in lines], 1),
        ]

    most = max((stars(c) for line in lines for c in line.cells.values()), default=0)
    whole, notes = columns(formatting.interval), []
    if width is not None and sum(c.width + 2 for c in whole) - 2 > width:
        whole = columns(lambda i: f"{i.value:.4f}")
        notes.append("Intervals omitted to fit the window; widen it, or use --json.")
    if most:
        notes.append(f"{signs.chosen} the depth chosen on validation, within each row.")
    if most == 2:
        notes.append(f"{signs.chosen * 2} the one chosen among all training depths of a configuration.")
    rules = {i for i in range(len(lines) - 1) if lines[i].base != lines[i + 1].base}
    sheets = [Sheet("", whole, notes, ["cyan" if line.base else "" for line in lines], rules)]
    return sheets + _beside(lines), []


def _beside(lines: list[Line]) -> list[Sheet]:
    """What else is known of the answers at each depth, no accuracy."""
    rows = [(line, d, cell) for line in lines for d, cell in line.cells.items()]
    overall = list(dict.fromkeys(n for _, _, c in rows for n in c.overall))
    means = [n for n in MEANS if any(n in c.means for _, _, c in rows)]
    if not overall and not means:
        return []
    columns = [
        _Column("", ["" if i and rows[i - 1][0] is line else line.label for i, (line, _, _) in enumerate(rows)], right=False),
        _Column("train depth", ["base" if line.base else str(line.train_depth) for line, _, _ in rows], 9),
        _Column("depth", [str(d) for _, d, _ in rows]),
        *(_Column(n, [formatting.number(c.means.get(n)) for _, _, c in rows]) for n in means),
        *(_Column(n, [formatting.number(c.overall.get(n)) for _, _, c in rows], i + 1) for i, n in enumerate(overall)),
        _Column("ms", [formatting.number(c.ms) for _, _, c in rows], 8),
    ]  # fmt: skip
    return [Sheet("Properties of the answers", columns, [f"{n}: {MEANS[n]}." for n in means])]


def _cohorts(study: Study, signs: _Signs, width: int | None) -> Made:
    sheets = [_cohort(study, c, signs) for c in study.cohorts]
    if not sheets:
        return [], []
    remarks = []
    tests = [t.tests for c in study.cohorts for g in c.groups for t in (g.to_base, g.to_least) if t]
    if tests:
        sides = [(c, to) for c in study.cohorts for to in ("to_base", "to_least")]
        families = sum(any(getattr(g, to) for g in c.groups) for c, to in sides)
        total = f"in total, {len(tests)} differences were tested in {families} such families"
        remarks += [_legend(signs, tests), f"p is corrected within each table and reference; {total}."]
    if late := ", ".join(dict.fromkeys(c.column for c in study.cohorts if not c.known)):
        use = "useful for analysis, not for deciding who gets more depth"
        remarks.append(f"{late}: known only once the answer is; {use}.")
    if any(g.n < FEWEST for c in study.cohorts for g in c.groups):
        remarks.append(f"Groups with fewer than {FEWEST} examples are not tested.")
    return sheets, remarks


def _cohort(study: Study, c: CohortResult, signs: _Signs) -> Sheet:
    groups, depths, policies = c.groups, list(c.groups[0].at), list(c.groups[0].exits)
    columns = [
        _Column(c.column, [g.label for g in groups], right=False),
        _Column("n", [f"{g.n:,}" for g in groups]),
        _Column("base", [_value(g.base) for g in groups], 4),
        *(_Column(f"depth {d}", [_value(g.at[d]) for g in groups], 3 if d == c.deep else 5) for d in depths),
        _Column(f"{c.deep} vs. base [95%]", [mark(g.to_base, study.sign, signs) for g in groups], 1, right=False),
        _Column("p", [_p(g.to_base) for g in groups], 6),
        _Column(f"{c.deep} vs. {c.least} [95%]", [mark(g.to_least, study.sign, signs) for g in groups], 2, right=False),
        _Column("p", [_p(g.to_least) for g in groups], 7),
        *(_Column(f"depth by {p}", [f"{g.exits[p]:.2f}" for g in groups], 8 + i) for i, p in enumerate(policies)),
    ]  # fmt: skip
    seeds = {t.difference.seeds for g in groups for t in (g.to_base, g.to_least) if t}
    paired = f" ({_range(sorted(seeds))} seed{'s' * (seeds != {1})})" if seeds else ""
    return Sheet(f"{c.model}, by {c.label}{paired}", columns)


def _oracle(study: Study, signs: _Signs, width: int | None) -> Made:
    sheets = [_one_oracle(study, o) for o in study.oracle]
    if not sheets:
        return [], []
    remarks = ["Gains: positive is better. Picking the best of several answers in hindsight gains by luck alone; the base runs show "
               "how much. Base runs differ in their seed, the depths of a model share one, so the null is conservative."]  # fmt: skip
    return sheets, remarks


def _one_oracle(study: Study, o: Oracle) -> Sheet:
    null, example = o.null, study.evidence.table.units.example
    rows = [
        (f"one depth for all ({o.fixed})", formatting.interval(o.fixed_accuracy),
         _value(null.oracle.value - study.sign * null.gain.value) if null else ""),
        ("best depth for each", formatting.interval(o.oracle), formatting.interval(null.oracle) if null else ""),
        ("gain", formatting.difference(o.gain), formatting.difference(null.gain) if null else ""),
        ("gain over the base", _percent(o.over_base), _percent(null.over_base) if null else ""),
    ]  # fmt: skip
    if null and null.runs < len(o.depths):
        both = formatting.difference(null.model_gain), formatting.difference(null.gain)
        rows.append((f"gain, best of {null.runs}", *both))
    told = f"No null: {o.why_no_null}."
    if null:
        rows.append(("excess over luck", formatting.difference(null.excess), ""))
        told = f"The gain from choosing a depth for each example is {null.verdict}."
        if null.runs < len(o.depths):
            told += f" There are only {null.runs} base runs, so they are compared with {null.runs} depths, averaged over all choices."
        elif len(null.seeds) > null.runs:
            choices = f"{null.runs} out of {len(null.seeds)} base runs"
            told += f" The null is averaged over all choices of {choices}."
    shares = ", ".join(f"{d}: {share:.1%}" for d, share in o.histogram.items())
    alike = f"All depths are equally good for {o.alike:.1%} of {example}s."
    over = f"Averaged over {_over(o.n, o.seeds, example)}."
    best = f"Best depth (ties: the smallest): {shares}. {alike}"
    notes = [told, best, f"Depth {o.fixed} was {o.fixed_is}. {over}"]
    columns = [
        _Column("", [r[0] for r in rows], right=False),
        _Column(f"{len(o.depths)} depths", [r[1] for r in rows], right=False),
        _Column(f"{null.runs} base runs (null)" if null else "null", [r[2] for r in rows], right=False),
    ]
    return Sheet(o.model, columns, notes)


def _policies(study: Study, signs: _Signs, width: int | None) -> Made:
    sheets = []
    for model in dict.fromkeys(p.model for p in study.policies):
        mine = [p for p in study.policies if p.model == model]
        recovered = next((o.recovery for o in study.oracle if o.model == model), {})
        sheets.append(_policy(study, mine, recovered, signs))
    if not sheets:
        return [], []
    tests = [t.tests for p in study.policies for t in (p.to_fixed, p.to_mixture, p.to_line) if t]
    remarks = [
        "vs. random: the same depths assigned at random. vs. mixture: the two neighbouring fixed depths, mixed to the "
        "same mean depth. Both are exact expectations.",
        "recovered: share of the oracle's gain that the policy achieves.",
    ]
    return sheets, remarks + ([_legend(signs, tests)] if tests else [])


def _policy(study: Study, mine: list[PolicyResult], recovered: dict[str, Interval], signs: _Signs) -> Sheet:
    sign = study.sign
    columns = [
        _Column("policy", [p.policy for p in mine], right=False),
        _Column("depth", [f"{p.mean_depth:.2f}" for p in mine]),
        _Column(f"{study.evidence.table.accuracy} [95%]", [formatting.interval(p.accuracy) for p in mine], 2),
        _Column("vs. random [95%]", [mark(p.to_mixture, sign, signs) for p in mine], right=False),
        _Column("p", [_p(p.to_mixture) for p in mine], 4),
        _Column(f"vs. depth {mine[0].fixed} [95%]", [mark(p.to_fixed, sign, signs) for p in mine], 1, right=False),
        _Column("p", [_p(p.to_fixed) for p in mine], 5),
        _Column("vs. mixture [95%]", [mark(p.to_line, sign, signs) for p in mine], 3, right=False),
        _Column("p", [_p(p.to_line) for p in mine], 6),
        _Column("recovered", [_percent(recovered.get(p.policy)) for p in mine], 8),
        _Column("ms", [formatting.number(p.ms) for p in mine], 7),
        _Column("depths used", [", ".join(f"{d:g}: {s:.0%}" for d, s in p.shares.items()) for p in mine], 9, right=False),
    ]  # fmt: skip
    over = _over(mine[0].n, mine[0].seeds, study.evidence.table.units.example)
    notes = [f"Depth {mine[0].fixed}: {mine[0].fixed_is}. Averaged over {over}."]
    notes += [f"{p.policy}: {p.why}." for p in mine if p.why]
    return Sheet(mine[0].model, columns, notes)


def _deep(study: Study, signs: _Signs, width: int | None) -> Made:
    models = dict.fromkeys(s.model for s in study.deep)
    if not models:
        return [], []
    tests = [t.tests for s in study.deep for t in (s.to_none, s.to_random) if t]
    remarks = [
        "inside: accuracy of the deep share; outside: of the rest. 'at random' is the exact expectation."
    ]
    remarks.append(_legend(signs, tests))
    if all(s.chosen == AT_RANDOM for s in study.deep):
        remarks.append(
            "Only a random choice is shown, as the rows have no cohort that is known before the answer."
        )
    return [_shares(study, [s for s in study.deep if s.model == model], signs) for model in models], remarks


def _shares(study: Study, mine: list[ShareResult], signs: _Signs) -> Sheet:
    s0, sign = mine[0], study.sign
    columns = [
        _Column("deep", [f"{s.share:.0%}" for s in mine]),
        _Column("chosen", [s.chosen for s in mine], right=False),
        _Column("inside", [_value(s.inside) for s in mine], 3),
        _Column("outside", [_value(s.outside) for s in mine], 3),
        _Column("total", [_value(s.total) for s in mine]),
        _Column("vs. none deep [95%]", [mark(s.to_none, sign, signs) for s in mine], 1, right=False),
        _Column("p", [_p(s.to_none) for s in mine], 5),
        _Column("vs. random [95%]", [mark(s.to_random, sign, signs) for s in mine], 2, right=False),
        _Column("p", [_p(s.to_random) for s in mine], 6),
        _Column("ms", [formatting.number(s.ms) for s in mine], 0),
    ]
    rules = {i for i in range(len(mine) - 1) if mine[i].chosen != mine[i + 1].chosen}
    over = _over(s0.n, s0.seeds, study.evidence.table.units.example)
    note = f"Deep means depth {s0.deep}; the rest get depth {s0.least}. Averaged over {over}."
    if s0.ms is not None:
        note += " ms: mean latency, from the medians at both depths."
    return Sheet(s0.model, columns, [note], rules=rules)


_SECTIONS: dict[str, Callable[[Study, _Signs, int | None], Made]] = {
    "answer": _answer,
    "triangle": _triangle,
    "cohorts": _cohorts,
    "oracle": _oracle,
    "policies": _policies,
    "deep": _deep,
}
