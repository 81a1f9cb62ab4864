"""Is deeper reasoning worth it, for whom, at what cost? Answered from the rows of finished runs.

A study looks into a comparison. Like it, it knows no method: depth is a number, rows are per example,
and what tells examples apart stands on the method's card. Whatever is *chosen* is chosen by
validation, whatever is *reported* is test, every difference is paired over examples and seeds, and p
values that are read together are corrected together.

    models      runs -> models, policies and bases, their rows in one order
    triangle    depths trained for by depths judged at; the answer in one line
    cohorts     groups of examples
    oracle      the best depth of each example, and the luck in it
    policies    depth decided case by case, against chance
    shares      part of the requests answered deep
    claims      what a paper says beside what we measured
    sheets, views, picture   how all of it is shown
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reason.metrics.statistics import Interval
from reason.reports.frame import Frame, frames
from reason.reports.study.cohorts import CohortResult, cohort
from reason.reports.study.models import Evidence, Tested, bases_elsewhere, gather, tested
from reason.reports.study.oracle import Oracle, oracle
from reason.reports.study.policies import PolicyResult, policies
from reason.reports.study.shares import ShareResult, deep_shares
from reason.reports.study.triangle import Answer, Line, answers, triangle

SECTIONS = ("answer", "triangle", "cohorts", "oracle", "policies", "deep")


@dataclass
class Study:
    """One set of runs that may be ranked, looked into. Every section says what of it is missing, and why."""

    evidence: Evidence
    answer: list[Answer]
    triangle: list[Line]
    cohorts: list[CohortResult] = field(default_factory=list)
    oracle: list[Oracle] = field(default_factory=list)
    policies: list[PolicyResult] = field(default_factory=list)
    deep: list[ShareResult] = field(default_factory=list)
    missing: dict[str, list[str]] = field(default_factory=lambda: {s: [] for s in SECTIONS})

    @property
    def sign(self) -> int:
        return self.evidence.sign


def studies(root: Path | str, names: Sequence[str] = ()) -> list[Study]:
    """Study the finished runs under ``root``.

    Args:
        names: as for ``frames``: without, one study for each set of runs that can be ranked.
    Raises:
        ConfigError: see ``frames``. RunError: rows that cannot be read.
    """
    found = []
    for frame in frames(root, names):
        study = study_frame(frame)
        if names and not study.evidence.bases:
            elsewhere = bases_elsewhere(root, frame)
            if elsewhere:  # rather than the command that trains one
                words = " ".join([*names, *elsewhere])
                study.missing["answer"] = [f"the base was not named, but there is one: reason study {words}"]
        found.append(study)
    return found


def study_frame(frame: Frame) -> Study:
    """Every section of what one frame holds."""
    evidence = gather(frame)
    study = Study(evidence, answers(evidence), triangle(evidence))
    missing = study.missing
    if not evidence.models:
        if not evidence.notes:
            missing["answer"].append("all models here are bases; none was trained with the method.")
        return study
    missing["answer"] += evidence.table.hints
    columns = {c.column for m in evidence.models for c in evidence.cohorts[m.key.method]}
    absent = sorted(columns - evidence.columns.keys())
    if absent:
        mend = "Newer runs record it; `reason evaluate RUN` adds it to an older run's model."
        missing["cohorts"].append(f"the rows have no column {', '.join(absent)}. {mend}")
    for model in evidence.models:
        cohorts = [c for c in evidence.cohorts[model.key.method] if c.column not in absent]
        if not evidence.cohorts[model.key.method]:
            missing["cohorts"].append(f"the method {model.key.method} defines no cohorts.")
        sections: dict[str, Callable[[], list]] = {
            "cohorts": lambda m=model, by=cohorts: [cohort(m, c, evidence) for c in by],
            "oracle": lambda m=model: [oracle(m, evidence)],
            "policies": lambda m=model: policies(m, evidence),
            "deep": lambda m=model: deep_shares(m, evidence),
        }
        for section, compute in sections.items():
            try:
                getattr(study, section).extend(compute())
            except ValueError as error:
                missing[section].append(f"{str(error).rstrip('.')} ({model.label}).")
    nulls = [o.null for o in study.oracle if o.null]
    for null, test in zip(nulls, tested([n.excess for n in nulls]), strict=True):
        null.tested = test
    return study


# --- as plain data ------------------------------------------------------------------------------


def as_dict(study: Study) -> dict[str, Any]:
    """The study as JSON data; keys are stable, what could not be computed is null and said in ``missing``."""
    t = study.evidence.table
    return {
        "accuracy_metric": t.accuracy, "larger_is_better": t.larger_is_better, "dataset": t.dataset,
        "data_digest": t.data_digest, "split": t.split, "n": t.n, "units": dataclasses.asdict(t.units),
        **{section: [_plain(r, study.sign) for r in getattr(study, section)] for section in SECTIONS},
        "missing": study.missing, "notes": study.evidence.notes,
    }  # fmt: skip


def _plain(value: Any, sign: int) -> Any:
    if isinstance(value, Tested):
        told = dataclasses.asdict(value.difference) | {"p_holm": value.p, "tests": value.tests}
        return told | {"verdict": value.verdict(sign)}
    if isinstance(value, Interval):
        return value._asdict()
    if dataclasses.is_dataclass(value):
        told = {f.name: _plain(getattr(value, f.name), sign) for f in dataclasses.fields(value)}
        properties = (n for n, p in vars(type(value)).items() if isinstance(p, property))
        return told | {name: _plain(getattr(value, name), sign) for name in properties}
    if isinstance(value, dict):
        return {str(k): _plain(v, sign) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v, sign) for v in value]
    return value


__all__ = ["SECTIONS", "Study", "as_dict", "studies", "study_frame"]
